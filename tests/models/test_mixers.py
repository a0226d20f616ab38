"""The mixer registry and the cache protocol: a new kind of mixer is one class and one entry."""

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention.ops import attention_mask
from models.config import LayerKind, MLAConfig
from models.decode import engine as decode
from models.decode.engine import Engine, EngineConfig, Request, decoding_params, generate
from models.decode.sampling import SamplingConfig
from models.flops import cache_bytes, flops_per_token
from models.layers import Linear
from models.mixers.latent_attention import LatentAttention
from models.mixers.mixer import Cache, Mixer, copy_row
from models.mixers.mixer_registry import MIXERS, init_cache, mixer_class, mixer_kind, rewindable
from models.mixers.multi_head_attention import Attention
from models.transformer import forward_cached, init_params, logits
from tests.models.test_transformer import BASE, FAMILIES, change, run, setup


class RunningSum(Mixer):
    """The sum of a document's tokens so far: the smallest mixer with a state that cannot be rewound."""

    rewindable: ClassVar[bool] = False

    def __init__(self, rngs, config, out_std):
        D = config.embed_dim
        self.out = Linear(rngs, config, "BLD,DE->BLE", (D, D), ("embed", "embed"), std=out_std)

    def __call__(self, x_BLD, context, layer, rng):
        positions, segments = context.positions, context.segments
        sees_BLS = attention_mask(positions, positions, segments, segments, layer.window).astype(x_BLD.dtype)
        return self.out(jnp.einsum("BLS,BSD->BLD", sees_BLS, x_BLD)), None

    def step(self, x_BLD, cache, context, layer):
        real_BL = context.segments > 0
        state_BD = jax.lax.dynamic_slice_in_dim(cache, context.first_row, len(x_BLD))
        starts_B1 = real_BL[:, :1] & (context.positions[:, :1] == 0)
        added_BLD = jnp.cumsum(jnp.where(real_BL[..., None], x_BLD, 0), axis=1)
        sums_BLD = jnp.where(starts_B1, 0, state_BD)[:, None] + added_BLD
        cache = jax.lax.dynamic_update_slice_in_dim(cache, sums_BLD[:, -1], context.first_row, axis=0)
        return self.out(sums_BLD), cache

    @classmethod
    def init_cache(cls, config, rows, capacity, constrain):
        return jnp.zeros((rows, config.embed_dim))

    @classmethod
    def flops_per_token(cls, config, layer, seq_len):
        return 1.0 * config.embed_dim


@pytest.fixture
def running_sum(monkeypatch):
    """BASE with a running sum in place of attention."""
    monkeypatch.setitem(MIXERS, "full_attention", RunningSum)
    decode._programs.cache_clear()
    yield BASE
    decode._programs.cache_clear()


def test_the_kind_of_a_layer_follows_from_the_config():
    sliding = change(num_layers=3, attention={"layer_types": [LayerKind.sliding, LayerKind.full]})
    assert [mixer_kind(sliding, i) for i in range(3)] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert mixer_kind(replace(sliding, mtp_num_layers=1), 3) == "full_attention"
    assert mixer_class(sliding, 0) is Attention and mixer_class(FAMILIES["latent"], 0) is LatentAttention
    latent = replace(sliding, attention=replace(sliding.attention, mla=MLAConfig(kv_lora_rank=4)))
    assert {mixer_kind(latent, i) for i in range(3)} == {"latent_attention"}


def test_a_row_of_the_cache_is_copied_whole():
    cache = init_cache(BASE, 3, 100)
    assert cache.capacity == 128 and rewindable(BASE)
    layers = tuple(jax.tree.map(lambda x: x + jnp.arange(3.0)[:, None, None, None], layer) for layer in cache.layers)
    copied = copy_row(Cache(layers, cache.capacity), 2, 0)
    assert all(x[:, 0, 0, 0].tolist() == [2, 1, 2] for x in jax.tree.leaves(copied))


def test_padding_and_idle_rows_change_no_cache():
    params = decoding_params(init_params(BASE, jax.random.key(0)), BASE)
    cache = init_cache(BASE, 2, 100)
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    positions = jnp.array([[0, 1, decode.IDLE, decode.IDLE], [decode.IDLE] * 4])
    padded, after = forward_cached(params, tokens, positions, cache, config=BASE)
    alone, wanted = forward_cached(params, tokens[:1, :2], positions[:1, :2], init_cache(BASE, 2, 100), config=BASE)
    for found, want in zip(jax.tree.leaves(after), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(padded.hidden_BLD[:1, :2], alone.hidden_BLD, atol=1e-6)


def test_a_mixer_with_a_state_is_one_class_and_one_row(running_sum):
    config = running_sum
    params, tokens, positions, segments = setup(config)
    whole = run(config, params, tokens, positions, segments)
    assert not rewindable(config) and cache_bytes(config, 3, 10) == config.num_layers * 3 * config.embed_dim * 4
    assert flops_per_token(config, 10) > 0
    cache, ready = init_cache(config, 2, 32), decoding_params(params, config)
    pieces = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 16)):
        output, cache = forward_cached(ready, tokens[:, part], positions[:, part], cache, config=config)
        pieces.append(logits(output))
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=1e-4)


def test_the_engine_serves_a_mixer_with_a_state(running_sum):
    """Padding of prompts, idle slots and slots with a past change nothing; no prefix is taken from another slot."""
    params = init_params(running_sum, jax.random.key(0))
    greedy = SamplingConfig(max_new_tokens=4, temperature=0.0)
    prompts = [list(range(20)), [*range(16), 3], [5] * 3, [7], list(range(20))]
    engine = Engine(params, running_sum, EngineConfig(slots=2, length=128, chunk=16))
    rows = {engine.submit(Request(prompt, greedy)): row for row, prompt in enumerate(prompts)}
    found: list[list] = [[] for _ in prompts]
    while engine.busy:
        for event in engine.step():
            found[rows[event.request]].append((event.token, event.logprob))
    assert engine.reused_tokens == 0
    for prompt, events in zip(prompts, found, strict=True):
        [alone] = generate(params, running_sum, [prompt], greedy)
        assert [token for token, _ in events] == alone.tokens
        np.testing.assert_allclose([logprob for _, logprob in events], alone.logprobs, atol=1e-5)


def test_all_kinds_are_registered():
    assert set(MIXERS) == {"full_attention", "sliding_attention", "latent_attention"}
