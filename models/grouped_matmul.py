"""Products of rows in groups, each group with a matrix of its own: what experts do with their tokens.

`jax.lax.ragged_dot` is that product, and TPUs have it. XLA's backends for CPUs and GPUs multiply every row with every
group's matrix instead, and keep one result: as many times the work as there are groups. There each group is cut into
blocks of rows, and the blocks are dealt out to turns whatever their group: however unlike the groups are, no more is
computed than their rows and what fills up each group's last block.

Shape letters: S rows, D and F their width before and after, E groups, N blocks, T turns, W blocks of a turn, b rows of
a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.cpu_workarounds import barrier, from_bits, to_bits

BLOCK = 8  # rows: blocks are multiples of it
SHARE = 8  # of as many blocks as there are groups, this part in a turn: enough for a GPU, little memory


class Blocks(NamedTuple):
    """The blocks of a turn, or those of all."""

    group: jax.Array  # [..., W]
    rows: jax.Array  # [..., W, b]: which rows; past the last, each another one, where a block is not full


def block_size_for(rows: float, platform: str) -> int | None:
    """Of a group of so many rows on average; None: the groups need no turns.

    Half of the average: little is computed in vain to fill up blocks, and matrices are not read too often.
    """
    return None if platform == "tpu" else BLOCK * max(1, round(rows / 2 / BLOCK))


def grouped(
    x_SD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype, block: int | None
) -> jax.Array:
    """[S, F] in `dtype`: rows in groups of `sizes`, one after the other, each times its own matrix, in x's dtype with
    f32 accumulation. `block`: see `block_size_for`.

    As in `models.layers.einsum_f32`, the gradient of f32 weights is never rounded. Rows past the last group are
    unspecified.
    """
    return _grouped(x_SD, kernel_EDF, sizes_E, dtype, block)  # type: ignore[return-value]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(x, kernel, sizes, dtype, block):
    return _product(x, kernel, sizes, dtype, block)


def _grouped_forward(x, kernel, sizes, dtype, block):
    return _grouped(x, kernel, sizes, dtype, block), (x, kernel, sizes)


def _grouped_backward(dtype, block, saved, dy):
    x, kernel, sizes = saved
    dy = barrier(dy.astype(x.dtype))
    dx = _product(dy, kernel.swapaxes(1, 2), sizes, x.dtype, block)
    return dx, _products_of_columns(x, dy, sizes, block).astype(kernel.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _product(x_SD, kernel_EDF, sizes_E, dtype, block: int | None) -> jax.Array:
    f32, kernel_EDF = jnp.float32, kernel_EDF.astype(x_SD.dtype)  # at once: XLA then gathers it so from devices
    if block is None:
        return jax.lax.ragged_dot(x_SD, kernel_EDF, sizes_E, preferred_element_type=f32).astype(dtype)

    def turn(blocks: Blocks, y_SF):
        kernel_WDF = from_bits(bits_EDF[blocks.group])
        y_WbF = jnp.einsum("WbD,WDF->WbF", _at(x_SD, blocks.rows), kernel_WDF, preferred_element_type=f32)
        return y_SF.at[blocks.rows].set(to_bits(y_WbF.astype(dtype)), mode="drop", unique_indices=True)

    y_SF, bits_EDF = to_bits(jnp.zeros((x_SD.shape[0], kernel_EDF.shape[2]), dtype)), to_bits(kernel_EDF)
    return from_bits(scan_blocks(turn, y_SF, len(x_SD), sizes_E, block))


def _products_of_columns(x_SD, dy_SF, sizes_E, block: int | None) -> jax.Array:
    """[E, D, F] f32: of each group the product of its rows' columns, which is the gradient of its matrix."""
    f32 = jnp.float32
    if block is None:
        by_group = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return jax.lax.ragged_dot_general(x_SD, dy_SF, sizes_E, by_group, preferred_element_type=f32)

    def turn(blocks: Blocks, sum_EDF):
        x_WbD, dy_WbF = _at(x_SD, blocks.rows), _at(dy_SF, blocks.rows)
        part_WDF = jnp.einsum("WbD,WbF->WDF", x_WbD, dy_WbF, preferred_element_type=f32)
        # One after the other: a group may have many blocks in a turn, and the order of a sum must not change.
        add = lambda w, sum_EDF: sum_EDF.at[blocks.group[w]].add(part_WDF[w])
        return jax.lax.fori_loop(0, len(part_WDF), add, sum_EDF)

    sum_EDF = jnp.zeros((len(sizes_E), x_SD.shape[1], dy_SF.shape[1]), f32)
    return scan_blocks(turn, sum_EDF, len(x_SD), sizes_E, block)


def _at(x_SD: jax.Array, rows_Wb: jax.Array) -> jax.Array:
    return x_SD.at[rows_Wb].get(mode="fill", fill_value=0)


def scan_blocks(turn: Callable[[Blocks, Any], Any], carry: Any, rows: int, sizes_E: jax.Array, block: int) -> Any:
    """`carry = turn(blocks, carry)` until all blocks of all groups of altogether at most `rows` had their turn."""
    E = len(sizes_E)
    W = max(1, E // SHARE)
    T = -(-(rows // block + E) // W)
    blocks, number = _schedule(sizes_E, block, T, W), _most(_blocks_of(sizes_E, block).sum())
    return jax.lax.fori_loop(0, (number + W - 1) // W, lambda t, c: turn(Blocks(*(a[t] for a in blocks)), c), carry)


def _blocks_of(sizes_E: jax.Array, block: int) -> jax.Array:
    return (sizes_E + block - 1) // block


def _schedule(sizes_E: jax.Array, block: int, T: int, W: int) -> Blocks:
    """All blocks in the order of their groups, W for each of T turns. Those after the last are empty."""
    i32, numbers_E = jnp.int32, _blocks_of(sizes_E, block)
    ends_E, starts_E = jnp.cumsum(numbers_E), jnp.cumsum(sizes_E) - sizes_E
    i_N = jnp.arange(T * W, dtype=i32)
    group_N = jnp.minimum((ends_E[None] <= i_N[:, None]).sum(1, dtype=i32), len(sizes_E) - 1)
    within_N = i_N - (ends_E - numbers_E)[group_N]  # of its group's blocks
    at_Nb = (within_N * block)[:, None] + jnp.arange(block, dtype=i32)[None]
    # Each another one, as the scatter is promised.
    nowhere_Nb = jnp.iinfo(i32).max // 2 + i_N[:, None] * block + jnp.arange(block, dtype=i32)[None]
    rows_Nb = jnp.where(at_Nb < sizes_E[group_N][:, None], starts_E[group_N][:, None] + at_Nb, nowhere_Nb)
    return Blocks(group_N.reshape(T, W), rows_Nb.reshape(T, W, block))


@jax.custom_batching.custom_vmap
def _most(number: jax.Array) -> jax.Array:
    return number


@_most.def_vmap
def _(axis_size: int, batched: list[bool], number_X: jax.Array) -> tuple[jax.Array, bool]:
    return number_X.max(), False  # one end for all: else each turn would choose between carries
