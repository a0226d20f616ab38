"""Captures hidden states and attention weights of selected layers, for losses on intermediate activations.

Only selected layers are stored: the scan over layers carries a buffer, and each selected layer writes to its slot.

Shape letters: P captured layers, B batch, L length, S key length, D model, N query heads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class CaptureSpec(NamedTuple):
    """Layers to capture, counted from 0 and possibly repeated, and which of their activations."""

    layers: tuple[int, ...]
    hidden: bool = True
    attention: bool = False


class Captures(NamedTuple):
    """Captured activations in the order of `CaptureSpec.layers`; None if not requested."""

    hidden_PBLD: Any = None  # layer outputs, including the residual
    attention_PBNLS: Any = None  # f32 attention weights, 0 for queries that see no key


def init_captures(spec: CaptureSpec | None, x_BLD: jax.Array, num_heads: int) -> Captures | None:
    """Allocates zero buffers for the requested captures."""
    if spec is None:
        return None
    B, L, _ = x_BLD.shape
    P = len(spec.layers)
    hidden = jnp.zeros((P, *x_BLD.shape), x_BLD.dtype) if spec.hidden else None
    return Captures(hidden, jnp.zeros((P, B, num_heads, L, L), jnp.float32) if spec.attention else None)


def record(
    spec: CaptureSpec | None,
    captures: Captures | None,
    index: jax.Array,
    x_BLD: jax.Array,
    weights_BNLS: jax.Array | None,
) -> Captures | None:
    """Writes layer `index` to its slots of the buffers, if it was requested."""
    if spec is None or captures is None:
        return None
    is_slot_P = jnp.array(spec.layers) == index

    def write(buffer: jax.Array | None, value: jax.Array | None) -> jax.Array | None:
        if buffer is None or value is None:
            return buffer
        return jnp.where(is_slot_P.reshape(-1, *[1] * value.ndim), value[None].astype(buffer.dtype), buffer)

    return Captures(write(captures.hidden_PBLD, x_BLD), write(captures.attention_PBNLS, weights_BNLS))
