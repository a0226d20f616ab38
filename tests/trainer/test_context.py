"""Context parallelism: the same losses and gradients on every mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import TokenBatch
from models.attention.flash import Keys, Queries, block_is_visible
from models.config import AttentionConfig, ContextParallel, Remat
from models.transformer import abstract_params, make_apply
from tests.trainer.on_meshes import DENSE, V, alone, assert_same, losses_and_gradients
from trainer.mesh import MeshConfig, make_mesh
from trainer.objectives.next_token import NextTokenConfig
from trainer.sharding import ShardingRules, balanced_token_order, batch_sharding, make_constrain

CONTEXT = {n: MeshConfig(8 // n, context=n) for n in (2, 4, 8)}


@pytest.mark.parametrize(
    ("model", "objective", "mesh", "options"),
    [
        ("dense", "next token", CONTEXT[2], {"balanced": True}),
        ("dense", "next token", CONTEXT[8], {}),
        ("dense", "next token", CONTEXT[4], {"context_parallel": ContextParallel.all_gather, "balanced": True}),
        ("dense", "next token", CONTEXT[4], {"block_size": 3, "balanced": True}),
        ("dense", "next token", MeshConfig(1, fsdp=2, context=2, tensor=2), {}),
        (
            "dense",
            "next token",
            MeshConfig(1, fsdp=2, context=2, tensor=2),
            {"context_parallel": ContextParallel.all_gather, "block_size": 5},
        ),
        ("dense", "next token", None, {"block_size": 5}),  # unsharded rows, blockwise attention
        ("learned positions", "next token", MeshConfig(1, fsdp=2, context=4), {"balanced": True}),
        ("experts", "next token", CONTEXT[4], {"balanced": True}),
        (
            "experts",
            "next token",
            MeshConfig(1, expert=2, context=2, tensor=2),
            {"context_parallel": ContextParallel.all_gather},
        ),
        ("capacity", "next token", MeshConfig(1, expert=2, context=4), {}),
        ("latent", "multi-token prediction", MeshConfig(2, context=2, tensor=2), {}),
        ("dense", "next token", MeshConfig(2, fsdp=2, tensor=2), {"residual": ("context", "tensor")}),
        ("dense", "next token", MeshConfig(2, context=2, tensor=2), {"residual": ("context", "tensor")}),
        ("experts", "next token", MeshConfig(1, fsdp=2, expert=2, tensor=2), {"residual": ("tensor",)}),
        ("latent", "multi-token prediction", MeshConfig(2, context=2, tensor=2), {"residual": ("context", "tensor")}),
        ("dense", "pairs", MeshConfig(1, fsdp=2, context=4), {}),
        ("dense", "reward", MeshConfig(2, context=4), {}),
    ],
)
def test_losses_and_gradients_match_one_device(model, objective, mesh, options):
    assert_same(losses_and_gradients(model, objective, mesh, **options), alone(model, objective))


def test_no_device_holds_hidden_states_of_full_rows():
    """In the compiled step, keys are gathered or permuted, but no array of model width is gathered along the row."""
    D, long = 48, 64  # sizes that no other dim has
    config = replace(DENSE, embed_dim=D, remat=Remat.none, attention=AttentionConfig(2, 1, 8))
    mesh, rules = make_mesh(MeshConfig(1, context=8)), ShardingRules()
    apply = make_apply(config, make_constrain(mesh, rules))
    built = NextTokenConfig(loss_chunk_size=16).build(None)
    sharding = batch_sharding(mesh, rules)
    spec = lambda dtype: jax.ShapeDtypeStruct((2, long), dtype, sharding=sharding)
    given = TokenBatch(*(spec(dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    total = lambda params, batch: built.loss(apply, params, {}, batch, None)[0].total
    text = jax.jit(jax.grad(total)).lower(abstract_params(config), given).compile().as_text()
    lines = [line for line in text.splitlines() if " all-gather(" in line or " all-to-all(" in line]
    assert not [line for line in lines if f"{long},{D}]" in line], lines
    assert " collective-permute(" in text or "collective-permute-start(" in text
    for full_rows in (f"f32[2,{long},{D}]", f"f32[2,{long},{V}]"):
        assert full_rows not in text


def test_balanced_rows_give_equal_work_to_all_devices():
    devices, long = 4, 64
    order, blocks = balanced_token_order(long, devices), 2 * devices  # one block per chunk
    positions = lambda at: jnp.asarray(at, jnp.int32).reshape(blocks, 1, -1)

    def work(at):
        """Returns the number of visible block pairs per ring step and device."""
        found = np.asarray(
            block_is_visible(
                Queries(None, positions(at), jnp.ones_like(positions(at))),
                Keys(None, None, positions(at), jnp.ones_like(positions(at)), None),
                jnp.asarray(long),
            )
        ).reshape(devices, 2, devices, 2)
        return [
            [found[device, :, (device - turn) % devices].sum() for device in range(devices)] for turn in range(devices)
        ]

    assert work(order) == [[3] * devices] + [[2] * devices] * (devices - 1)
    assert max(np.sum(work(np.arange(long)), axis=0)) > 1.5 * max(np.sum(work(order), axis=0))
