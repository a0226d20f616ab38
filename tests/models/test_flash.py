"""Blockwise and ring attention equal the reference in values and gradients, for all masks, block sizes and meshes."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ranges import check_ranges
from models.attention.flash import Keys, Queries, block_is_visible, blockwise_attention, causal_attention, row_attention
from models.attention.ops import UNLIMITED, attention, attention_mask
from models.config import AttentionConfig, ContextParallel, ModelConfig
from models.logical_axes import no_constraint
from trainer.mesh import MeshConfig, make_mesh
from trainer.sharding import ShardingRules, make_constrain

B, L, N, K, H, W = 4, 48, 4, 2, 8, 8
# Documents of 20 and 17 tokens and padding; one document; many short ones; one, then mostly padding.
LENGTHS = ([20, 17], [48], [5] * 9, [3])
CASES = {
    "packed": {},
    "window": {"window": 7},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": True},
    "prefix": {"shown": "prefix"},
    "bidirectional": {"shown": "all"},
    "bidirectional window": {"shown": "all", "window": 5},
    "wider values": {"width": 12},
    "each head its key": {"kv_heads": 4},
    "all of it": {"window": 9, "soft_cap": 2.0, "sinks": True, "shown": "prefix"},
}


def places():
    segments, positions = np.zeros((B, L), np.int32), np.zeros((B, L), np.int32)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate([*lengths, L - sum(lengths)]):
            segments[row, at : at + length] = number + 1 if number < len(lengths) else 0
            positions[row, at : at + length] = np.arange(length)
            at += length
    return positions, segments


def inputs(dtype=jnp.float32, *, kv_heads=K, width=W, shown=None, sinks=False, window=UNLIMITED, soft_cap=None):
    keys = jax.random.split(jax.random.key(0), 5)
    q_BLNH = jax.random.normal(keys[0], (B, L, N, H)).astype(dtype)
    k_BSKH = jax.random.normal(keys[1], (B, L, kv_heads, H)).astype(dtype)
    v_BSKW = jax.random.normal(keys[2], (B, L, kv_heads, width)).astype(dtype)
    sinks_N = jax.random.normal(keys[3], (N,)) if sinks else None
    weight_BLNW = jax.random.normal(keys[4], (B, L, N, width)).astype(dtype)
    positions_BL, segments_BL = places()
    shown_BL = {None: None, "prefix": (positions_BL < 4) & (segments_BL > 0), "all": segments_BL > 0}[shown]
    options = {"scale": 0.4, "soft_cap": soft_cap}
    return (q_BLNH, k_BSKH, v_BSKW, sinks_N), (positions_BL, segments_BL, shown_BL), window, options, weight_BLNW


def values_and_gradients(attend, arrays, weight_BLNW):
    """Returns the output, and the gradients of its sum with random weights."""
    trained = [i for i, x in enumerate(arrays) if x is not None]

    def total(*arrays):
        out = attend(*arrays)
        return jnp.sum(out.astype(jnp.float32) * weight_BLNW.astype(jnp.float32)), out

    grads, out = jax.jit(jax.grad(total, argnums=trained, has_aux=True))(*arrays)
    return out, grads


def plain(case, dtype=jnp.float32):
    arrays, (positions, segments, shown), window, options, weight = inputs(dtype, **case)

    def attend(q, k, v, sinks):
        mask = attention_mask(positions, positions, segments, segments, window, shown)
        return attention(q, k, v, mask, sinks_N=sinks, **options)

    return values_and_gradients(attend, arrays, weight)


def check(found, wanted):
    (out, grads), (want, want_grads) = found, wanted
    np.testing.assert_allclose(out, want, atol=1e-5)
    for ours, theirs in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("case", "block"), [*((case, 7) for case in CASES), *(("all of it", block) for block in (16, 48, 100))]
)
def test_blocks_give_the_result_of_full_rows(case, block):
    arrays, (positions, segments, shown), window, options, weight = inputs(**CASES[case])

    def attend(q, k, v, sinks):
        at = positions, segments
        return blockwise_attention(
            q, Keys(k, v, *at, shown), *at, window=jnp.asarray(window), block=block, sinks_N=sinks, **options
        )

    check(values_and_gradients(attend, arrays, weight), plain(CASES[case]))


@pytest.mark.parametrize(
    ("case", "pieces"),
    [*((case, 4) for case in CASES if "shown" not in CASES[case]), ("window", 5), ("sinks", 48), ("packed", 0)],
)
def test_chunks_of_queries_give_the_result_of_full_rows(case, pieces):
    arrays, (positions, segments, _), window, options, weight = inputs(**CASES[case])

    def attend(q, k, v, sinks):
        rows = Keys(k, v, positions, segments, None), positions, segments
        return causal_attention(q, *rows, window=jnp.asarray(window), pieces=pieces, sinks_N=sinks, **options)

    check(values_and_gradients(attend, arrays, weight), plain(CASES[case]))


def test_a_row_of_256_tokens_multiplies_no_more_than_five_eighths_of_all_pairs():
    q, k, v = (jax.ShapeDtypeStruct((1, 256, heads, 8), jnp.float32) for heads in (2, 1, 1))
    at = jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def products(block):
        def attend(q, k, v, positions, segments):
            rows = Keys(k, v, positions, segments, None)
            return row_attention(no_constraint, q, rows, window=UNLIMITED, scale=1.0, block=block)

        found = re.findall(r"f32\[([\d,]+)\][^=]* = dot_general", str(jax.make_jaxpr(attend)(q, k, v, at, at)))
        return sum(math.prod(map(int, shape.split(","))) for shape in found if not shape.endswith(",8"))

    assert products(0) == 2 * 256 * 256
    assert products(None) == products(0) * 5 // 8


ALONE = MeshConfig(1, context=8)


@pytest.mark.parametrize(
    ("mesh", "case", "across", "block"),
    [
        *((MeshConfig(2, context=4), case, ContextParallel.ring, None) for case in CASES),
        (ALONE, "packed", ContextParallel.ring, None),
        (ALONE, "packed", ContextParallel.all_gather, None),
        (ALONE, "all of it", ContextParallel.all_gather, 5),
        (MeshConfig(2, context=2, tensor=2), "all of it", ContextParallel.ring, 5),
        (MeshConfig(2, context=2, tensor=2), "all of it", ContextParallel.all_gather, None),
        (MeshConfig(1, context=2, tensor=4), "all of it", ContextParallel.ring, None),  # more devices than kv heads
        (MeshConfig(1, fsdp=4, context=2), "window", ContextParallel.ring, 7),
    ],
)
def test_sharded_rows_give_the_result_of_full_rows(mesh, case, across, block):
    arrays, (positions, segments, shown), window, options, weight = inputs(**CASES[case])
    constrain = make_constrain(make_mesh(mesh), ShardingRules())

    def attend(q, k, v, sinks):
        rows = Keys(k, v, positions, segments, shown)
        how = {"block": block, "across": across, "window": jnp.asarray(window)}
        return row_attention(constrain, q, rows, sinks_N=sinks, **how, **options)

    check(values_and_gradients(attend, arrays, weight), plain(CASES[case]))


def test_bf16_stays_close_to_f32():
    case = CASES["all of it"]
    arrays, (positions, segments, shown), window, options, weight = inputs(jnp.bfloat16, **case)

    def attend(q, k, v, sinks):
        rows = Keys(k, v, positions, segments, shown)
        return row_attention(no_constraint, q, rows, sinks_N=sinks, block=16, window=window, **options)

    (out, grads), (want, want_grads) = values_and_gradients(attend, arrays, weight), plain(case, jnp.float32)
    assert out.dtype == jnp.bfloat16 and grads[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.05)
    for ours, theirs in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.05 * np.abs(theirs).max())


def test_only_pairs_of_blocks_without_a_visible_key_are_skipped():
    positions, segments = places()
    positions, segments = positions[:, :45], segments[:, :45]
    blocks = [jnp.moveaxis(jnp.asarray(x).reshape(B, 9, 5), 1, 0) for x in (positions, segments)]
    for window in (3, UNLIMITED):
        for shown in (None, segments > 0):
            in_blocks = None if shown is None else jnp.moveaxis(jnp.asarray(shown).reshape(B, 9, 5), 1, 0)
            found = block_is_visible(Queries(None, *blocks), Keys(None, None, *blocks, in_blocks), jnp.asarray(window))
            mask = attention_mask(positions, positions, segments, segments, window, shown)
            seen = np.asarray(mask).reshape(B, 9, 5, 9, 5).any((0, 2, 4))
            assert (np.asarray(found) | ~seen).all()
            if shown is None or window == 3:  # else the row of one document sees all of itself
                assert not np.asarray(found).all()
            one = [x[:, 1:2] for x in blocks]  # the row of one document: exact
            found = block_is_visible(Queries(None, *one), Keys(None, None, *one, None), jnp.asarray(window))
            mask = attention_mask(*(x[1:2] for x in (positions, positions, segments, segments)), window)
            np.testing.assert_array_equal(found, np.asarray(mask).reshape(9, 5, 9, 5).any((1, 3)))


def test_scores_of_a_full_row_are_never_materialized():
    q, k, v = (jax.ShapeDtypeStruct((1, 4096, heads, 8), jnp.float32) for heads in (2, 1, 1))
    at = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def total(q, k, v, positions, segments):
        rows = Keys(k, v, positions, segments, None)
        return row_attention(no_constraint, q, rows, window=UNLIMITED, scale=1.0).sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v, at, at).compile()
    assert "4096,4096" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 4096  # the scores of one head


def test_a_recomputed_layer_saves_its_attention_output():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 32, 2, 8)) for i in range(3))
    at = jnp.arange(32, dtype=jnp.int32)[None], jnp.ones((1, 32), jnp.int32)

    def layer(q, k, v):
        return row_attention(no_constraint, q, Keys(k, v, *at, None), window=UNLIMITED, scale=1.0, block=8).sum()

    exps = lambda policy: str(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=policy)))(q, k, v)).count(" exp ")
    saved = exps(jax.checkpoint_policies.save_only_these_names("attn_out"))
    assert saved == exps(jax.checkpoint_policies.everything_saveable) < exps(jax.checkpoint_policies.nothing_saveable)


def test_a_negative_block_is_refused():
    config = ModelConfig(vocab_size=8)
    with pytest.raises(ValueError, match=r"model\.attention\.block_size=-1: must be at least 0"):
        check_ranges(replace(config, attention=AttentionConfig(block_size=-1)), "model")
