"""Keys and values of the tokens so far, stacked by layer.

Shape letters: B batch, S slots, K kv heads, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.config import ModelConfig


class KVCache(NamedTuple):
    """Slot p of a row holds the token at position p."""

    keys: jax.Array  # [layers, B, S, K, H]
    values: jax.Array  # [layers, B, S, K, H]


def init_cache(config: ModelConfig, batch_size: int, num_slots: int) -> KVCache:
    a = config.attention
    shape = (config.num_layers, batch_size, num_slots, a.num_kv_heads, a.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(config.dtype.name))
    return KVCache(zeros, zeros)
