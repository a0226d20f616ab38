"""Prefix language models: bidirectional attention within prompts, for any token-level loss.

Shape letters: B batch, L length.
"""

from functools import partial

import jax
import jax.numpy as jnp

from data.batch import TokenBatch
from models.transformer import Apply
from trainer.objective import Params, WrappedObjective


def prefix_of(batch: TokenBatch) -> jax.Array:
    """Returns the prefix mask [B, L] bool: the tokens of each document before its first token in the loss.

    The last prefix token is the one whose target is the first in the loss. A document without tokens in the loss is
    all prefix.
    """
    in_loss_BL = jnp.asarray(batch.loss_mask) > 0
    before_BL = jnp.cumsum(in_loss_BL, axis=1) - in_loss_BL
    starts_BL = jnp.arange(in_loss_BL.shape[1])[None] - batch.positions
    first_BL = jnp.take_along_axis(before_BL, starts_BL, axis=1)
    return (before_BL == first_BL) & (jnp.asarray(batch.segment_ids) > 0)


class Prefixed(WrappedObjective):
    """Passes the prefix mask to a model with `model.attention.mask=prefix`."""

    def wrap(self, apply, params, frozen, batch, rng) -> tuple[Apply, Params]:
        return partial(apply, prefix_BL=prefix_of(batch)), params
