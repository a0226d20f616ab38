"""Performance workarounds for the CPU backend of XLA; none of them changes results.

All were measured on CPUs (docs/performance.md). Devices with native bf16 matmuls are not slowed down.
"""

import jax
import jax.numpy as jnp

# Makes XLA compute the argument once, unfused. On a single CPU this needs the flags of trainer/xla_options.py.
barrier = jax.lax.optimization_barrier


def to_bits(x: jax.Array) -> jax.Array:
    """Returns the u16 bits of bf16 arrays; other dtypes are unchanged.

    For arrays with single rows written or gathered: XLA would convert the full array to f32 and back.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array) -> jax.Array:
    """Inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def use_transposed_weights() -> bool:
    """Returns whether decoding stores matrices as [OUT, IN].

    Multiplying a few rows takes half the time with the matrix first. On a mesh, the sharding would change as well.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def matrix_first_product(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiplies `matrix` [OUT, IN] by `rows` [R, IN]: [OUT, R] f32.

    XLA has no fast bf16 matrix-vector product (a tenth of the speed), so a single row is padded to two. Without the
    barrier XLA folds the transpose of the result into the matmul, which halves the speed.
    """
    single = len(rows) == 1 and rows.dtype == jnp.bfloat16
    if single:
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    y = jnp.einsum("oi,ri->or", matrix, rows, preferred_element_type=jnp.float32)
    return barrier(y)[:, :1] if single else barrier(y)


def left_transposed_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes `einsum(spec, a, b)` in f32; on CPUs `a`, whose contracted dims come first, is transposed.

    XLA has no bf16 matmul that reads its left operand by columns: it converts both to f32, which is slow as well.
    Without barriers it would fold the transpose, or the computation of `a`, into the matmul.
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
    """Sums `x` over its first `num_dims` dims in f32, as a matmul with ones.

    XLA reduces bf16 over a batch with window operations, which take as long as an optimizer step.
    """
    ones, rows = jnp.ones(x.shape[:num_dims], x.dtype), list(range(num_dims))
    return jnp.einsum(ones, rows, x, list(range(x.ndim)), preferred_element_type=jnp.float32)


@jax.custom_vjp
def transposed_weight(kernel: jax.Array) -> jax.Array:
    """Returns `kernel.T`, with a gradient that is computed first and then transposed.

    Otherwise XLA folds the transpose into the preceding matmul, for which CPUs have no bf16 routine, or leaves it to
    the readers of the gradient, each of which transposes again.
    """
    return kernel.T


transposed_weight.defvjp(lambda kernel: (kernel.T, None), lambda _, dy: (barrier(barrier(dy).T),))
