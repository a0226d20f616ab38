"""Host offload: arrays are in host memory, with unchanged results."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from models.config import ActivationOffload, Remat
from models.transformer import abstract_params, init_params, make_apply
from tests.trainer import toy
from tests.trainer.on_meshes import DENSE, batch
from trainer.host_offload import HOST
from trainer.mesh import MeshConfig, make_mesh
from trainer.objectives.next_token import NextTokenConfig
from trainer.optimizers.adamw import AdamWConfig
from trainer.optimizers.eval_params import eval_params
from trainer.optimizers.optimizer import OptimizerConfig
from trainer.optimizers.schedule_free import ScheduleFreeConfig
from trainer.schedule import ConstantConfig
from trainer.sharding import ShardingRules, batch_sharding, param_shardings, place_batch
from trainer.state import TrainState, abstract_state, init_sharded_state
from trainer.step import make_train_step

OBJECTIVE = NextTokenConfig().build(None)
SCHEDULE = ConstantConfig(warmup_steps=0).build(1e-2, 100)


def train(config: OptimizerConfig, *, offload: bool) -> tuple[TrainState, object]:
    """Trains for two steps; returns the state and its evaluation parameters."""
    mesh, rules = make_mesh(MeshConfig(2, fsdp=4)), ShardingRules()
    optimizer = config.build(SCHEDULE, toy.AXES)
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    layout_options = {"param_shardings": param_shardings(toy.AXES, shapes, mesh, rules), "offload": offload}
    state = init_sharded_state(toy.init_params, optimizer, jax.random.key(1), **layout_options)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(toy.init_params, optimizer, **layout_options))
    step = make_train_step(OBJECTIVE, toy.without_noise, optimizer, num_microbatches=2)
    step = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
    for _ in range(2):
        state, _ = step(state, {}, place_batch(toy.batch(16), batch_sharding(mesh, rules), 16))
    return state, jax.jit(eval_params)(state)


@pytest.mark.parametrize("config", [AdamWConfig(), AdamWConfig(ema_decay=0.9), ScheduleFreeConfig()])
def test_offloaded_optimizer_state_is_on_the_host_with_unchanged_results(config):
    (on_device, averages), (offloaded, offloaded_averages) = train(config, offload=False), train(config, offload=True)
    for leaf in jax.tree.leaves(offloaded.opt_state):
        assert leaf.sharding.memory_kind == (HOST if leaf.ndim else "device")
    for tree, other in (
        (on_device.params, offloaded.params),
        (on_device.opt_state, offloaded.opt_state),
        (averages, offloaded_averages),
    ):
        # Not bit for bit: programs with different buffers round differently.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, other)
    assert all(
        leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves((offloaded.params, offloaded_averages))
    )


@pytest.mark.parametrize(
    ("remat", "offload"),
    [
        (Remat.full, ["layer_input"]),
        (Remat.save_qkv, ["layer_input", "qkv_proj", "attn_out"]),
        (Remat.save_attn_out, ["attn_out"]),
    ],
)
def test_offloaded_activations_are_on_the_host_with_bit_identical_gradients(remat, offload):
    config = replace(DENSE, remat=remat)

    def gradients(config):
        apply = make_apply(config)
        total = lambda params: OBJECTIVE.loss(apply, params, {}, batch(), None)[0].total
        traced = jax.jit(jax.grad(total)).trace(abstract_params(config))
        return traced.lower().compile()(init_params(config, jax.random.key(0))), str(traced.jaxpr)

    on_device, _ = gradients(config)
    offloaded, program = gradients(replace(config, activation_offload=[ActivationOffload[name] for name in offload]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), on_device, offloaded)
    layers, rows = config.num_layers, "8,32"
    width = {"layer_input": "16", "qkv_proj": "4,8", "attn_out": "4,8"}
    for name in offload:
        assert f"f32<host>[{layers},{rows},{width[name]}]" in program


@pytest.mark.parametrize(
    ("remat", "offload", "valid"),
    [
        ("none", "layer_input", "nothing"),
        ("save_dots", "qkv_proj", "nothing"),
        ("full", "qkv_proj", "layer_input;"),
        ("save_attn_out", "qkv_proj", "layer_input, a"),
    ],
)
def test_unsaved_activations_cannot_be_offloaded(remat, offload, valid):
    with pytest.raises(
        ValueError, match=rf"model\.activation_offload: {offload} .*model\.remat={remat}; valid: {valid}"
    ):
        replace(DENSE, remat=Remat[remat], activation_offload=[ActivationOffload[offload]]).validate()
