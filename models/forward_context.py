"""Inputs of the layers of a forward pass: shared ones (rotary angles, masks) and flags per layer (windows, RoPE).

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
    """Inputs shared by all layers of a forward pass."""

    angles_full: jax.Array | None  # [B, L, R]
    angles_local: jax.Array | None  # angles of sliding layers, if different
    positions: jax.Array  # [B, L]
    segments: jax.Array  # [B, L]
    shown: Any  # [B, L] bool: tokens visible to earlier tokens of their document; with a cache: number of such tokens
    first_row: jax.Array | int  # cache row of the first row of the batch, if there is a cache
    constrain: ShardingConstraint
    shows_attention: bool = False  # layers return their attention weights


class LayerFlags(NamedTuple):
    """Differences between layers other than weights, as arrays so that one scan runs every pattern."""

    window: Any  # [layers] i32
    sliding: Any  # [layers] bool
    rotated: Any  # [layers] bool


# Flags of a multi-token prediction module
MTP_LAYER = LayerFlags(np.int32(UNLIMITED), np.bool_(False), np.bool_(True))


def layer_flags(config: ModelConfig) -> LayerFlags:
    """Returns the flags of all layers, with a leading dim of layers."""
    pattern = config.attention.layer_types
    sliding = np.array([pattern[i % len(pattern)] is LayerKind.sliding for i in range(config.num_layers)])
    window = np.where(sliding, config.attention.sliding_window, UNLIMITED).astype(np.int32)
    turns = config.rope.layer_pattern
    rotated = np.array([turns[i % len(turns)] for i in range(config.num_layers)])
    return LayerFlags(window, sliding, rotated)


def bidirectional_tokens(
    config: ModelConfig, segment_ids_BL: jax.Array, prefix_BL: jax.Array | None
) -> jax.Array | None:
    """Returns a mask [B, L] bool of tokens visible to earlier tokens, or None for a causal model.

    Raises: ValueError for a prefix model without `prefix_BL`.
    """
    mask = config.attention.mask
    if mask is AttentionMask.prefix and prefix_BL is None:
        raise ValueError("model.attention.mask=prefix: this task has no prompts; use a model with mask=causal")
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
    """Builds the context of a forward pass. `length`: tokens of a row, or capacity of the cache."""
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
