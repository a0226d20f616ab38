"""Products of rows in groups, each group with a matrix of its own: what experts do with their tokens.

`jax.lax.ragged_dot` is that product, and TPUs have it. XLA's backends for CPUs and GPUs multiply every row with every
group's matrix instead, and keep one result: as many times the work as there are groups. There the groups are taken
abreast, a block of rows of each in every turn, until the largest has none left.

Shape letters: S rows, D and F their width before and after, E groups, b rows of a block.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

BLOCK = 8  # rows: blocks are multiples of it


def rows_of_block(rows: float, platform: str) -> int | None:
    """Of a group of so many rows on average; None: the groups need no turns.

    Half of the average: two turns where all groups are equal, and little is computed in vain where they are not.
    """
    return None if platform == "tpu" else BLOCK * max(1, round(rows / 2 / BLOCK))


def grouped(
    x_SD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype, block: int | None
) -> jax.Array:
    """[S, F] in `dtype`: rows in groups of `sizes`, one after the other, each times its own matrix, in x's dtype with
    f32 accumulation. `block`: see `rows_of_block`.

    As in `models.layers.contract`, the gradient of f32 weights is never rounded. Rows past the last group are
    unspecified.
    """
    return _grouped(x_SD, kernel_EDF, sizes_E, dtype, block)  # type: ignore[return-value]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x, kernel, sizes, dtype, block):
    return _product(x, kernel.astype(x.dtype), sizes, dtype, block)


def _grouped_forward(x, kernel, sizes, dtype, block):
    return _grouped(x, kernel, sizes, dtype, block), (x, kernel, sizes)


def _grouped_backward(dtype, block, saved, dy):
    x, kernel, sizes = saved
    dy = jax.lax.optimization_barrier(dy.astype(x.dtype))
    dx = _product(dy, kernel.astype(x.dtype).swapaxes(1, 2), sizes, x.dtype, block)
    return dx, _products_of_columns(x, dy, sizes, block).astype(kernel.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _product(x_SD, kernel_EDF, sizes_E, dtype, block: int | None) -> jax.Array:
    f32 = jnp.float32
    if block is None:
        return jax.lax.ragged_dot(x_SD, kernel_EDF, sizes_E, preferred_element_type=f32).astype(dtype)

    def turn(rows_Eb, y_SF):
        y_EbF = jnp.einsum("EbD,EDF->EbF", _at(x_SD, rows_Eb), kernel_EDF, preferred_element_type=f32)
        return y_SF.at[rows_Eb].set(y_EbF.astype(dtype), mode="drop", unique_indices=True)

    return _in_turns(turn, jnp.zeros((x_SD.shape[0], kernel_EDF.shape[2]), dtype), sizes_E, block)


def _products_of_columns(x_SD, dy_SF, sizes_E, block: int | None) -> jax.Array:
    """[E, D, F] f32: of each group the product of its rows' columns, which is the gradient of its matrix."""
    f32 = jnp.float32
    if block is None:
        by_group = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return jax.lax.ragged_dot_general(x_SD, dy_SF, sizes_E, by_group, preferred_element_type=f32)

    def turn(rows_Eb, sum_EDF):
        x_EbD, dy_EbF = _at(x_SD, rows_Eb), _at(dy_SF, rows_Eb)
        return sum_EDF + jnp.einsum("EbD,EbF->EDF", x_EbD, dy_EbF, preferred_element_type=f32)

    return _in_turns(turn, jnp.zeros((len(sizes_E), x_SD.shape[1], dy_SF.shape[1]), f32), sizes_E, block)


def _at(x_SD: jax.Array, rows_Eb: jax.Array) -> jax.Array:
    return x_SD.at[rows_Eb].get(mode="fill", fill_value=0)


def _in_turns(
    turn: Callable[[jax.Array, jax.Array], jax.Array], carry: jax.Array, sizes_E: jax.Array, block: int
) -> jax.Array:
    """`carry = turn(rows [E, b], carry)` for each block of all groups; where a group has no row left, past the last."""
    E, past = len(sizes_E), jnp.iinfo(jnp.int32).max // 2
    starts_E1 = (jnp.cumsum(sizes_E) - sizes_E)[:, None]
    # Each another one, as the scatter is promised.
    nowhere_Eb = past + jnp.arange(E * block, dtype=jnp.int32).reshape(E, block)

    def body(i, carry):
        at_1b = i * block + jnp.arange(block, dtype=jnp.int32)[None]
        return turn(jnp.where(at_1b < sizes_E[:, None], starts_E1 + at_1b, nowhere_Eb), carry)

    return jax.lax.fori_loop(0, (_largest(sizes_E) + block - 1) // block, body, carry)


@jax.custom_batching.custom_vmap
def _largest(sizes_E: jax.Array) -> jax.Array:
    return sizes_E.max()


@_largest.def_vmap
def _(axis_size: int, batched: list[bool], sizes_XE: jax.Array) -> tuple[jax.Array, bool]:
    return sizes_XE.max(), False  # one end for all: else each turn would choose between carries
