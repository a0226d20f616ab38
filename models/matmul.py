"""Matmuls of activations and weights with f32 accumulation, forward and backward."""

import itertools
import re
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from models.cpu_workarounds import barrier, left_transposed_product
from models.weight_views import WeightView


def einsum_f32(spec: str, a: jax.Array, b: jax.Array | WeightView, dtype: jnp.dtype) -> jax.Array:
    """Computes `einsum(spec, a, b)` in a's dtype with f32 accumulation and returns it in `dtype`.

    Gradients are computed in the same way and returned in the dtype of their operand: gradients of f32 master weights
    are not rounded to bf16, and no matmul mixes dtypes. Each dim of `spec` occurs in two of the three terms.
    """
    if isinstance(b, WeightView):
        return b.product(spec, a, dtype)
    spec, a_dims, b_dims, y_dims = _with_joined_dims(spec, a.shape, b.shape)
    y = _contract(spec, a.reshape(a_dims), b.reshape(b_dims), dtype)
    return y.reshape(y_dims)  # type: ignore[return-value]


def _with_joined_dims(spec: str, a_shape: Sequence[int], b_shape: Sequence[int]):
    """Merges adjacent dims of b that are also adjacent in a or in the result.

    Returns the merged spec, the shapes of a and b for it, and the unmerged shape of the result. For a contraction over
    two dims XLA would choose another order of summation and transpose both operands.
    """
    a_dims, b_dims, y_dims = re.split(",|->", spec)
    sizes = dict(zip(a_dims + b_dims, (*a_shape, *b_shape), strict=True))
    y_shape = [sizes[d] for d in y_dims]
    for first, second in reversed(list(itertools.pairwise(b_dims))):
        others = [dims for dims in (a_dims, y_dims) if first in dims or second in dims]
        if len(others) == 1 and first + second in others[0]:
            sizes[first] *= sizes[second]
            a_dims, b_dims, y_dims = (dims.replace(first + second, first) for dims in (a_dims, b_dims, y_dims))
    shapes = ([sizes[d] for d in dims] for dims in (a_dims, b_dims))
    return f"{a_dims},{b_dims}->{y_dims}", *shapes, y_shape


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _contract(spec, a, b, dtype):
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32).astype(dtype)


def _contract_forward(spec, a, b, dtype):
    return _contract(spec, a, b, dtype), (a, b)


def _contract_backward(spec, dtype, operands, dy):
    a, b = operands
    da, db = gradients(spec, a, b, dy)
    return da, db.astype(b.dtype)


def gradients(spec: str, a: jax.Array, b: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `einsum(spec, a, b)`: of a in its dtype, of b in f32."""
    a_dims, b_dims, y_dims = re.split(",|->", spec)
    # Both matmuls below read dy. The barrier computes it once instead of recomputing and transposing it in each of them
    # (half the time of an MLP on CPUs).
    dy = barrier(dy.astype(a.dtype))
    da = jnp.einsum(f"{y_dims},{b_dims}->{a_dims}", dy, b.astype(a.dtype), preferred_element_type=jnp.float32)
    return da.astype(a.dtype), weights_gradient(f"{a_dims},{y_dims}->{b_dims}", a, dy)


def weights_gradient(spec: str, a: jax.Array, dy: jax.Array) -> jax.Array:
    """Computes the weight gradient `einsum(spec, a, dy)` in f32."""
    return left_transposed_product(spec, a, dy)


_contract.defvjp(_contract_forward, _contract_backward)
