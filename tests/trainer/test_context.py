"""Rows in pieces: the same losses and gradients on every mesh."""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import TokenBatch
from models.blockwise import Keys, Queries, may_see
from models.config import (
    Across,
    AttentionConfig,
    Dispatch,
    Dtype,
    ExpertsConfig,
    LatentConfig,
    LayerKind,
    MLPConfig,
    ModelConfig,
    Position,
    Remat,
)
from models.transformer import abstract_params, init_params, make_apply, param_axes
from trainer.mesh import (
    MeshConfig,
    ShardingRules,
    batch_sharding,
    make_constrain,
    make_mesh,
    param_shardings,
    place_batch,
    row_order,
)
from trainer.objective import REFERENCE
from trainer.objectives.multi_token import MultiTokenConfig
from trainer.objectives.next_token import NextTokenConfig
from trainer.objectives.preference import PreferenceConfig
from trainer.objectives.reward import RewardConfig

ROWS, L, V = 8, 32, 24
DENSE = ModelConfig(
    num_layers=2, embed_dim=16, vocab_size=V, dtype=Dtype.float32, init_std=0.3, remat=Remat.qkv,
    attention=AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=6, pattern=[LayerKind.sliding, LayerKind.full],
        soft_cap=5.0, sinks=True,
    ),
    mlp=MLPConfig(hidden_dim=16),
)  # fmt: skip
EXPERTS = ExpertsConfig(8, 0, 2, 8, shared_hidden_dim=8, bias=True, z_loss=1e-2, balance_loss=0.1)
MODELS = {
    "dense": DENSE,
    "learned positions": replace(DENSE, position=Position.learned, max_seq_len=L + 1, remat=Remat.none),
    "experts": replace(DENSE, experts=EXPERTS),
    "capacity": replace(DENSE, experts=replace(EXPERTS, dispatch=Dispatch.capacity, capacity_factor=1.0)),
    "latent": replace(
        DENSE,
        attention=AttentionConfig(4, 4, 8, value_dim=4, latent=LatentConfig(kv_rank=8, rope_dim=4)),
        further_tokens=1,
    ),
}
OBJECTIVES = {
    "next token": NextTokenConfig(loss_chunk=8, z_loss=1e-3),
    "further tokens": MultiTokenConfig(loss_chunk=8),
    "pairs": PreferenceConfig(loss_chunk=8),
    "reward": RewardConfig(),
}
CONTEXT = {n: MeshConfig(8 // n, context=n) for n in (2, 4, 8)}


def batch(sides: int | None = None) -> TokenBatch:
    """Rows of two documents and padding, with masks of their own; of the last row nothing is learnt. Pairs: texts of
    one document.
    """
    rng = np.random.default_rng(0)
    rows = ROWS * (sides or 1)
    tokens = rng.integers(0, V, (rows, L + 1)).astype(np.int32)
    lengths, at = rng.integers(14, L + 1, (rows, 1)), np.arange(L)[None]
    border = 0 if sides else 11
    segments = np.where(at < border, 1, np.where(at < lengths, 2 - (not border), 0)).astype(np.int32)
    positions = np.where(at < border, at, at - border).astype(np.int32) * np.ones((rows, 1), np.int32)
    mask = ((segments > 0) & (rng.random((rows, L)) < 0.7)).astype(np.float32)
    if not sides:
        mask[-1] = 0
    fields = tokens[:, :-1], tokens[:, 1:], mask, segments, positions
    return TokenBatch(*(x.reshape(ROWS, sides, L) if sides else x for x in fields))


def losses_and_gradients(
    model: str,
    objective: str,
    mesh_config: MeshConfig | None,
    across=Across.ring,
    block=None,
    balanced=False,
    residual=("context",),
):
    config = MODELS[model]
    config = replace(config, attention=replace(config.attention, context=across, block=block))
    if objective == "reward":
        config = replace(config, outputs=1)
    mesh = make_mesh(mesh_config or MeshConfig(), None if mesh_config else jax.devices()[:1])
    rules = ShardingRules(residual=list(residual))
    shardings = param_shardings(param_axes(config), abstract_params(config), mesh, rules)
    init = jax.jit(partial(init_params, config))
    place = lambda seed: jax.device_put(init(jax.random.key(seed)), shardings)
    params, frozen = place(0), {REFERENCE: place(1)}
    if config.outputs:  # it begins with zeros, and would give the layers no gradient
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
def alone(model: str, objective: str):
    return losses_and_gradients(model, objective, None)


@pytest.mark.parametrize(
    ("model", "objective", "mesh", "how"),
    [
        ("dense", "next token", CONTEXT[2], {"balanced": True}),
        ("dense", "next token", CONTEXT[8], {}),
        ("dense", "next token", CONTEXT[4], {"across": Across.all_gather, "balanced": True}),
        ("dense", "next token", CONTEXT[4], {"block": 3, "balanced": True}),
        ("dense", "next token", MeshConfig(1, fsdp=2, context=2, tensor=2), {}),
        ("dense", "next token", MeshConfig(1, fsdp=2, context=2, tensor=2), {"across": Across.all_gather, "block": 5}),
        ("dense", "next token", None, {"block": 5}),  # whole rows are cut in blocks as well
        ("learned positions", "next token", MeshConfig(1, fsdp=2, context=4), {"balanced": True}),
        ("experts", "next token", CONTEXT[4], {"balanced": True}),
        ("experts", "next token", MeshConfig(1, expert=2, context=2, tensor=2), {"across": Across.all_gather}),
        ("capacity", "next token", MeshConfig(1, expert=2, context=4), {}),
        ("latent", "further tokens", MeshConfig(2, context=2, tensor=2), {}),
        ("dense", "next token", MeshConfig(2, fsdp=2, tensor=2), {"residual": ("context", "tensor")}),
        ("dense", "next token", MeshConfig(2, context=2, tensor=2), {"residual": ("context", "tensor")}),
        ("experts", "next token", MeshConfig(1, fsdp=2, expert=2, tensor=2), {"residual": ("tensor",)}),
        ("latent", "further tokens", MeshConfig(2, context=2, tensor=2), {"residual": ("context", "tensor")}),
        ("dense", "pairs", MeshConfig(1, fsdp=2, context=4), {}),
        ("dense", "reward", MeshConfig(2, context=4), {}),
    ],
)
def test_losses_and_gradients_are_those_of_one_device(model, objective, mesh, how):
    metrics, grads = losses_and_gradients(model, objective, mesh, **how)
    want_metrics, want = alone(model, objective)
    for name in want_metrics:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
    assert norm(want) > 0
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max() + 1e-8, err_msg=str(path))


def test_no_device_holds_the_hidden_states_of_whole_rows():
    """Of the compiled step: attention gathers keys or sends them on, and nothing of the width of the model is gathered
    along the row.
    """
    D, long = 48, 64  # of no other dim's size
    config = replace(DENSE, embed_dim=D, remat=Remat.none, attention=AttentionConfig(2, 1, 8))
    mesh, rules = make_mesh(MeshConfig(1, context=8)), ShardingRules()
    apply = make_apply(config, make_constrain(mesh, rules))
    built = NextTokenConfig(loss_chunk=16).build(None)
    sharding = batch_sharding(mesh, rules)
    spec = lambda dtype: jax.ShapeDtypeStruct((2, long), dtype, sharding=sharding)
    given = TokenBatch(*(spec(dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    total = lambda params, batch: built.loss(apply, params, {}, batch, None)[0].total
    text = jax.jit(jax.grad(total)).lower(abstract_params(config), given).compile().as_text()
    lines = [line for line in text.splitlines() if " all-gather(" in line or " all-to-all(" in line]
    assert not [line for line in lines if f"{long},{D}]" in line], lines
    assert " collective-permute(" in text or "collective-permute-start(" in text
    for of_whole_rows in (f"f32[2,{long},{D}]", f"f32[2,{long},{V}]"):
        assert of_whole_rows not in text


def test_devices_with_balanced_rows_have_as_much_to_do():
    pieces, long = 4, 64
    order, blocks = row_order(long, pieces), 2 * pieces  # a block is a stretch
    positions = lambda at: jnp.asarray(at, jnp.int32).reshape(blocks, 1, -1)

    def work(at):
        """Pairs of blocks that are looked at, of each device, in each turn of the ring."""
        found = np.asarray(
            may_see(
                Queries(None, positions(at), jnp.ones_like(positions(at))),
                Keys(None, None, positions(at), jnp.ones_like(positions(at)), None),
                jnp.asarray(long),
            )
        ).reshape(pieces, 2, pieces, 2)
        return [
            [found[device, :, (device - turn) % pieces].sum() for device in range(pieces)] for turn in range(pieces)
        ]

    assert work(order) == [[3] * pieces] + [[2] * pieces] * (pieces - 1)
    assert max(np.sum(work(np.arange(long)), axis=0)) > 1.5 * max(np.sum(work(order), axis=0))
