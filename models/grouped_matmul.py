"""Grouped matmul: rows sorted by group, each group multiplied by a separate matrix, as in a mixture of experts.

On TPUs this is `jax.lax.ragged_dot`. The CPU and GPU backends of XLA implement that by multiplying every row with the
matrix of every group and discarding all but one result, which multiplies the work by the number of groups. On these
platforms each group is split into blocks of rows, and blocks are assigned to steps regardless of their group: the cost
is that of the rows plus the padding of each group's last block, for any distribution of group sizes.

Shape letters: S rows, D and F width before and after, E groups, N blocks, T steps, W blocks per step, b rows per block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.cpu_workarounds import barrier, from_bits, to_bits

BLOCK = 8  # block sizes are multiples of this number of rows
SHARE = 8  # a step runs (number of groups / SHARE) blocks: enough for a GPU, little memory


class Blocks(NamedTuple):
    """Blocks of one step, or of all steps."""

    group: jax.Array  # [..., W]
    rows: jax.Array  # [..., W, b]: row indices; padding has distinct indices beyond the last row


def block_size_for(rows: float, platform: str) -> int | None:
    """Returns the block size for groups of `rows` rows on average; None: use `jax.lax.ragged_dot`.

    Half of the average limits both padding and repeated reads of the matrices.
    """
    return None if platform == "tpu" else BLOCK * max(1, round(rows / 2 / BLOCK))


def grouped(
    x_SD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype, block: int | None
) -> jax.Array:
    """Multiplies consecutive groups of `sizes_E` rows by their matrices: [S, F] in `dtype`.

    Computes in x's dtype with f32 accumulation. `block`: see `block_size_for`. As in `models.matmul.einsum_f32`, the
    gradient of f32 weights is not rounded. Rows past the last group are unspecified.
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
    f32 = jnp.float32
    kernel_EDF = kernel_EDF.astype(x_SD.dtype)  # cast first, so that XLA gathers the smaller dtype from devices
    if block is None:
        return jax.lax.ragged_dot(x_SD, kernel_EDF, sizes_E, preferred_element_type=f32).astype(dtype)

    def step(blocks: Blocks, y_SF):
        kernel_WDF = from_bits(bits_EDF[blocks.group])
        y_WbF = jnp.einsum("WbD,WDF->WbF", _at(x_SD, blocks.rows), kernel_WDF, preferred_element_type=f32)
        return y_SF.at[blocks.rows].set(to_bits(y_WbF.astype(dtype)), mode="drop", unique_indices=True)

    y_SF, bits_EDF = to_bits(jnp.zeros((x_SD.shape[0], kernel_EDF.shape[2]), dtype)), to_bits(kernel_EDF)
    return from_bits(scan_blocks(step, y_SF, len(x_SD), sizes_E, block))


def _products_of_columns(x_SD, dy_SF, sizes_E, block: int | None) -> jax.Array:
    """Returns the gradients of the matrices, [E, D, F] f32: x^T dy of the rows of each group."""
    f32 = jnp.float32
    if block is None:
        by_group = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return jax.lax.ragged_dot_general(x_SD, dy_SF, sizes_E, by_group, preferred_element_type=f32)

    def step(blocks: Blocks, sum_EDF):
        x_WbD, dy_WbF = _at(x_SD, blocks.rows), _at(dy_SF, blocks.rows)
        part_WDF = jnp.einsum("WbD,WbF->WDF", x_WbD, dy_WbF, preferred_element_type=f32)
        # Sequential: a group may have several blocks in a step, and the order of summation must be fixed.
        add = lambda w, sum_EDF: sum_EDF.at[blocks.group[w]].add(part_WDF[w])
        return jax.lax.fori_loop(0, len(part_WDF), add, sum_EDF)

    sum_EDF = jnp.zeros((len(sizes_E), x_SD.shape[1], dy_SF.shape[1]), f32)
    return scan_blocks(step, sum_EDF, len(x_SD), sizes_E, block)


def _at(x_SD: jax.Array, rows_Wb: jax.Array) -> jax.Array:
    return x_SD.at[rows_Wb].get(mode="fill", fill_value=0)


def scan_blocks(step: Callable[[Blocks, Any], Any], carry: Any, rows: int, sizes_E: jax.Array, block: int) -> Any:
    """Runs `carry = step(blocks, carry)` for all blocks of all groups, which have at most `rows` rows in total."""
    E = len(sizes_E)
    W = max(1, E // SHARE)
    T = -(-(rows // block + E) // W)
    blocks, number = _schedule(sizes_E, block, T, W), _max_over_batch(_blocks_of(sizes_E, block).sum())
    return jax.lax.fori_loop(0, (number + W - 1) // W, lambda t, c: step(Blocks(*(a[t] for a in blocks)), c), carry)


def _blocks_of(sizes_E: jax.Array, block: int) -> jax.Array:
    return (sizes_E + block - 1) // block


def _schedule(sizes_E: jax.Array, block: int, T: int, W: int) -> Blocks:
    """Assigns all blocks, in group order, to T steps of W blocks. Unused blocks are empty."""
    i32, numbers_E = jnp.int32, _blocks_of(sizes_E, block)
    ends_E, starts_E = jnp.cumsum(numbers_E), jnp.cumsum(sizes_E) - sizes_E
    i_N = jnp.arange(T * W, dtype=i32)
    group_N = jnp.minimum((ends_E[None] <= i_N[:, None]).sum(1, dtype=i32), len(sizes_E) - 1)
    within_N = i_N - (ends_E - numbers_E)[group_N]  # index of a block in its group
    at_Nb = (within_N * block)[:, None] + jnp.arange(block, dtype=i32)[None]
    # Distinct indices, as promised to the scatter.
    padding_Nb = jnp.iinfo(i32).max // 2 + i_N[:, None] * block + jnp.arange(block, dtype=i32)[None]
    rows_Nb = jnp.where(at_Nb < sizes_E[group_N][:, None], starts_E[group_N][:, None] + at_Nb, padding_Nb)
    return Blocks(group_N.reshape(T, W), rows_Nb.reshape(T, W, block))


@jax.custom_batching.custom_vmap
def _max_over_batch(number: jax.Array) -> jax.Array:
    return number


@_max_over_batch.def_vmap
def _(axis_size: int, batched: list[bool], number_X: jax.Array) -> tuple[jax.Array, bool]:
    return number_X.max(), False  # one loop length for all: otherwise each step would select between carries
