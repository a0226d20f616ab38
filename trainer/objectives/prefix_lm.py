"""Prompts that see all of themselves, under any loss over tokens: prefix language models.

Shape letters: B batch, L length.
"""

from functools import partial

import jax
import jax.numpy as jnp

from data.batch import TokenBatch
from models.transformer import Apply
from trainer.objective import Params, WrappedObjective


def prefix_of(batch: TokenBatch) -> jax.Array:
    """[B, L] bool: the tokens of each document before the first that is learnt.

    Of a document of which nothing is learnt these are all. The token whose target is the first to be learnt is the
    last of them.
    """
    learnt_BL = jnp.asarray(batch.loss_mask) > 0
    before_BL = jnp.cumsum(learnt_BL, axis=1) - learnt_BL
    begins_BL = jnp.arange(learnt_BL.shape[1])[None] - batch.positions
    first_BL = jnp.take_along_axis(before_BL, begins_BL, axis=1)
    return (before_BL == first_BL) & (jnp.asarray(batch.segment_ids) > 0)


class Prefixed(WrappedObjective):
    """An `Objective` over a model with `model.attention.mask=prefix`, from one that passes no prefix."""

    def wrap(self, apply, params, frozen, batch, rng) -> tuple[Apply, Params]:
        return partial(apply, prefix_BL=prefix_of(batch)), params
