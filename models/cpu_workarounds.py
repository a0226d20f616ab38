"""Work-arounds for XLA's CPU backend: each changes how something is computed there, and no number anywhere.

All have been measured on CPUs (docs/performance.md). Devices with products of their own in bf16 are not slowed down.
"""

import jax
import jax.numpy as jnp

# XLA must compute its argument once, as it is. One CPU keeps to it as trainer/xla_options.py tells XLA.
barrier = jax.lax.optimization_barrier


def to_bits(x: jax.Array) -> jax.Array:
    """u16 for bf16; every other dtype as it is.

    For arrays of which single rows are written or looked up: XLA would convert the whole array to f32, and back.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array) -> jax.Array:
    """The inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def keeps_rows_first() -> bool:
    """Whether decoding stores matrices as [OUT, IN].

    A few rows times a matrix take half the time with the matrix first; on a mesh its cut dims would have to turn, too.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def matrix_first_product(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """[OUT, R] f32 of `matrix` [OUT, IN] and `rows` [R, IN].

    XLA has no product of a bf16 matrix and a vector (a tenth of the speed), so a single row gets a second one. Without
    the barrier it folds the transposition of the result into the product, and half the speed is lost again.
    """
    single = len(rows) == 1 and rows.dtype == jnp.bfloat16
    if single:
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    y = jnp.einsum("oi,ri->or", matrix, rows, preferred_element_type=jnp.float32)
    return barrier(y)[:, :1] if single else barrier(y)


def left_transposed_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum(spec, a, b)` f32, where the dims that are summed over come first in `a`; `a` is transposed before.

    XLA has no bf16 product that reads its left side by columns, and converts both to f32; nor is it fast in f32.
    Without barriers it folds the transposition into the product again, or what `a` is made of into it.
    """
    a_dims, b_dims, y_dims = spec.replace("->", ",").split(",")
    summed = "".join(d for d in a_dims if d in b_dims)
    own = "".join(d for d in a_dims if d not in b_dims)
    plain = lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    if set(summed) & set(y_dims) or not own:
        return plain(a, b)

    def transposed(a: jax.Array, b: jax.Array) -> jax.Array:
        a = barrier(jnp.einsum(f"{a_dims}->{own}{summed}", barrier(a)))
        return jnp.einsum(f"{own}{summed},{b_dims}->{y_dims}", a, b, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(a, b, cpu=transposed, default=plain)


def sum_of_rows(x: jax.Array, num_dims: int) -> jax.Array:
    """The sum f32 over the first `num_dims` dims of `x`, as a product with ones.

    XLA sums bf16 over a batch in windows, which takes as long as an optimizer.
    """
    ones, rows = jnp.ones(x.shape[:num_dims], x.dtype), list(range(num_dims))
    return jnp.einsum(ones, rows, x, list(range(x.ndim)), preferred_element_type=jnp.float32)


@jax.custom_vjp
def transposed_weight(kernel: jax.Array) -> jax.Array:
    """`kernel.T`, whose gradient is computed as it is and then transposed.

    Where XLA folds the transposition into the product before it, CPUs have no such product in bf16; and where it leaves
    it to those that read the gradient, each of them transposes again.
    """
    return kernel.T


transposed_weight.defvjp(lambda kernel: (kernel.T, None), lambda _, dy: (barrier(barrier(dy).T),))
