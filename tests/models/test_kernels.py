"""Kernels of accelerators, interpreted, give what plain attention gives, and only documents see themselves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import kernels
from models.attention.ops import UNLIMITED, attention, attention_mask
from models.config import (
    AttentionConfig,
    AttentionImplementation,
    AttentionMask,
    Dtype,
    LayerKind,
    MLAConfig,
    ModelConfig,
)
from models.logical_axes import NoConstraint
from models.transformer import abstract_params, init_params, make_apply

B, L, N, K, H = 2, 256, 4, 2, 16
F32 = ModelConfig(vocab_size=32, dtype=Dtype.float32, attention=AttentionConfig(num_kv_heads=2))


def packed():
    """(positions, segments) of two rows: documents that end inside of blocks, and padding."""
    lengths = ([100, 29, 100], [256])
    segments, positions = np.zeros((B, L), np.int32), np.zeros((B, L), np.int32)
    for row, each in enumerate(lengths):
        at = 0
        for number, length in enumerate([*each, L - sum(each)]):
            segments[row, at : at + length] = (number + 1) * (number < len(each))
            positions[row, at : at + length] = np.arange(length)
            at += length
    return positions, segments


CASES = {
    "splash": (AttentionImplementation.splash, {}),
    "splash, window": (AttentionImplementation.splash, {"window": 40}),
    "splash, soft cap": (AttentionImplementation.splash, {"soft_cap": 1.5}),
    "splash, sinks": (AttentionImplementation.splash, {"sinks": True}),
    "triton": (AttentionImplementation.triton, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_gives_what_plain_attention_gives(case):
    kernel, asked = CASES[case]
    window, soft_cap = asked.get("window", UNLIMITED), asked.get("soft_cap")
    keys = jax.random.split(jax.random.key(0), 5)
    q, weight = (jax.random.normal(key, (B, L, N, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, L, K, H)) for key in keys[2:4])
    sinks = jax.random.normal(keys[4], (N,)) if asked.get("sinks") else None
    positions, segments = packed()
    options = {"scale": 0.4, "soft_cap": soft_cap}

    def plain(q, k, v):
        mask = attention_mask(positions, positions, segments, segments, window)
        return attention(q, k, v, mask, sinks_N=sinks, **options)

    def fused(q, k, v):
        how = {"window": window, "windows": (window,), "interpret": True}
        return kernels.kernel_attention(kernel, q, k, v, jnp.asarray(segments), sinks_N=sinks, **how, **options)

    def results(attend):
        total = lambda *arrays: jnp.sum(attend(*arrays) * weight)
        return jax.jit(lambda *arrays: (attend(*arrays), *jax.grad(total, argnums=(0, 1, 2))(*arrays)))(q, k, v)

    real = (segments > 0)[..., None, None]
    for ours, theirs in zip(results(fused), results(plain), strict=True):
        np.testing.assert_allclose(ours * real, theirs * real, atol=2e-5 * float(jnp.abs(theirs).max()))


def losses_of(config: ModelConfig) -> np.ndarray:
    positions, segments = packed()
    tokens = jax.random.randint(jax.random.key(1), (B, L), 0, 32)
    params = init_params(config, jax.random.key(0))

    def total(params):
        output = make_apply(config)(params, tokens, positions_BL=positions, segment_ids_BL=segments)
        return jnp.sum(jnp.sin(output.hidden_BLD) * (segments > 0)[..., None])

    value, grads = jax.jit(jax.value_and_grad(total))(params)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves((value, grads))])


@pytest.mark.parametrize("remat", ["none", "save_attn_out"])
@pytest.mark.parametrize("pattern", [["full"], ["sliding", "full"]])
def test_a_model_is_the_same_with_a_kernel(pattern, remat):
    kinds = {"layer_types": [LayerKind[name] for name in pattern], "sliding_window": 30}
    config = replace(F32, remat=type(F32.remat)[remat])
    found, wanted = (
        losses_of(replace(config, attention=replace(F32.attention, implementation=kernel, **kinds)))
        for kernel in (AttentionImplementation.splash, AttentionImplementation.xla)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_kernel_is_chosen_by_platform_and_by_what_it_can_do():
    auto = {"implementation": AttentionImplementation.auto}
    with_ = lambda **how: replace(F32, dtype=Dtype.bfloat16, attention=replace(F32.attention, **{**auto, **how}))
    assert (
        kernels.select_implementation(with_(implementation=AttentionImplementation.xla), 256, "tpu")
        is AttentionImplementation.xla
    )
    assert kernels.select_implementation(F32, 256, "tpu") is AttentionImplementation.splash  # by default
    assert kernels.select_implementation(with_(), 256, "cpu") is AttentionImplementation.xla
    assert kernels.select_implementation(with_(), 256, "tpu") is AttentionImplementation.splash
    assert kernels.select_implementation(with_(), 256, "gpu") is AttentionImplementation.triton
    assert (
        kernels.select_implementation(with_(block_size=0), 256, "tpu") is AttentionImplementation.xla
    )  # that is another way
    assert kernels.select_implementation(with_(), 250, "tpu") is AttentionImplementation.xla
    assert kernels.select_implementation(with_(mask=AttentionMask.prefix), 256, "tpu") is AttentionImplementation.xla
    assert kernels.select_implementation(with_(logit_softcap=5.0), 256, "gpu") is AttentionImplementation.xla
    assert (
        kernels.select_implementation(with_(layer_types=[LayerKind.sliding]), 256, "gpu") is AttentionImplementation.xla
    )
    assert (
        kernels.select_implementation(replace(with_(), dtype=Dtype.float32), 256, "gpu") is AttentionImplementation.xla
    )
    with pytest.raises(
        ValueError, match=r"model\.attention\.implementation=triton: cannot do model\.attention\.logit_softcap=5"
    ):
        kernels.select_implementation(
            with_(logit_softcap=5.0, implementation=AttentionImplementation.triton), 256, "gpu"
        )
    with pytest.raises(ValueError, match="rows of 250 tokens, which are no multiple of 128"):
        kernels.select_implementation(with_(implementation=AttentionImplementation.splash), 250, "tpu")


@pytest.mark.parametrize("kernel", [AttentionImplementation.splash, AttentionImplementation.triton])
def test_the_check_sees_a_kernel_that_ignores_borders(kernel, monkeypatch):
    config = replace(F32, attention=replace(F32.attention, implementation=kernel))
    assert kernels.max_error_vs_reference(kernel, config, interpret=True) < 1e-4
    ours = kernels.kernel_attention
    ignorant = lambda kernel, q, k, v, segments, **how: ours(kernel, q, k, v, jnp.ones_like(segments), **how)
    monkeypatch.setattr(kernels, "kernel_attention", ignorant)
    assert kernels.max_error_vs_reference(kernel, config, interpret=True) > 0.1


SLIDING = {"layer_types": [LayerKind.sliding, LayerKind.full]}
LATENT = {"head_dim": 192, "v_head_dim": 128, "mla": MLAConfig(kv_lora_rank=8, qk_rope_head_dim=64)}
DECISIONS = [  # platform, what differs from bf16 causal attention in rows of 256 tokens, kernel, reason
    ("cpu", {}, "xla", None),
    ("tpu", {}, "splash", None),
    ("tpu", {"dtype": "float32"}, "splash", None),
    ("tpu", {"head_dim": 80}, "splash", None),
    ("tpu", LATENT, "splash", None),
    ("tpu", SLIDING, "splash", None),
    ("tpu", {"logit_softcap": 5.0}, "splash", None),
    ("tpu", {"sinks": True}, "splash", None),
    ("tpu", {"mask": AttentionMask.bidirectional}, "xla", "model.attention.mask=bidirectional"),
    ("tpu", {"length": 250}, "xla", "rows of 250 tokens"),
    ("tpu", {"rows_cut": True}, "xla", "mesh.context"),
    ("tpu", {"block_size": 64}, "xla", "model.attention.block_size=64"),
    ("tpu", {"dropout": 0.1}, "xla", "model.attention.dropout=0.1"),
    ("tpu", {"implementation": AttentionImplementation.xla}, "xla", None),
    ("gpu", {}, "triton", None),
    ("cuda", {}, "triton", None),
    ("gpu", {"head_dim": 80}, "triton", None),
    ("gpu", {"dtype": "float32"}, "xla", "model.dtype=float32"),
    ("gpu", LATENT, "xla", "model.attention.v_head_dim=128"),
    ("gpu", SLIDING, "xla", "windows"),
    ("gpu", {"logit_softcap": 5.0}, "xla", "model.attention.logit_softcap=5.0"),
    ("gpu", {"sinks": True}, "xla", "model.attention.sinks=True"),
    ("gpu", {"mask": AttentionMask.prefix}, "xla", "model.attention.mask=prefix"),
    ("gpu", {"rows_cut": True}, "xla", "mesh.context"),
    ("rocm", {}, "xla", None),
]


@pytest.mark.parametrize(("platform", "case", "kernel", "reason"), DECISIONS)
def test_auto_takes_the_kernel_of_the_platform_where_it_supports_the_case(platform, case, kernel, reason):
    case = dict(case)
    length, rows_cut = case.pop("length", 256), case.pop("rows_cut", False)
    config = replace(F32, dtype=Dtype[case.pop("dtype", "bfloat16")], attention=replace(F32.attention, **case))
    found = kernels.decide(config, length, platform, rows_cut=rows_cut)
    assert found.kernel is AttentionImplementation[kernel]
    assert (found.reason is None) if reason is None else reason in str(found.reason)


@pytest.mark.parametrize(
    ("platform", "case"),
    [
        ("tpu", {"head_dim": 80, "logit_softcap": 5.0}),
        ("tpu", {**LATENT, "sinks": True}),
        ("tpu", SLIDING),
        ("cuda", {}),
    ],
)
def test_a_kernel_that_is_taken_lowers_for_devices_that_are_not_there(platform, case):
    config = replace(F32, dtype=Dtype.bfloat16, attention=replace(F32.attention, **case))
    kernels.compile_rows(kernels.select_implementation(config, 256, platform), config, 256, platform)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_model_lowers_with_the_kernel_of_its_platform_by_default(platform):
    config, shapes = replace(F32, dtype=Dtype.bfloat16), abstract_params(F32)
    rows = jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def total(params, tokens, positions, segments):
        apply = make_apply(config, NoConstraint(platform))
        return apply(params, tokens, positions_BL=positions, segment_ids_BL=segments).hidden_BLD.sum()

    lowered = jax.jit(jax.grad(total)).trace(shapes, rows, rows, rows).lower(lowering_platforms=(platform,))
    assert {"tpu": "tpu_custom_call", "cuda": "triton"}[platform] in lowered.as_text()
