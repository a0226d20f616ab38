"""Masked diffusion: the most confident tokens are unmasked first, and stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import AttentionConfig, AttentionMask, Dtype, ModelConfig
from models.decode.diffusion import generate_masked
from models.decode.sampling import SamplingConfig
from models.transformer import forward, init_params, logits

V, MASK = 40, 39
MODEL = ModelConfig(
    num_layers=1, embed_dim=32, vocab_size=V, dtype=Dtype.float32, init_std=0.4,
    attention=AttentionConfig(mask=AttentionMask.bidirectional),
)  # fmt: skip
PARAMS = init_params(MODEL, jax.random.key(0))
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0)


def by_hand(prompt: list[int], steps: int, new: int = 6) -> list[int]:
    """The algorithm, one row, without padding."""
    tokens = [*prompt, *[MASK] * new]
    for step in range(steps):
        ids = jnp.array([tokens])
        given = jnp.arange(len(tokens))[None], jnp.ones_like(ids)
        x = np.array(logits(forward(PARAMS, ids, *given, config=MODEL))[0])
        x[:, MASK] = -np.inf
        sure = np.array(jax.nn.log_softmax(jnp.asarray(x))).max(-1)
        places = sorted((i for i, t in enumerate(tokens) if t == MASK), key=lambda i: -sure[i])
        left = new - -(-new * (step + 1) // steps)
        for i in places[: len(places) - left]:
            tokens[i] = int(x[i].argmax())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_it_writes_what_the_algorithm_writes(steps):
    prompts = [[1, 2, 3], [4], list(range(30))]
    found = generate_masked(PARAMS, MODEL, prompts, GREEDY, mask_id=MASK, steps=steps)
    assert [completion.tokens for completion in found] == [by_hand(prompt, steps) for prompt in prompts]
    assert all(max(completion.logprobs) < 0 and completion.finish_reason == "length" for completion in found)


def test_rows_are_drawn_apart_and_alike_for_the_same_seed():
    sampling = SamplingConfig(max_new_tokens=12, temperature=1.0, seed=3)
    write = lambda seed: [
        c.tokens
        for c in generate_masked(
            PARAMS, MODEL, [[1, 2], [1, 2]], dataclasses.replace(sampling, seed=seed), mask_id=MASK, vocab_size=38
        )
    ]
    first = write(3)
    assert first == write(3) != write(4) and first[0] != first[1]
    assert all(token < 38 for row in first for token in row), "neither masks nor rows of padding"


def test_a_stop_token_ends_it():
    [whole] = generate_masked(PARAMS, MODEL, [[5, 6]], GREEDY, mask_id=MASK)
    stop = whole.tokens[3]
    [cut] = generate_masked(PARAMS, MODEL, [[5, 6]], GREEDY, mask_id=MASK, stop_ids=[stop])
    assert cut.tokens == whole.tokens[: whole.tokens.index(stop)] and cut.finish_reason == "eos"
    assert cut.end is not None and cut.end[0] == stop


def test_penalties_are_refused():
    with pytest.raises(ValueError, match="does not generate left to right"):
        generate_masked(PARAMS, MODEL, [[1]], SamplingConfig(repetition_penalty=1.2), mask_id=MASK)
