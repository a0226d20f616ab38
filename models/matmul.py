"""Products of activations and weights: accumulated in f32, with gradients that are such products too.

Weights may be kept in another form than as their array (`Kernel`).
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

barrier = jax.lax.optimization_barrier  # one CPU keeps to it as trainer/xla_options.py tells XLA


def einsum_f32(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`einsum(spec, a, b)` in a's dtype, accumulated in f32 and returned as `dtype`.

    Both gradients are such products too, each returned in the dtype of its own operand: that of f32 master
    weights is never rounded to bf16, and no product mixes dtypes. `spec` names every dim in two of the three.
    """
    if isinstance(b, WeightView):
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


class WeightView:
    """A weight that is kept in another form than as its array, and read as a parameter is."""

    def __getitem__(self, _: object) -> "WeightView":
        return self

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """What `einsum_f32` gives of `x` and this weight."""
        raise NotImplementedError

    def array(self) -> jax.Array:
        """The weight itself, for those that do more with it than multiply."""
        raise NotImplementedError


def as_array(weight: "jax.Array | WeightView") -> jax.Array:
    return weight.array() if isinstance(weight, WeightView) else weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransposedWeight(WeightView):
    """A kernel [in..., out...] as a matrix [OUT, IN], to be multiplied from the left; without a gradient."""

    matrix: jax.Array
    num_in: int = field(metadata={"static": True})  # dims of x that are summed over: its last ones
    out_shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, kernel: jax.Array, num_out: int) -> "TransposedWeight":
        shape = kernel.shape[-num_out:]
        return cls(kernel.reshape(-1, math.prod(shape)).T, kernel.ndim - num_out, shape)

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        rows = x.reshape(-1, self.matrix.shape[1])
        alone = len(rows) == 1 and x.dtype == jnp.bfloat16
        if alone:  # XLA's CPU backend has no product of a bf16 matrix and a vector: a tenth of the speed
            rows = jnp.pad(rows, ((0, 1), (0, 0)))
        y = jnp.einsum("oi,ri->or", self.matrix, rows, preferred_element_type=jnp.float32)
        # Else XLA folds the transposition into the product, as rows times matrix, and half the speed is lost again.
        y = barrier(y)[:, :1] if alone else barrier(y)
        return y.astype(dtype).T.reshape(*x.shape[: x.ndim - self.num_in], *self.out_shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TiedEmbedding(WeightView):
    """Embeddings [V, D] that are the head as well, which is then `TransposedWeight`; without a gradient."""

    table: jax.Array

    def array(self) -> jax.Array:
        return self.table

    @property
    def T(self) -> TransposedWeight:
        return TransposedWeight(self.table, 1, self.table.shape[:1])


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
    """`einsum(spec, a, dy)` f32, the gradient of weights: on CPUs with `a` turned around first.

    XLA's CPU backend has no bf16 product that reads its left side by columns, and converts both to f32; nor is it fast
    in f32. Without barriers it folds the transposition into the product again, or what `a` is made of into it.
    """
    a_dims, y_dims, out_dims = re.split(",|->", spec)
    summed = "".join(d for d in a_dims if d in y_dims)
    own = "".join(d for d in a_dims if d not in y_dims)
    plain = lambda a, dy: jnp.einsum(spec, a, dy, preferred_element_type=jnp.float32)
    if set(summed) & set(out_dims) or not own:
        return plain(a, dy)

    def turned(a: jax.Array, dy: jax.Array) -> jax.Array:
        a = barrier(jnp.einsum(f"{a_dims}->{own}{summed}", barrier(a)))
        return jnp.einsum(f"{own}{summed},{y_dims}->{out_dims}", a, dy, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(a, dy, cpu=turned, default=plain)


_contract.defvjp(_contract_forward, _contract_backward)


def transposed(kernel: jax.Array | TiedEmbedding) -> jax.Array | TransposedWeight:
    """`kernel.T`, whose gradient is made as it is and then transposed.

    Where XLA folds the transposition into the product before it, CPUs have no such product in bf16; and where it leaves
    it to those that read the gradient, each of them turns it around.
    """
    return kernel.T if isinstance(kernel, TiedEmbedding) else _transposed(kernel)


@jax.custom_vjp
def _transposed(kernel: jax.Array) -> jax.Array:
    return kernel.T


_transposed.defvjp(lambda kernel: (kernel.T, None), lambda _, dy: (barrier(barrier(dy).T),))
