"""Keys and values of the tokens so far: one slot of a fixed length for each row, one pair of arrays for each layer.

Layers are kept apart, so that a step writes one position in place and copies nothing. bf16 is kept as its bits.

Shape letters: B rows, S positions, K kv heads, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.bf16_bits import to_bits
from models.config import ModelConfig
from models.logical_axes import ShardingConstraint, no_constraint

BLOCK = 128  # positions that attention reads at once: a cache is a whole number of blocks long
CACHE_AXES = ("batch", "kv_heads", None, "head_dim")


class LayerKVCache(NamedTuple):
    """Position p of a row holds the token at position p, u16 where the model computes in bf16."""

    keys: jax.Array  # [B, K, S, H]
    values: jax.Array  # [B, K, S, width of values]


Cache = tuple[LayerKVCache, ...]


def init_cache(config: ModelConfig, rows: int, length: int, constrain: ShardingConstraint = no_constraint) -> Cache:
    """`length` is rounded up to whole blocks."""
    a, dtype = config.attention, jnp.dtype(config.dtype.name)
    shape = (rows, a.num_kv_heads, -(-length // BLOCK) * BLOCK)
    zeros = lambda width: constrain(to_bits(jnp.zeros((*shape, width), dtype)), CACHE_AXES)
    layer = lambda: LayerKVCache(zeros(a.head_dim), zeros(a.v_head_dim or a.head_dim))
    return tuple(layer() for _ in range(config.num_layers))


def write_cache(cache: LayerKVCache, keys_BLKH, values_BLKH, positions_BL, first_row) -> LayerKVCache:
    """The cache with new tokens at their positions, from row `first_row` on. What lies beyond its end is dropped."""
    rows = first_row + jnp.arange(positions_BL.shape[0])[:, None]
    put = lambda old, new: old.at[rows, :, positions_BL].set(to_bits(new), mode="drop")
    return LayerKVCache(put(cache.keys, keys_BLKH), put(cache.values, values_BLKH))
