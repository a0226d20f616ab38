"""Products of activations and weights: accumulated in f32, with gradients that are such products too."""

import itertools
import re
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from models.cpu_workarounds import barrier, left_transposed_product
from models.weight_views import Kernel


def einsum_f32(spec: str, a: jax.Array, b: jax.Array | Kernel, dtype: jnp.dtype) -> jax.Array:
    """`einsum(spec, a, b)` in a's dtype, accumulated in f32 and returned as `dtype`.

    Both gradients are such products too, each returned in the dtype of its own operand: that of f32 master
    weights is never rounded to bf16, and no product mixes dtypes. `spec` names every dim in two of the three.
    """
    if isinstance(b, Kernel):
        return b.product(spec, a, dtype)
    spec, a_dims, b_dims, y_dims = _with_joined_dims(spec, a.shape, b.shape)
    y = _contract(spec, a.reshape(a_dims), b.reshape(b_dims), dtype)
    return y.reshape(y_dims)  # type: ignore[return-value]


def _with_joined_dims(spec: str, a_shape: Sequence[int], b_shape: Sequence[int]):
    """`spec` with one dim for each run of b's dims that is one of a or of the result; the shapes of a and b for it, and
    that of the result without.

    Over two dims XLA sums in an order of its own, and turns both operands around for it.
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
    """Those of `einsum(spec, a, b)`: of a in its dtype, of b in f32."""
    a_dims, b_dims, y_dims = re.split(",|->", spec)
    # Both products below read dy: made once here, rather than anew, and transposed, inside each (half the time of
    # an MLP on CPUs).
    dy = barrier(dy.astype(a.dtype))
    da = jnp.einsum(f"{y_dims},{b_dims}->{a_dims}", dy, b.astype(a.dtype), preferred_element_type=jnp.float32)
    return da.astype(a.dtype), weights_gradient(f"{a_dims},{y_dims}->{b_dims}", a, dy)


def weights_gradient(spec: str, a: jax.Array, dy: jax.Array) -> jax.Array:
    """`einsum(spec, a, dy)` f32."""
    return left_transposed_product(spec, a, dy)


_contract.defvjp(_contract_forward, _contract_backward)
