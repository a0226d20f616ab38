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
    values: jax.Array  # [layers, B, S, K, width of values]


def init_cache(config: ModelConfig, batch_size: int, num_slots: int) -> KVCache:
    a = config.attention
    shape = (config.num_layers, batch_size, num_slots, a.num_kv_heads)
    zeros = lambda width: jnp.zeros((*shape, width), jnp.dtype(config.dtype.name))
    return KVCache(zeros(a.head_dim), zeros(a.value_dim or a.head_dim))
