"""Kernels of accelerators, interpreted, give what plain attention gives, and only documents see themselves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import kernels
from models.attention.ops import UNLIMITED, attention, attention_mask
from models.config import AttentionConfig, AttentionImplementation, AttentionMask, Dtype, LayerKind, ModelConfig
from models.transformer import init_params, make_apply

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


@pytest.mark.parametrize("remat", ["none", "attention"])
@pytest.mark.parametrize("pattern", [["full"], ["sliding", "full"]])
def test_a_model_is_the_same_with_a_kernel(pattern, remat):
    kinds = {"pattern": [LayerKind[name] for name in pattern], "sliding_window": 30}
    config = replace(F32, remat=type(F32.remat)[remat])
    found, wanted = (
        losses_of(replace(config, attention=replace(F32.attention, implementation=kernel, **kinds)))
        for kernel in (AttentionImplementation.splash, AttentionImplementation.xla)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_kernel_is_chosen_by_platform_and_by_what_it_can_do():
    auto = {"kernel": AttentionImplementation.auto}
    with_ = lambda **how: replace(F32, dtype=Dtype.bfloat16, attention=replace(F32.attention, **{**auto, **how}))
    assert kernels.select_implementation(F32, 256, "tpu") is AttentionImplementation.xla  # unless it is asked for
    assert kernels.select_implementation(with_(), 256, "cpu") is AttentionImplementation.xla
    assert kernels.select_implementation(with_(), 256, "tpu") is AttentionImplementation.splash
    assert kernels.select_implementation(with_(), 256, "gpu") is AttentionImplementation.triton
    assert (
        kernels.select_implementation(with_(block=0), 256, "tpu") is AttentionImplementation.xla
    )  # that is another way
    assert kernels.select_implementation(with_(), 250, "tpu") is AttentionImplementation.xla
    assert kernels.select_implementation(with_(mask=AttentionMask.prefix), 256, "tpu") is AttentionImplementation.xla
    assert kernels.select_implementation(with_(soft_cap=5.0), 256, "gpu") is AttentionImplementation.xla
    assert kernels.select_implementation(with_(pattern=[LayerKind.sliding]), 256, "gpu") is AttentionImplementation.xla
    assert (
        kernels.select_implementation(replace(with_(), dtype=Dtype.float32), 256, "gpu") is AttentionImplementation.xla
    )
    with pytest.raises(
        ValueError, match=r"model\.attention\.implementation=triton: cannot do model\.attention\.logit_softcap=5"
    ):
        kernels.select_implementation(with_(soft_cap=5.0, kernel=AttentionImplementation.triton), 256, "gpu")
    with pytest.raises(ValueError, match="rows of 250 tokens, which are no multiple of 128"):
        kernels.select_implementation(with_(kernel=AttentionImplementation.splash), 250, "tpu")


@pytest.mark.parametrize("kernel", [AttentionImplementation.splash, AttentionImplementation.triton])
def test_the_check_sees_a_kernel_that_ignores_borders(kernel, monkeypatch):
    config = replace(F32, attention=replace(F32.attention, implementation=kernel))
    assert kernels.max_error_vs_reference(kernel, config, interpret=True) < 1e-4
    ours = kernels.kernel_attention
    ignorant = lambda kernel, q, k, v, segments, **how: ours(kernel, q, k, v, jnp.ones_like(segments), **how)
    monkeypatch.setattr(kernels, "kernel_attention", ignorant)
    assert kernels.max_error_vs_reference(kernel, config, interpret=True) > 0.1
