"""KV cache of attention: keys and values of earlier tokens, with a fixed number of rows and positions.

Layers are separate arrays, so that a step writes one position in place without copies. bf16 is stored as u16 bits.

Shape letters: B rows, L new tokens, S positions, K kv heads, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.cpu_workarounds import to_bits
from models.logical_axes import ShardingConstraint

BLOCK = 128  # positions read per block; the capacity of a cache is a multiple of it
CACHE_AXES = ("batch", "kv_heads", None, "head_dim")


class LayerKVCache(NamedTuple):
    """Keys and values of one layer, indexed by token position; u16 bits if the model computes in bf16."""

    keys: jax.Array  # [B, K, S, H]
    values: jax.Array  # [B, K, S, v_head_dim]


def init_layer_cache(config: ModelConfig, rows: int, capacity: int, constrain: ShardingConstraint) -> LayerKVCache:
    """Allocates a zero cache of `capacity` positions per row."""
    a, dtype = config.attention, jnp.dtype(config.dtype.name)
    shape = (rows, a.num_kv_heads, capacity)
    zeros = lambda width: constrain(to_bits(jnp.zeros((*shape, width), dtype)), CACHE_AXES)
    return LayerKVCache(zeros(a.head_dim), zeros(a.v_head_dim or a.head_dim))


def write_cache(cache: LayerKVCache, keys_BLKH, values_BLKH, positions_BL, first_row) -> LayerKVCache:
    """Writes new tokens at their positions, starting at row `first_row`; drops positions beyond the capacity."""
    rows = first_row + jnp.arange(positions_BL.shape[0])[:, None]
    put = lambda old, new: old.at[rows, :, positions_BL].set(to_bits(new), mode="drop")
    return LayerKVCache(put(cache.keys, keys_BLKH), put(cache.values, values_BLKH))
