"""What a forward pass is asked to show of its layers, for losses that read more than its end.

Only layers that were asked for are kept: a buffer goes along with the scan over layers, which a layer writes to
where it has a place in it.

Shape letters: P layers that were asked for, B batch, L length, S key length, D model, N query heads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class CaptureSpec(NamedTuple):
    """Which layers are shown, counted from 0, each as often as it is named, and what of them."""

    layers: tuple[int, ...]
    hidden: bool = True
    attention: bool = False


class Captures(NamedTuple):
    """In the order of `CaptureSpec.layers`; None what was not asked for."""

    hidden_PBLD: Any = None  # a layer's output, its residual sum included
    attention_PBNLS: Any = None  # f32: the weights of each query's keys, 0 where it sees none


def init_captures(asked: CaptureSpec | None, x_BLD: jax.Array, num_heads: int) -> Captures | None:
    """Buffers of zeros, to be written to."""
    if asked is None:
        return None
    B, L, _ = x_BLD.shape
    P = len(asked.layers)
    hidden = jnp.zeros((P, *x_BLD.shape), x_BLD.dtype) if asked.hidden else None
    return Captures(hidden, jnp.zeros((P, B, num_heads, L, L), jnp.float32) if asked.attention else None)


def record(
    asked: CaptureSpec | None,
    inside: Captures | None,
    index: jax.Array,
    x_BLD: jax.Array,
    weights_BNLS: jax.Array | None,
) -> Captures | None:
    """The buffers with layer `index` written wherever it was asked for."""
    if asked is None or inside is None:
        return None
    here_P = jnp.array(asked.layers) == index

    def write(buffer: jax.Array | None, value: jax.Array | None) -> jax.Array | None:
        if buffer is None or value is None:
            return buffer
        return jnp.where(here_P.reshape(-1, *[1] * value.ndim), value[None].astype(buffer.dtype), buffer)

    return Captures(write(inside.hidden_PBLD, x_BLD), write(inside.attention_PBNLS, weights_BNLS))
