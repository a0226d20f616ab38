"""Generation: independent rows, exact filters, log-probabilities of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decode.engine import generate
from models.decode.sampling import History, SamplingConfig, Settings, filter_logits, sample
from models.transformer import init_params, logits, make_apply
from tests.models.test_transformer import BASE, FAMILIES, V

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], [7, 7]]


def write(config, prompts=PROMPTS, **sampling):
    params = init_params(config, jax.random.key(0))
    settings = SamplingConfig(**{"max_new_tokens": 6, **sampling})
    return params, generate(params, config, prompts, settings, stop_ids=())


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_greedy_is_the_argmax_of_the_full_forward_with_its_logprob(config):
    params, found = write(config, temperature=0.0)
    rows = np.zeros((len(PROMPTS), 32), np.int32)  # causal: tokens after a text do not matter
    for row, prompt, completion in zip(rows, PROMPTS, found, strict=True):
        tokens = [*prompt, *completion.tokens]
        row[: len(tokens)] = tokens
    positions = jnp.broadcast_to(jnp.arange(32)[None], rows.shape)
    output = make_apply(config)(
        params, jnp.asarray(rows), positions_BL=positions, segment_ids_BL=jnp.ones_like(positions)
    )
    p = np.asarray(jax.nn.log_softmax(logits(output), axis=-1))
    for row, prompt, completion in zip(p, PROMPTS, found, strict=True):
        for i, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
            assert token == int(row[len(prompt) - 1 + i].argmax())
            assert logprob == pytest.approx(float(row[len(prompt) - 1 + i, token]), abs=1e-4)


def test_a_row_does_not_depend_on_the_others():
    _, together = write(BASE, temperature=1.0, seed=3)
    _, alone = write(BASE, prompts=PROMPTS[:1], temperature=1.0, seed=3)
    _, three = write(BASE, prompts=PROMPTS[:3], temperature=1.0, seed=3)
    assert together[0].tokens == alone[0].tokens
    assert [c.tokens for c in together[:3]] == [c.tokens for c in three]


def test_the_seed_decides_what_is_drawn():
    one, same, other = (write(BASE, temperature=2.0, seed=s)[1] for s in (1, 1, 2))
    assert [c.tokens for c in one] == [c.tokens for c in same] != [c.tokens for c in other]


def test_equal_prompts_in_one_batch_are_drawn_apart():
    _, found = write(BASE, prompts=[[1, 2]] * 4, temperature=2.0)
    assert len({tuple(c.tokens) for c in found}) > 1


def test_eos_and_stop_end_a_row_and_the_rest_continues():
    params, free = write(BASE, temperature=0.0)
    eos = free[0].tokens[2]
    again = generate(params, BASE, PROMPTS, SamplingConfig(max_new_tokens=6, temperature=0.0), stop_ids=[eos])
    first = free[0].tokens.index(eos)
    assert again[0].tokens == free[0].tokens[:first] and again[0].finish_reason == "eos"
    stopped = generate(
        params,
        BASE,
        PROMPTS,
        SamplingConfig(max_new_tokens=6, temperature=0.0),
        stop_ids=(),
        on_token=lambda row, token: row == 1,
    )
    assert len(stopped[1].tokens) == 1 and stopped[1].finish_reason == "stop"
    assert stopped[2].tokens == free[2].tokens and stopped[2].finish_reason == "length"


def test_padded_vocabulary_is_never_generated():
    params = init_params(BASE, jax.random.key(0))
    found = generate(
        params, BASE, [[1]] * 8, SamplingConfig(max_new_tokens=20, temperature=5.0), stop_ids=(), vocab_size=5
    )
    assert {t for c in found for t in c.tokens} <= set(range(5))


def probabilities(x, seen=(0,), **settings):
    rows = Settings.of(1)
    rows.put(0, SamplingConfig(**settings), stream=0)
    prompt = jnp.zeros((1, len(x)), bool).at[0, list(seen)].set(True)
    history = History(prompt, jnp.zeros((1, len(x)), jnp.int32).at[0, 1].set(2))
    return np.asarray(jax.nn.softmax(filter_logits(jnp.array([x], jnp.float32), history, rows)))[0]


def test_filters_equal_enumeration():
    x = np.log(np.array([0.4, 0.25, 0.2, 0.1, 0.05]))
    p = np.exp(x)
    np.testing.assert_allclose(probabilities(x), p, atol=1e-6)
    np.testing.assert_allclose(probabilities(x, temperature=0.5), p**2 / (p**2).sum(), atol=1e-6)
    np.testing.assert_allclose(probabilities(x, top_k=2), [0.4 / 0.65, 0.25 / 0.65, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(probabilities(x, top_p=0.6), [0.4 / 0.65, 0.25 / 0.65, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(probabilities(x, top_p=0.66), np.array([0.4, 0.25, 0.2, 0, 0]) / 0.85, atol=1e-6)
    np.testing.assert_allclose(probabilities(x, min_p=0.3), np.array([0.4, 0.25, 0.2, 0, 0]) / 0.85, atol=1e-6)
    # Log-probabilities are negative: a penalty multiplies them (Keskar et al. 2019).
    penalised = np.exp(np.concatenate([x[:2] * 1.5, x[2:]]))
    np.testing.assert_allclose(probabilities(x, repetition_penalty=1.5), penalised / penalised.sum(), atol=1e-6)


def test_a_token_is_the_same_for_all_settings_of_other_rows():
    asked = [
        {"temperature": 0.0},
        {"temperature": 1.5},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 1.5, "min_p": 0.5},
        {"temperature": 0.0, "frequency_penalty": 2.0},
    ]
    x_BV = jnp.tile(jax.random.normal(jax.random.key(0), (1, 50)), (len(asked), 1))
    best = int(x_BV[0].argmax())
    counts_BV = jnp.zeros(x_BV.shape, jnp.int32).at[:, best].set(5)
    history, index = History(jnp.zeros(x_BV.shape, bool), counts_BV), jnp.zeros(len(asked), jnp.int32)

    def tokens(wanted):
        settings = Settings.of(len(asked))
        for row in wanted:
            settings.put(row, SamplingConfig(seed=3, **asked[row]), stream=row)
        return np.asarray(jax.jit(sample)(x_BV, history, settings, index))

    together = tokens(range(len(asked)))
    assert [tokens([row])[row] for row in range(len(asked))] == together.tolist()
    assert together[0] == best and together[4] != best and (tokens([0, 1])[:2] == together[:2]).all()


def test_sampling_draws_from_the_filtered_distribution():
    config = dataclasses.replace(BASE, num_layers=1)
    params, found = write(config, prompts=[[1]] * 600, temperature=1.0, max_new_tokens=1, top_k=3)
    output = make_apply(config)(
        params,
        jnp.array([[1]]),
        positions_BL=jnp.zeros((1, 1), jnp.int32),
        segment_ids_BL=jnp.ones((1, 1), jnp.int32),
    )
    top = np.argsort(-np.asarray(logits(output)[0, 0]))[:3]
    want = np.asarray(jax.nn.softmax(logits(output)[0, 0][top]))
    counts = np.bincount([c.tokens[0] for c in found], minlength=V)
    assert counts.sum() == counts[top].sum()
    np.testing.assert_allclose(counts[top] / 600, want, atol=0.08)


def test_invalid_requests_are_refused():
    params = init_params(FAMILIES["gpt2"], jax.random.key(0))
    settings = SamplingConfig(max_new_tokens=4)
    with pytest.raises(ValueError, match="max_seq_len=64"):
        generate(params, FAMILIES["gpt2"], [[1] * 64], settings, stop_ids=())
    with pytest.raises(ValueError, match="has no tokens"):
        generate(params, FAMILIES["gpt2"], [[]], settings, stop_ids=())
    with pytest.raises(ValueError, match=r"task.top_p=0: must be above 0"):
        SamplingConfig(top_p=0).validate()


def test_learned_positions_end_the_text_where_the_table_ends():
    params = init_params(FAMILIES["gpt2"], jax.random.key(0))
    [found] = generate(params, FAMILIES["gpt2"], [[1] * 60], SamplingConfig(max_new_tokens=50), stop_ids=())
    assert len(found.tokens) == 4
