"""Train and eval steps: accumulation, metrics, sharding, donation."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.batch import TokenBatch
from tests.trainer import toy
from trainer.mesh import MeshConfig, make_mesh
from trainer.objectives.next_token import NextTokenConfig
from trainer.optimizers.adamw import AdamWConfig
from trainer.schedule import ConstantConfig, CosineConfig
from trainer.sharding import ShardingRules, batch_sharding, param_shardings, place_batch
from trainer.state import TrainState, init_sharded_state, make_state
from trainer.step import make_eval_step, make_train_step, split_rows
from trainer.xla_options import compiler_options

OBJECTIVE = NextTokenConfig(z_loss=1e-3, label_smoothing=0.1).build(np.arange(toy.V, dtype=np.int32))
SCHEDULE = ConstantConfig(warmup_steps=0).build(1e-2, 100)
OPTIMIZER = AdamWConfig(weight_decay=0.1, ema_decay=0.9, eps=1e-3).build(SCHEDULE, toy.AXES)


def new_state() -> TrainState:
    return make_state(toy.init_params, OPTIMIZER, jax.random.key(1))


def step_with(num_microbatches: int = 1, apply=toy.without_noise, optimizer=OPTIMIZER):
    step = make_train_step(OBJECTIVE, apply, optimizer, num_microbatches=num_microbatches, schedule=SCHEDULE)
    return jax.jit(step)


def assert_close(a, b, tolerance: float = 1e-6) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_microbatching_does_not_change_the_update(num_microbatches: int) -> None:
    batch = toy.batch(16)
    once, once_metrics = step_with(1)(new_state(), {}, batch)
    split, split_metrics = step_with(num_microbatches)(new_state(), {}, batch)
    assert_close(once.params, split.params)
    assert_close(once.opt_state, split.opt_state)
    assert_close(once_metrics, split_metrics)


def test_update_is_that_of_the_mean_over_all_target_tokens() -> None:
    batch, state = toy.batch(8), new_state()
    sgd = optax.sgd(1.0)

    def mean_loss(params):
        loss, _ = OBJECTIVE.loss(toy.without_noise, params, {}, batch, None)
        return loss.total / loss.weight

    expected = jax.tree.map(lambda p, g: p - g, state.params, jax.jit(jax.grad(mean_loss))(state.params))
    found, _ = step_with(4, optimizer=sgd)(replace(state, opt_state=sgd.init(state.params)), {}, batch)
    assert_close(expected, found.params)


def test_batch_without_targets_changes_only_the_step() -> None:
    state, _ = step_with()(new_state(), {}, toy.batch(4))
    empty = toy.batch(4)._replace(loss_mask=np.zeros((4, toy.L), np.float32))
    after, metrics = step_with(2)(state, {}, empty)
    assert int(after.step) == 2
    assert all(np.isfinite(value) for value in metrics.values())
    assert float(metrics["tokens"]) == 0
    for old, new in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((after.params, after.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)


def test_metrics() -> None:
    batch, state = toy.batch(8), new_state()
    _, metrics = step_with()(state, {}, batch)
    assert float(metrics["tokens"]) == batch.loss_mask.sum()
    np.testing.assert_allclose(metrics["param_norm"], optax.global_norm(state.params), rtol=1e-6)
    np.testing.assert_allclose(metrics["bytes"], np.average(batch.targets, weights=batch.loss_mask), rtol=1e-6)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)
    assert float(metrics["loss"]) != float(metrics["nll"])
    assert float(metrics["grad_norm"]) > 0


def test_gradient_norm_is_reported_before_clipping() -> None:
    clipped = AdamWConfig(max_grad_norm=1e-6).build(SCHEDULE, toy.AXES)
    state = make_state(toy.init_params, clipped, jax.random.key(1))
    _, metrics = step_with(optimizer=clipped)(state, {}, toy.batch(8))
    assert float(metrics["grad_norm"]) > 1e-2


def test_learning_rate_follows_the_step_of_the_state() -> None:
    schedule = CosineConfig(warmup_steps=0, min_lr_ratio=0.0).build(1.0, 10)
    optimizer = AdamWConfig().build(schedule, toy.AXES)
    step = jax.jit(make_train_step(OBJECTIVE, toy.apply, optimizer, schedule=schedule))
    state = make_state(toy.init_params, optimizer, jax.random.key(0))
    late = replace(state, step=jnp.asarray(10, jnp.int32))
    after, metrics = step(late, {}, toy.batch(4))
    assert float(metrics["learning_rate"]) == 0
    assert_close(after.params, state.params, 0)


def test_randomness_depends_on_key_and_step() -> None:
    state = new_state()
    step = step_with(apply=toy.apply)
    same, again = step(state, {}, toy.batch(4))[1], step(state, {}, toy.batch(4))[1]
    other = step(replace(state, step=state.step + 1), {}, toy.batch(4))[1]
    assert float(same["loss"]) == float(again["loss"]) != float(other["loss"])


@pytest.mark.parametrize("config", [MeshConfig(8, 1, 1), MeshConfig(2, 4, 1), MeshConfig(2, 2, 2)])
def test_sharded_step_matches_one_device(config: MeshConfig) -> None:
    mesh, rules = make_mesh(config), ShardingRules()
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    shardings = param_shardings(toy.AXES, shapes, mesh, rules)
    sharded = init_sharded_state(toy.init_params, OPTIMIZER, jax.random.key(1), param_shardings=shardings)
    batches = [toy.batch(16, seed) for seed in range(3)]
    alone = new_state()
    step = step_with(2)
    for batch in batches:
        alone, alone_metrics = step(alone, {}, batch)
        sharded, metrics = step(sharded, {}, place_batch(batch, batch_sharding(mesh, rules), 16))
        assert_close(alone_metrics, metrics)
    assert_close(alone.params, sharded.params)


@pytest.mark.parametrize("size", [1, 2])
def test_state_is_updated_in_place(size: int) -> None:
    """XLA copies no array of the donated state, so only one copy is in memory."""
    mesh, rules = make_mesh(MeshConfig(size, size, size), jax.devices()[: size**3]), ShardingRules()
    shardings = param_shardings(toy.AXES, jax.eval_shape(toy.init_params, jax.random.key(0)), mesh, rules)
    state = init_sharded_state(toy.init_params, OPTIMIZER, jax.random.key(1), param_shardings=shardings)
    step = make_train_step(OBJECTIVE, toy.apply, OPTIMIZER, schedule=SCHEDULE)
    step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options("cpu", mesh.size))
    batch = place_batch(toy.batch(16), batch_sharding(mesh, rules), 16)
    program = step.lower(state, {}, batch).compile().as_text()
    assert "input_output_alias" in program
    assert re.findall(r"= \w+\[\d.* copy\(%(state_\w+)", program) == []


def test_each_microbatch_is_spread_over_all_devices() -> None:
    mesh = make_mesh(MeshConfig(8, 1, 1))
    sharding = batch_sharding(mesh, ShardingRules())
    x = jax.device_put(jnp.arange(32.0).reshape(16, 2), sharding)
    compiled = jax.jit(lambda x: split_rows(x, 2)).lower(x).compile()
    assert "collective" not in compiled.as_text() and "all-" not in compiled.as_text()
    parts = compiled(x)
    assert parts.sharding.shard_shape(parts.shape) == (2, 1, 2)
    np.testing.assert_array_equal(parts[1], x[1::2])


def test_indivisible_accumulation_steps_are_refused() -> None:
    message = r"task\.gradient_accumulation_steps=3: .*nearest valid data\.batch_size: 6, 9"
    with pytest.raises(ValueError, match=message):
        step_with(3)(new_state(), {}, toy.batch(8))


def test_bf16_compute_keeps_f32_masters() -> None:
    def apply(params, tokens_BL, **rest):
        return toy.apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), tokens_BL, **rest)

    state, metrics = step_with(2, apply=apply)(new_state(), {}, toy.batch(8))
    leaves = jax.tree.leaves((state.params, state.opt_state))
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in leaves)
    assert all(value.dtype == jnp.float32 for value in metrics.values())


def test_evaluation_sums_over_batches() -> None:
    evaluate = jax.jit(make_eval_step(OBJECTIVE, toy.apply))
    params = new_state().params
    full = evaluate(params, {}, toy.batch(8))
    halves = [evaluate(params, {}, TokenBatch(*(x[half] for x in toy.batch(8)))) for half in (slice(4), slice(4, 8))]
    assert set(full) == {"loss", "nll", "accuracy", "bytes"}
    summed = jax.tree.map(lambda *x: sum(x), *halves)
    assert_close(full, summed, 1e-5)
