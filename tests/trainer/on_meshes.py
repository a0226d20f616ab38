"""Losses, metrics and gradients of one step of small models on any mesh."""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import numpy as np

from data.batch import TokenBatch
from models.config import (
    AttentionConfig,
    ContextParallel,
    Dispatch,
    Dtype,
    LayerKind,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    PipelineConfig,
    Position,
    Remat,
)
from models.transformer import abstract_params, init_params, make_apply, param_axes
from trainer.mesh import MeshConfig, make_mesh
from trainer.objective import REFERENCE
from trainer.objectives.multi_token_prediction import MultiTokenConfig
from trainer.objectives.next_token import NextTokenConfig
from trainer.objectives.preference import PreferenceConfig
from trainer.objectives.reward import RewardConfig
from trainer.sharding import ShardingRules, batch_sharding, make_constrain, param_shardings, place_batch, with_pipeline

ROWS, L, V = 8, 32, 24
WHOLE = PipelineConfig()
DENSE = ModelConfig(
    num_layers=2, embed_dim=16, vocab_size=V, dtype=Dtype.float32, init_std=0.3, remat=Remat.save_qkv,
    attention=AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=6, layer_types=[LayerKind.sliding, LayerKind.full],
        logit_softcap=5.0, sinks=True,
    ),
    mlp=MLPConfig(intermediate_dim=16),
)  # fmt: skip
EXPERTS = MoEConfig(8, 0, 2, 8, shared_intermediate_dim=8, bias=True, router_z_loss_weight=1e-2, aux_loss_weight=0.1)
MODELS = {
    "dense": DENSE,
    "learned positions": replace(DENSE, position=Position.learned, max_seq_len=L + 1, remat=Remat.none),
    "experts": replace(DENSE, moe=EXPERTS),
    "capacity": replace(DENSE, moe=replace(EXPERTS, dispatch=Dispatch.capacity, capacity_factor=1.0)),
    "latent": replace(
        DENSE,
        attention=AttentionConfig(4, 4, 8, v_head_dim=4, mla=MLAConfig(kv_lora_rank=8, qk_rope_head_dim=4)),
        mtp_num_layers=1,
    ),
}
OBJECTIVES = {
    "next token": NextTokenConfig(loss_chunk_size=8, z_loss=1e-3),
    "multi-token prediction": MultiTokenConfig(loss_chunk_size=8),
    "pairs": PreferenceConfig(loss_chunk_size=8),
    "reward": RewardConfig(),
}


def batch(sides: int | None = None) -> TokenBatch:
    """Rows with two documents, padding and random masks; the last row has no targets. Pairs: one document per row."""
    rng = np.random.default_rng(0)
    rows = ROWS * (sides or 1)
    tokens = rng.integers(0, V, (rows, L + 1)).astype(np.int32)
    lengths, at = rng.integers(14, L + 1, (rows, 1)), np.arange(L)[None]
    first_length = 0 if sides else 11
    segments = np.where(at < first_length, 1, np.where(at < lengths, 2 - (not first_length), 0)).astype(np.int32)
    positions = np.where(at < first_length, at, at - first_length).astype(np.int32) * np.ones((rows, 1), np.int32)
    mask = ((segments > 0) & (rng.random((rows, L)) < 0.7)).astype(np.float32)
    if not sides:
        mask[-1] = 0
    fields = tokens[:, :-1], tokens[:, 1:], mask, segments, positions
    return TokenBatch(*(x.reshape(ROWS, sides, L) if sides else x for x in fields))


def losses_and_gradients(
    model: str,
    objective: str,
    mesh_config: MeshConfig | None,
    context_parallel=ContextParallel.ring,
    block_size=None,
    balanced=False,
    residual=("context",),
    num_layers=2,
    pipeline=WHOLE,
):
    """Returns (metrics with `loss`, gradients)."""
    config = replace(MODELS[model], num_layers=num_layers, pipeline=pipeline)
    config = replace(
        config, attention=replace(config.attention, context_parallel=context_parallel, block_size=block_size)
    )
    if objective == "reward":
        config = replace(config, num_labels=1)
    mesh = make_mesh(mesh_config or MeshConfig(), None if mesh_config else jax.devices()[:1])
    rules = ShardingRules(residual=list(residual))
    config = with_pipeline(config, ROWS, mesh, rules)
    shardings = param_shardings(param_axes(config), abstract_params(config), mesh, rules)
    init = jax.jit(partial(init_params, config))
    place = lambda seed: jax.device_put(init(jax.random.key(seed)), shardings)
    params, frozen = place(0), {REFERENCE: place(1)}
    if config.num_labels:  # initialized to zeros, which would give the layers no gradient
        params = {**params, "score": params["score"] + 1.0}
    built, apply = OBJECTIVES[objective].build(None), make_apply(config, make_constrain(mesh, rules))

    def total(params, frozen, batch):
        loss, metrics = built.loss(apply, params, frozen, batch, None)
        return loss.total / loss.weight, metrics

    given = batch(2 if objective in ("pairs", "reward") else None)
    given = place_batch(given, batch_sharding(mesh, rules), ROWS, balanced=balanced)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params, frozen, given)
    return {"loss": loss, **{name: mean.value() for name, mean in metrics.items()}}, jax.device_get(grads)


@lru_cache
def alone(model: str, objective: str, num_layers: int = 2):
    return losses_and_gradients(model, objective, None, num_layers=num_layers)


def assert_same(found, want):
    """Checks losses to 1e-5, and gradients to 1e-4 of the largest gradient of each parameter."""
    (metrics, grads), (want_metrics, want_grads) = found, want
    for name in want_metrics:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
    assert norm(want_grads) > 0
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max() + 1e-8, err_msg=str(path))
