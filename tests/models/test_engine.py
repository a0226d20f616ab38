"""The engine: the result of a request does not depend on concurrent requests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import Dtype
from models.decode import engine as decode
from models.decode.engine import Engine, EngineConfig, Request, decoding_params, generate
from models.decode.sampling import SamplingConfig
from models.kv_cache import write_cache
from models.matmul import einsum_f32
from models.mixers.mixer_registry import init_cache
from models.transformer import init_params, logits, make_apply, param_axes
from models.weight_views import TiedEmbedding, TransposedWeight
from tests.models.test_transformer import BASE, FAMILIES, V
from trainer.mesh import MeshConfig, make_mesh
from trainer.objectives.cross_entropy import token_logprobs
from trainer.sharding import ShardingRules, make_constrain, param_shardings

SMALL = EngineConfig(slots=3, length=256, chunk=16, chunks_per_step=2)
PARAMS = init_params(BASE, jax.random.key(0))


def engine(**changes) -> Engine:
    return Engine(PARAMS, BASE, dataclasses.replace(SMALL, **changes))


def finish(engine: Engine, events: list) -> dict[int, list]:
    while engine.busy:
        events += engine.step()
    found: dict[int, list] = {}
    for event in events:
        found.setdefault(event.request, []).append((event.token, event.logprob, event.top, event.finish_reason))
    return found


def alone(request: Request) -> list:
    one = engine()
    number = one.submit(request)
    return finish(one, [])[number]


def requests(count: int) -> list[Request]:
    rng = np.random.default_rng(0)
    common = rng.integers(0, V, 40).tolist()
    made = []
    for i in range(count):
        prompt = rng.integers(0, V, int(rng.integers(1, 60))).tolist()
        if i % 3 == 0:
            prompt = common + prompt
        settings = SamplingConfig(
            max_new_tokens=int(rng.integers(1, 12)),
            temperature=[0.0, 1.0, 1.7][i % 3],
            top_k=[0, 9][i % 2],
            top_p=[1.0, 0.8][i // 2 % 2],
            repetition_penalty=[1.0, 1.3][i // 3 % 2],
            frequency_penalty=[0.0, 0.5][i // 5 % 2],
            seed=i,
        )
        made.append(Request(prompt, settings, stop_ids=[3], top_logprobs=[0, 2][i % 2]))
    return made


def test_concurrent_requests_change_no_bit_of_a_result():
    rng, crowd = np.random.default_rng(1), engine()
    asked, events, cancelled = {}, [], set()
    for request in requests(24):
        asked[crowd.submit(request)] = request
        for _ in range(int(rng.integers(0, 4))):
            events += crowd.step()
        if rng.random() < 0.2:
            gone = int(rng.choice(list(asked)))
            crowd.cancel(gone)
            cancelled.add(gone)
    found = finish(crowd, events)
    assert len(cancelled) >= 2 and len(set(asked) - cancelled) >= 12
    for number in set(asked) - cancelled:
        assert found[number] == alone(asked[number])
    assert crowd.num_active == crowd.num_waiting == 0


def test_a_cached_prefix_is_reused_and_changes_no_bit():
    crowd, greedy = engine(), SamplingConfig(max_new_tokens=5, temperature=0.0)
    prefix = list(range(30)) + list(range(10))
    first, second = Request([*prefix, 7], greedy), Request([*prefix, 8, 9], greedy)
    numbers = [crowd.submit(first), crowd.submit(second)]  # the second waits for the prefill of the first
    found = finish(crowd, [])
    assert crowd.reused_tokens == 32  # two complete chunks of 16
    third = crowd.submit(dataclasses.replace(first, prompt=[*prefix, 1, 1, 1]))  # from a released slot
    found |= finish(crowd, [])
    assert crowd.reused_tokens == 64
    for number, request in zip([*numbers, third], [first, second, Request([*prefix, 1, 1, 1], greedy)], strict=True):
        assert found[number] == alone(request)


def test_logprobs_are_those_of_training_and_top_ones_those_of_the_full_forward():
    request = Request([1, 2, 3, 4, 5], SamplingConfig(max_new_tokens=20, temperature=1.5), top_logprobs=4)
    rows = alone(request)
    tokens = [*request.prompt, *(token for token, *_ in rows)]
    n = len(tokens)
    output = make_apply(BASE)(
        PARAMS,
        jnp.array([tokens]),
        positions_BL=jnp.arange(n)[None],
        segment_ids_BL=jnp.ones((1, n), jnp.int32),
    )
    targets = jnp.array([[*tokens[1:], 0]])
    trained = np.asarray(token_logprobs(output, targets, chunk=n).logprob)[0, 4 : n - 1]
    np.testing.assert_allclose([logprob for _, logprob, *_ in rows], trained, atol=1e-5)
    whole = np.asarray(jax.nn.log_softmax(logits(output)[0], axis=-1))[4 : n - 1]
    for (_, _, top, _), row in zip(rows, whole, strict=True):
        np.testing.assert_allclose([p for _, p in top], np.sort(row)[::-1][:4], atol=1e-5)
        assert [int(row[t] >= np.sort(row)[-5]) for t, _ in top] == [1] * 4


@pytest.mark.parametrize(("name", "sizes"), [("llama", (2, 4, 1)), ("gemma", (2, 2, 2)), ("llama", (2, 1, 2, 1, 2))])
def test_generation_on_a_mesh_is_the_same(name, sizes):
    attention = dataclasses.replace(FAMILIES[name].attention, num_heads=4, num_kv_heads=4)
    config = dataclasses.replace(FAMILIES[name], attention=attention, vocab_size=40)
    mesh, params = make_mesh(MeshConfig(*sizes)), init_params(config, jax.random.key(0))
    sharded = jax.device_put(params, param_shardings(param_axes(config), params, mesh, ShardingRules()))
    prompts = [[1, 2, 3], list(range(20)), [5] * 7]
    settings = SamplingConfig(max_new_tokens=6, temperature=0.0)
    plain = generate(params, config, prompts, settings)
    split = generate(sharded, config, prompts, settings, constrain=make_constrain(mesh, ShardingRules()))
    assert [c.tokens for c in plain] == [c.tokens for c in split]
    for a, b in zip(plain, split, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "x", "kernel", "num_out"),
    [
        ("BLD,DNH->BLNH", (2, 3, 8), (8, 2, 4), 2),
        ("BLNH,NHD->BLD", (2, 3, 2, 4), (2, 4, 8), 1),
        ("BLD,DF->BLF", (2, 3, 8), (8, 5), 1),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transposed_weight_gives_the_same_product(spec, x, kernel, num_out, dtype):
    x, kernel = jax.random.normal(jax.random.key(0), x), jax.random.normal(jax.random.key(1), kernel)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    for rows in (x, x[:1, :1]):
        want = einsum_f32(spec, rows, kernel, jnp.dtype("float32"))
        found = einsum_f32(spec, rows, TransposedWeight.of(kernel, num_out), jnp.dtype("float32"))
        np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("family", ["llama", "olmo2", "latent"])
def test_transposed_weights_generate_the_same(monkeypatch, family, dtype):
    config = dataclasses.replace(FAMILIES[family], dtype=dtype)
    params = init_params(config, jax.random.key(0))
    settings = SamplingConfig(max_new_tokens=8, temperature=0.0)
    want = generate(params, config, [[1, 2, 3], [4]], settings)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    decode._programs.cache_clear()
    ready = decoding_params(params, config)
    assert (
        isinstance(ready["embedding"], TiedEmbedding)
        if config.tied_embeddings
        else isinstance(ready["head"], TransposedWeight)
    )
    assert isinstance(ready["layers"][0]["mlp"]["up"]["kernel"], TransposedWeight)
    found = generate(params, config, [[1, 2, 3], [4]], settings)
    decode._programs.cache_clear()
    if dtype is Dtype.float32:
        assert [c.tokens for c in found] == [c.tokens for c in want]
    first = lambda done: [c.logprobs[0] for c in done]  # later tokens may differ by rounding
    np.testing.assert_allclose(first(found), first(want), atol=1e-5 if dtype is Dtype.float32 else 0.02)


def test_a_step_in_bf16_does_not_convert_the_full_cache():
    """The CPU backend of XLA has no bf16 scatter, and would convert to f32 and back."""
    cache = init_cache(dataclasses.replace(BASE, dtype=Dtype.bfloat16), 3, 256).layers[0]
    B, K, _, H = cache.keys.shape
    new = jnp.ones((B, 1, K, H), jnp.bfloat16)
    text = jax.jit(write_cache).lower(cache, new, new, jnp.zeros((B, 1), jnp.int32), 0).compile().as_text()
    assert "256" in text and "f32[" not in text


def test_more_requests_than_slots_are_all_completed():
    prompts = [[i % V] for i in range(10)]
    settings = SamplingConfig(max_new_tokens=3, temperature=0.0)
    few = generate(PARAMS, BASE, prompts, settings, max_slots=2)
    many = generate(PARAMS, BASE, prompts, settings)
    assert [c.tokens for c in few] == [c.tokens for c in many]


def test_the_stop_token_is_returned_with_its_logprob():
    settings = SamplingConfig(max_new_tokens=6, temperature=0.0)
    [free] = generate(PARAMS, BASE, [[1, 2, 3]], settings)
    [ended] = generate(PARAMS, BASE, [[1, 2, 3]], settings, stop_ids=[free.tokens[3]])
    n = free.tokens.index(free.tokens[3])
    assert ended.tokens == free.tokens[:n] and ended.end == (free.tokens[n], free.logprobs[n])


def test_invalid_requests_are_refused():
    one, settings = engine(), SamplingConfig()
    with pytest.raises(ValueError, match="has no tokens"):
        one.submit(Request([], settings))
    with pytest.raises(ValueError, match="300 tokens leave no room"):
        one.submit(Request([1] * 300, settings))
    with pytest.raises(ValueError, match=f"99 is not a token id; valid: 0 to {V - 1}"):
        one.submit(Request([99], settings))
    with pytest.raises(ValueError, match="top_p=2"):
        one.submit(Request([1], SamplingConfig(top_p=2)))
    assert not one.busy and one.step() == []
