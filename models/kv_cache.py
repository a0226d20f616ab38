"""The cache of attention: keys and values of the tokens so far, at fixed positions of a fixed number of rows.

Layers are separate arrays, so that a step writes one position in place and copies nothing. bf16 is stored as its bits.

Shape letters: B rows, L new tokens, S positions, K kv heads, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.cpu_workarounds import to_bits
from models.logical_axes import ShardingConstraint

BLOCK = 128  # positions that attention reads at once: a cache is a multiple of it long
CACHE_AXES = ("batch", "kv_heads", None, "head_dim")


class LayerKVCache(NamedTuple):
    """Position p of a row holds the token at position p, u16 where the model computes in bf16."""

    keys: jax.Array  # [B, K, S, H]
    values: jax.Array  # [B, K, S, width of values]


def init_layer_cache(config: ModelConfig, rows: int, capacity: int, constrain: ShardingConstraint) -> LayerKVCache:
    """Zeros for `capacity` positions of each row."""
    a, dtype = config.attention, jnp.dtype(config.dtype.name)
    shape = (rows, a.num_kv_heads, capacity)
    zeros = lambda width: constrain(to_bits(jnp.zeros((*shape, width), dtype)), CACHE_AXES)
    return LayerKVCache(zeros(a.head_dim), zeros(a.v_head_dim or a.head_dim))


def write_cache(cache: LayerKVCache, keys_BLKH, values_BLKH, positions_BL, first_row) -> LayerKVCache:
    """The cache with new tokens at their positions, from row `first_row` on. Positions beyond its end are dropped."""
    rows = first_row + jnp.arange(positions_BL.shape[0])[:, None]
    put = lambda old, new: old.at[rows, :, positions_BL].set(to_bits(new), mode="drop")
    return LayerKVCache(put(cache.keys, keys_BLKH), put(cache.values, values_BLKH))
