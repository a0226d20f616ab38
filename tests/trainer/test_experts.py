"""MoE training: the same step on every mesh, exact gradient accumulation, bias load balancing."""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import numpy as np
import pytest

from data.batch import TokenBatch
from models.config import (
    AttentionConfig,
    Dispatch,
    Dtype,
    LoadBalancing,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RouterScore,
)
from models.transformer import abstract_params, init_params, make_apply, param_axes
from trainer.mesh import MeshConfig, make_mesh
from trainer.objectives.next_token import NextTokenConfig
from trainer.optimizers.adamw import AdamWConfig
from trainer.optimizers.param_groups import ParamGroup, param_groups
from trainer.optimizers.sgd import SgdConfig
from trainer.schedule import ConstantConfig
from trainer.sharding import ShardingRules, batch_sharding, make_constrain, param_shardings, place_batch
from trainer.state import make_state
from trainer.step import make_train_step

ROWS, L, V = 8, 12, 24
CONFIG = ModelConfig(
    num_layers=2, embed_dim=16, vocab_size=V, dtype=Dtype.float32, init_std=0.3, tied_embeddings=False,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    mlp=MLPConfig(intermediate_dim=16),
    moe=MoEConfig(8, 1, 2, 8, shared_intermediate_dim=8, bias=True, router_z_loss_weight=1e-2, aux_loss_weight=0.1),
)  # fmt: skip
KINDS = {
    "dropless": {},
    "capacity": {"dispatch": Dispatch.capacity, "capacity_factor": 1.0},
    "bias": {"router_score": RouterScore.sigmoid, "load_balancing": LoadBalancing.bias},
}
MESHES = {
    "data": MeshConfig(8),
    "expert": MeshConfig(1, expert=8),
    "data x expert": MeshConfig(2, expert=4),
    "fsdp x expert": MeshConfig(1, fsdp=2, expert=4),
    "expert x tensor": MeshConfig(1, expert=4, tensor=2),
    "fsdp x expert x tensor": MeshConfig(1, fsdp=2, expert=2, tensor=2),
}
OBJECTIVE = NextTokenConfig().build(None)
SCHEDULE = ConstantConfig(warmup_steps=0).build(1e-2, 100)


def model(kind):
    return replace(CONFIG, moe=replace(CONFIG.moe, **KINDS[kind]))


def batch(seed):
    """Rows with two documents and padding, with random masks; the last row has no targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (ROWS, L + 1)).astype(np.int32)
    lengths = rng.integers(6, L + 1, (ROWS, 1))
    at = np.arange(L)[None]
    segments = np.where(at < 4, 1, np.where(at < lengths, 2, 0)).astype(np.int32)
    positions = np.where(at < 4, at, at - 4).astype(np.int32) * np.ones((ROWS, 1), np.int32)
    mask = ((segments > 0) & (rng.random((ROWS, L)) < 0.7)).astype(np.float32)
    mask[-1] = 0
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, segments, positions)


def train(config, mesh_config, optimizer_config, steps=3, num_microbatches=1):
    """Trains for some steps; returns the parameters and the metrics of each step."""
    devices = jax.devices()[:1] if mesh_config is None else None
    mesh, rules = make_mesh(mesh_config or MeshConfig(), devices), ShardingRules()
    axes = param_axes(config)
    optimizer = optimizer_config.build(SCHEDULE, axes)
    shardings = param_shardings(axes, abstract_params(config), mesh, rules)
    # Initialized unsharded, then sharded: a sharded initialization takes as long to compile as the step.
    params = jax.device_put(jax.jit(partial(init_params, config))(jax.random.key(0)), shardings)
    state = make_state(lambda key: params, optimizer, jax.random.key(0))
    apply = make_apply(config, make_constrain(mesh, rules))
    step = jax.jit(make_train_step(OBJECTIVE, apply, optimizer, num_microbatches=num_microbatches))
    history = []
    for seed in range(steps):
        state, metrics = step(state, {}, place_batch(batch(seed), batch_sharding(mesh, rules), ROWS))
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state.params), history


@lru_cache
def alone(kind):
    return train(model(kind), None, SgdConfig(momentum=0.0, max_grad_norm=None))


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *(("dropless", mesh) for mesh in MESHES),
        *(("capacity", mesh) for mesh in ("expert", "data x expert", "fsdp x expert x tensor")),
        ("bias", "fsdp x expert"),
    ],
)
def test_losses_and_gradients_match_one_device(kind, mesh):
    params, history = train(model(kind), MESHES[mesh], SgdConfig(momentum=0.0, max_grad_norm=None))
    want_params, want = alone(kind)
    for ours, theirs in zip(history, want, strict=True):
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7, err_msg=name)
    start = jax.device_get(init_params(model(kind), jax.random.key(0)))
    for a, b, from_ in zip(*map(jax.tree.leaves, (params, want_params, start)), strict=True):
        moved = np.abs(b - from_).max()  # by the gradients of three steps
        np.testing.assert_allclose(a, b, atol=1e-4 * moved + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_is_exact(kind):
    want, history = alone(kind)
    params, split = train(model(kind), None, SgdConfig(momentum=0.0, max_grad_norm=None), num_microbatches=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), want, params)
    for ours, theirs in zip(split, history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


def test_router_metrics_are_reported_and_the_loss_includes_router_losses():
    _, history = alone("dropless")
    for metrics in history:
        added = 0.1 * metrics["router/balance_loss"] + 1e-2 * metrics["router/z_loss"]
        assert metrics["loss"] == pytest.approx(metrics["nll"] + added, rel=1e-5)
        assert metrics["router/max_load"] >= 1
    assert "router/dropped" in alone("capacity")[1][0]


def test_router_bias_moves_only_by_its_update_rate():
    optimizer = AdamWConfig(weight_decay=0.5, max_grad_norm=1e-3, router_bias_update_rate=0.01, learning_rate=1e-2)
    config = model("bias")
    params, _ = train(config, None, optimizer, steps=2)
    bias = params["layers"]["mlp"]["balance_bias"]
    assert set(np.round(np.abs(bias).reshape(-1), 6)) <= {np.float32(0.0), np.float32(0.01), np.float32(0.02)}
    assert (bias > 0).any() and (bias < 0).any()
    assert param_groups(param_axes(config))["layers"]["mlp"]["balance_bias"] is ParamGroup.balance


def test_router_bias_evens_the_load():
    frozen = train(
        model("bias"), None, SgdConfig(learning_rate=1e-9, max_grad_norm=None, router_bias_update_rate=0.0), steps=40
    )[1]
    balanced = train(
        model("bias"), None, SgdConfig(learning_rate=1e-9, max_grad_norm=None, router_bias_update_rate=0.02), steps=40
    )[1]
    load = lambda history: np.mean([metrics["router/max_load"] for metrics in history[-10:]])
    assert load(balanced) < load(frozen)


def test_indivisible_experts_are_refused():
    mesh = make_mesh(MeshConfig(1, expert=8))
    config = replace(CONFIG, moe=replace(CONFIG.moe, num_experts=6))
    with pytest.raises(ValueError, match=r"mesh\.expert=8: cannot shard dim 1 \(experts\) .* of size 6"):
        param_shardings(param_axes(config), abstract_params(config), mesh, ShardingRules())
