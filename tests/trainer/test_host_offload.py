"""What waits in the memory of the host: the same numbers, and it lies there."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from models.config import ActivationOffload, Remat
from models.transformer import abstract_params, init_params, make_apply
from tests.trainer import toy
from tests.trainer.on_meshes import DENSE, batch
from trainer.host_offload import HOST
from trainer.mesh import MeshConfig, ShardingRules, batch_sharding, make_mesh, param_shardings, place_batch
from trainer.objectives.next_token import NextTokenConfig
from trainer.optimizers.optimizer import AdamWConfig, OptimizerConfig, ScheduleFreeConfig, eval_params
from trainer.schedule import ConstantConfig
from trainer.state import TrainState, abstract_state, init_sharded_state
from trainer.step import make_train_step

OBJECTIVE = NextTokenConfig().build(None)
SCHEDULE = ConstantConfig(warmup_steps=0).build(1e-2, 100)


def train(config: OptimizerConfig, *, offload: bool) -> tuple[TrainState, object]:
    """The state after two steps, and what evaluation reads of it."""
    mesh, rules = make_mesh(MeshConfig(2, fsdp=4)), ShardingRules()
    optimizer = config.build(SCHEDULE, toy.AXES)
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    lying = {"param_shardings": param_shardings(toy.AXES, shapes, mesh, rules), "offload": offload}
    state = init_sharded_state(toy.init_params, optimizer, jax.random.key(1), **lying)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(toy.init_params, optimizer, **lying))
    step = make_train_step(OBJECTIVE, toy.without_noise, optimizer, num_microbatches=2)
    step = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
    for _ in range(2):
        state, _ = step(state, {}, place_batch(toy.batch(16), batch_sharding(mesh, rules), 16))
    return state, jax.jit(eval_params)(state)


@pytest.mark.parametrize("config", [AdamWConfig(), AdamWConfig(ema_decay=0.9), ScheduleFreeConfig()])
def test_the_optimizers_state_waits_on_the_host_and_changes_nothing(config):
    (kept, read), (away, read_away) = train(config, offload=False), train(config, offload=True)
    for leaf in jax.tree.leaves(away.opt_state):
        assert leaf.sharding.memory_kind == (HOST if leaf.ndim else "device")
    for tree, other in ((kept.params, away.params), (kept.opt_state, away.opt_state), (read, read_away)):
        # Not bit for bit: a program with other buffers rounds elsewhere.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, other)
    assert all(leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves((away.params, read_away)))


@pytest.mark.parametrize(
    ("remat", "offload"),
    [(Remat.full, ["border"]), (Remat.save_qkv, ["border", "qkv", "attention"]), (Remat.save_attn_out, ["attention"])],
)
def test_kept_activations_wait_on_the_host_and_change_no_bit(remat, offload):
    config = replace(DENSE, remat=remat)

    def gradients(config):
        apply = make_apply(config)
        total = lambda params: OBJECTIVE.loss(apply, params, {}, batch(), None)[0].total
        traced = jax.jit(jax.grad(total)).trace(abstract_params(config))
        return traced.lower().compile()(init_params(config, jax.random.key(0))), str(traced.jaxpr)

    kept, _ = gradients(config)
    away, program = gradients(replace(config, offload=[ActivationOffload[name] for name in offload]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), kept, away)
    layers, rows = config.num_layers, "8,32"
    width = {"border": "16", "qkv": "4,8", "attention": "4,8"}
    for name in offload:
        assert f"f32<host>[{layers},{rows},{width[name]}]" in program


@pytest.mark.parametrize(
    ("remat", "offload", "valid"),
    [
        ("none", "border", "nothing"),
        ("dots", "qkv", "nothing"),
        ("full", "qkv", "border;"),
        ("attention", "qkv", "border, a"),
    ],
)
def test_what_is_not_kept_cannot_lie_elsewhere(remat, offload, valid):
    with pytest.raises(ValueError, match=f"model.remat={remat} keeps no {offload} .* valid: {valid}"):
        replace(DENSE, remat=Remat[remat], offload=[ActivationOffload[offload]]).validate()
