"""Prompts that see all of themselves, under any loss over tokens: prefix language models.

Shape letters: B batch, L length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from data.batch import TokenBatch
from models.transformer import Apply
from trainer.objective import Mean, Objective, Params


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


@dataclass(frozen=True)
class Prefixed:
    """An `Objective` over a model whose prompts see all of themselves, from one that does not know of it."""

    objective: Objective

    def loss(
        self, apply: Apply, params: Params, frozen: Mapping[str, Any], batch: TokenBatch, rng: jax.Array | None
    ) -> tuple[Mean, dict[str, Mean]]:
        return self.objective.loss(partial(apply, prefix_BL=prefix_of(batch)), params, frozen, batch, rng)

    def batch_spec(self, batch_size: int, seq_len: int) -> TokenBatch:
        return self.objective.batch_spec(batch_size, seq_len)
