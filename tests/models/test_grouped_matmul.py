"""Grouped matmul in all implementations, compared with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.grouped_matmul import block_size_for, grouped, scan_blocks

S, D, F = 70, 12, 10
SIZES = {
    "uneven": [20, 0, 30, 14],
    "all in one": [0, 70, 0, 0],
    "empty": [0, 0, 0, 0],
    "multiples of a block": [8, 16, 8, 24],
}
BLOCKS = {"at once": None, "in blocks": 8, "in one block": 72}


def slow(x, kernel, sizes):
    """Reference by definition, with zeros past the last group."""
    y, at = np.zeros((len(x), kernel.shape[2])), 0
    for size, matrix in zip(sizes, kernel, strict=True):
        y[at : at + size] = np.asarray(x[at : at + size], np.float64) @ np.asarray(matrix, np.float64)
        at += size
    return y


@pytest.fixture(scope="module")
def given():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (S, D), (4, D, F), (S, F)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_are_multiplied_by_the_matrix_of_their_group_and_so_are_gradients(given, sizes, block):
    x, kernel, dy = given
    real = jnp.arange(S)[:, None] < sum(sizes)  # rows past the last group are unspecified

    def product(x, kernel):
        return jnp.where(real, grouped(x, kernel, jnp.array(sizes), jnp.dtype("float32"), block), 0)

    y, back = jax.vjp(product, x, kernel)
    np.testing.assert_allclose(y, slow(x, kernel, sizes), atol=1e-5)
    dx, dkernel = back(dy)
    ends = np.cumsum(sizes)
    np.testing.assert_allclose(jnp.where(real, dx, 0), slow(dy, np.swapaxes(kernel, 1, 2), sizes), atol=1e-5)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        want = np.asarray(x[start:end], np.float64).T @ np.asarray(dy[start:end], np.float64)
        np.testing.assert_allclose(dkernel[e], want, atol=1e-5)


def test_many_groups_share_steps_for_uneven_sizes(given):
    """With 24 groups, a step computes 3 blocks, also if they belong to one group."""
    sizes = [0] * 24
    sizes[3], sizes[4], sizes[20] = 41, 1, 24
    x, dy = given[0], given[2]
    kernel = jax.random.normal(jax.random.key(1), (24, D, F))
    y, back = jax.vjp(lambda x, k: grouped(x, k, jnp.array(sizes), jnp.dtype("float32"), 8), x, kernel)
    np.testing.assert_allclose(y[: sum(sizes)], slow(x, kernel, sizes)[: sum(sizes)], atol=1e-5)
    _, dkernel = back(dy)
    want = np.asarray(x[:41], np.float64).T @ np.asarray(dy[:41], np.float64)
    np.testing.assert_allclose(dkernel[3], want, atol=1e-5)
    assert not np.asarray(dkernel)[[e for e in range(24) if not sizes[e]]].any()


@pytest.mark.parametrize("sizes", [[8] * 24, [0] * 10 + [192] + [0] * 13, list(range(16)) + [9] * 8], ids=str)
def test_every_row_is_computed_once_in_the_minimum_number_of_steps(sizes):
    count = lambda blocks, carry: (carry[0].at[blocks.rows].add(1, mode="drop"), carry[1] + 1)
    seen, steps = scan_blocks(count, (jnp.zeros(192, int), 0), 192, jnp.array(sizes), 8)
    assert np.array_equal(seen, np.arange(192) < sum(sizes))
    assert steps == -(-sum(-(-size // 8) for size in sizes) // 3)


def test_vmapped_programs_have_separate_group_sizes(given):
    x, kernel, _ = given
    sizes = jnp.array([SIZES["uneven"], SIZES["all in one"]])
    both = jax.vmap(lambda sizes: grouped(x, kernel, sizes, jnp.dtype("float32"), 8))(sizes)
    for y, one in zip(both, sizes, strict=True):
        np.testing.assert_allclose(y[: one.sum()], slow(x, kernel, one)[: one.sum()], atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_gradients_of_f32_weights_are_not_rounded_in_bf16(given, block):
    x, kernel, sizes = given[0].astype(jnp.bfloat16), given[1], jnp.array(SIZES["uneven"])
    gradient = jax.grad(lambda k: grouped(x, k, sizes, jnp.dtype("float32"), block)[: sizes.sum()].sum())(kernel)
    assert gradient.dtype == jnp.float32
    assert (gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32)).any()


def test_a_block_is_half_of_an_average_group_and_tpus_need_none():
    assert block_size_for(128, "gpu") == 64
    assert block_size_for(0.5, "cpu") == 8
    assert block_size_for(128, "tpu") is None
