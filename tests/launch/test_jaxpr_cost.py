"""Cost estimates from a jaxpr, against sums by hand and against XLA."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from launch.planning.jaxpr_cost import Rules, jaxpr_cost
from models.grouped_matmul import grouped

F32 = 4


def cost(function, *shapes, donated=(), **rules):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    is_donated = [i in donated for i in range(len(shapes))]
    return jaxpr_cost(jax.make_jaxpr(function)(*arguments), is_donated, Rules(**rules))


def test_matmuls_are_counted_for_every_loop_iteration():
    def iterate(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    found = cost(iterate, (8, 16), (5, 16, 16))
    assert found.flops == 5 * 2 * 8 * 16 * 16


def test_grouped_matmuls_are_counted_as_if_evenly_routed():
    """Their loop is a `while` loop without a static trip count."""

    def experts(x, kernel):
        sizes = jnp.full(32, 64)
        y, back = jax.vjp(lambda x, kernel: grouped(x, kernel, sizes, jnp.dtype("float32"), 32), x, kernel)
        return back(y)

    for share in (1, 0.5):
        assert cost(experts, (2048, 64), (32, 64, 48), rows_of_groups=share).flops == share * 3 * 2 * 2048 * 64 * 48


def test_elementwise_steps_are_fused():
    found = cost(lambda x, w: jnp.tanh(x * 2 + 1) @ w, (64, 32), (32, 16))
    assert found.peak == F32 * (64 * 32 + 64 * 16)  # operand and result of the matmul


def test_the_longest_chain_of_buffers_is_the_peak():
    def chain(x, a, b):
        h = x @ a  # 64 x 128
        return (h @ b) @ a  # 64 x 32, then 64 x 128

    assert cost(chain, (64, 32), (32, 128), (128, 32)).peak == F32 * (64 * 128 + 64 * 32)


def test_loop_holds_its_stacked_outputs():
    found = cost(partial(jax.lax.scan, lambda x, _: (x @ x, x @ x), length=7), (32, 32))
    assert found.peak >= F32 * 8 * 32 * 32
    assert sum(held.bytes for held in found.held if held.stacked) == F32 * 7 * 32 * 32


def test_donated_buffers_are_reused():
    step = lambda x, g: x - 0.1 * g
    assert cost(step, (128, 128), (128, 128), donated=(0,)).peak == 0
    assert cost(step, (128, 128), (128, 128)).peak == F32 * 128 * 128
    assert cost(step, (128, 128), (128, 128), donated=(0,), copies_donated=True).peak == F32 * 128 * 128


def test_calls_inside_a_program_are_part_of_it():
    inner = jax.jit(lambda x: jnp.exp(x) @ x)
    wrapped = jax.checkpoint(inner)
    sizes = ((32, 32),)
    assert cost(wrapped, *sizes).peak == cost(inner, *sizes).peak == cost(lambda x: jnp.exp(x) @ x, *sizes).peak


def test_time_is_that_of_the_slower_of_compute_and_memory():
    both = cost(lambda x: x @ x, (256, 256), seconds=lambda flops, moved: max(flops / 1e9, moved / 1e6))
    assert both.seconds == pytest.approx(2 * F32 * 256 * 256 / 1e6)
    assert both.moved == 2 * F32 * 256 * 256  # operand and result


@pytest.mark.parametrize("depth", [8, 16])
def test_saved_activations_match_xla(depth):
    def loss(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, params)[0] ** 2)

    shapes = (depth, 256, 256), (512, 256)
    found = cost(jax.grad(loss), *shapes)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    memory = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
    real = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert found.peak == pytest.approx(real, rel=0.2)
