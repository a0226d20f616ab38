"""8-bit matmuls with layer weights in training: int8 (TPUs, GPUs since Ampere) or float8 (GPUs since Hopper).

Quantizes both operands of the forward and input-gradient matmuls dynamically, with one absmax scale per row and per
column. The weight-gradient matmul sums over tokens, a few of which have outliers; it stays in full precision, as do
embeddings, norms, attention scores, experts and the head. Weights, optimizer states and checkpoints are unaffected.

Row and column scales with full-precision weight gradients: Wortsman et al. 2023 [2304.13013] (SwitchBack); the float8
formats of the forward and backward pass: Micikevicius et al. 2022 [2209.05433], section 3.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.config import MatmulPrecision
from models.matmul import weights_gradient

F32 = jnp.float32


class Format(NamedTuple):
    """An 8-bit format: dtype, largest value, and accumulation dtype of matmuls."""

    dtype: jnp.dtype
    largest: float
    sums: jnp.dtype


INT8 = Format(jnp.dtype("int8"), 127.0, jnp.dtype("int32"))
E4M3 = Format(jnp.dtype("float8_e4m3fn"), 448.0, jnp.dtype("float32"))
E5M2 = Format(jnp.dtype("float8_e5m2"), 57344.0, jnp.dtype("float32"))
FORMATS = {
    MatmulPrecision.int8: (INT8, INT8),
    MatmulPrecision.fp8: (E4M3, E5M2),
}  # (inputs and weights, gradients)


def quantize_8bit(x: jax.Array, summed: tuple[int, ...], form: Format) -> tuple[jax.Array, jax.Array]:
    """Returns x / scale in 8 bits, and the f32 scales with size 1 in the dims `summed`."""
    x = x.astype(F32)
    top = jnp.max(jnp.abs(x), axis=summed, keepdims=True)
    scale = jnp.where(top > 0, top / form.largest, 1.0)
    x = jnp.clip(x / scale, -form.largest, form.largest)
    return (jnp.round(x) if form is INT8 else x).astype(form.dtype), scale


def product(spec: str, a: jax.Array, b: jax.Array, form_a: Format, form_b: Format) -> jax.Array:
    """`einsum(spec, a, b)` f32 of quantized operands; dims occur in two of three terms, in order."""
    a_dims, b_dims, y_dims = spec.replace("->", ",").split(",")
    summed = set(a_dims) & set(b_dims)
    y_scale = None
    sides = []
    for x, dims, form in ((a, a_dims, form_a), (b, b_dims, form_b)):
        values, scale = quantize_8bit(x, tuple(i for i, d in enumerate(dims) if d in summed), form)
        sizes = dict(zip(dims, scale.shape, strict=True))
        scale = scale.reshape([sizes[d] if d in dims else 1 for d in y_dims])
        y_scale = scale if y_scale is None else y_scale * scale
        sides.append(values)
    y = jnp.einsum(spec, *sides, preferred_element_type=form_a.sums)
    return y.astype(F32) * y_scale


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def quantized_einsum(kind: MatmulPrecision, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`models.matmul.einsum_f32(spec, a, b, a.dtype)` with quantized operands, also in the input gradient."""
    form, _ = FORMATS[kind]
    return product(spec, a, b.astype(a.dtype), form, form).astype(a.dtype)


def _forward(kind, spec, a, b):
    return quantized_einsum(kind, spec, a, b), (a, b)


def _backward(kind, spec, saved, dy):
    a, b = saved
    a_dims, b_dims, y_dims = spec.replace("->", ",").split(",")
    form, form_of_gradients = FORMATS[kind]
    dy = dy.astype(a.dtype)
    da = product(f"{y_dims},{b_dims}->{a_dims}", dy, b.astype(a.dtype), form_of_gradients, form)
    db = weights_gradient(f"{a_dims},{y_dims}->{b_dims}", a, dy)
    return da.astype(a.dtype), db.astype(b.dtype)


quantized_einsum.defvjp(_forward, _backward)
