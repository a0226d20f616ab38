"""What the layers of one forward pass share, and what differs between them: angles of positions, masks, windows.

Shape letters: B batch, L length, R rotated pairs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.attention.ops import UNLIMITED
from models.config import AttentionMask, LayerKind, ModelConfig, Position
from models.layers import inverse_frequencies
from models.logical_axes import ShardingConstraint


class Context(NamedTuple):
    """What all layers of one forward pass share."""

    angles_full: jax.Array | None  # [B, L, R]
    angles_local: jax.Array | None  # those of sliding layers, where they differ
    positions: jax.Array  # [B, L]
    segments: jax.Array  # [B, L]
    shown: Any  # [B, L] bool: tokens that earlier ones of their document see, too; in a cache the first so many
    first_row: jax.Array | int  # of the cache, where there is one: the row that belongs to the first of the batch
    constrain: ShardingConstraint
    shows_attention: bool = False  # whether layers give the weights of their attention


class LayerFlags(NamedTuple):
    """What differs between layers besides weights: arrays, so that one scan serves every pattern."""

    window: Any  # [layers] i32
    sliding: Any  # [layers] bool
    rotated: Any  # [layers] bool


FURTHER_LAYER = LayerFlags(
    np.int32(UNLIMITED), np.bool_(False), np.bool_(True)
)  # of a module of multi-token prediction


def layer_flags(config: ModelConfig) -> LayerFlags:
    pattern = config.attention.layer_types
    sliding = np.array([pattern[i % len(pattern)] is LayerKind.sliding for i in range(config.num_layers)])
    window = np.where(sliding, config.attention.sliding_window, UNLIMITED).astype(np.int32)
    turns = config.rope.layer_pattern
    rotated = np.array([turns[i % len(turns)] for i in range(config.num_layers)])
    return LayerFlags(window, sliding, rotated)


def bidirectional_tokens(
    config: ModelConfig, segment_ids_BL: jax.Array, prefix_BL: jax.Array | None
) -> jax.Array | None:
    """[B, L] bool: the tokens that earlier ones see; None: there are none."""
    mask = config.attention.mask
    if mask is AttentionMask.prefix and prefix_BL is None:
        raise ValueError("model.attention.mask=prefix: what is run here knows no prompts; use a causal model for it")
    return {
        AttentionMask.causal: None,
        AttentionMask.prefix: prefix_BL,
        AttentionMask.bidirectional: segment_ids_BL > 0,
    }[mask]


def make_context(
    config: ModelConfig,
    positions_BL: jax.Array,
    segment_ids_BL: jax.Array,
    shown_BL: Any,
    first_row: jax.Array | int,
    length: int,
    constrain: ShardingConstraint,
    *,
    shows_attention: bool = False,
) -> Context:
    """`length`: of the rows, or of the cache."""
    full = local = None
    if config.position is Position.rope:
        rope, latent = config.rope, config.attention.mla
        H = latent.qk_rope_head_dim if latent.kv_lora_rank else config.attention.head_dim
        freqs = inverse_frequencies(rope, H, theta=rope.theta, scaled=True, length=length)
        position = positions_BL[:, :, None].astype(jnp.float32)
        full = position * jnp.asarray(freqs, jnp.float32)[None, None]
        if rope.local_theta is not None:
            freqs = inverse_frequencies(rope, H, theta=rope.local_theta, scaled=False, length=length)
            local = position * jnp.asarray(freqs, jnp.float32)[None, None]
    return Context(full, local, positions_BL, segment_ids_BL, shown_BL, first_row, constrain, shows_attention)
