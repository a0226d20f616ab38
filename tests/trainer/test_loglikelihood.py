"""Log-likelihoods of texts match the full forward pass, independent of batching."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.transformer import init_params, logits, make_apply
from tests.models.test_transformer import BASE, V
from trainer.loglikelihood import Score, Text, accuracy, make_score, score_texts

PARAMS = init_params(BASE, jax.random.key(0))


def test_score_is_the_sum_of_the_logprobs_of_the_scored_tokens():
    rng = np.random.default_rng(0)
    texts = [Text(rng.integers(0, V, n).tolist(), int(rng.integers(1, n))) for n in (2, 5, 31, 32, 33, 60, 7)]
    apply = make_apply(BASE)
    seen = []
    found = score_texts(make_score(apply), PARAMS, texts, progress=seen.append)
    assert seen[-1] == len(texts)
    for text, score in zip(texts, found, strict=True):
        n = len(text.ids)
        output = apply(
            PARAMS,
            jnp.array([text.ids]),
            positions_BL=jnp.arange(n)[None],
            segment_ids_BL=jnp.ones((1, n), jnp.int32),
        )
        p = np.asarray(jax.nn.log_softmax(logits(output)[0], axis=-1))
        want = [p[i - 1, text.ids[i]] for i in range(text.start, n)]
        assert score.logprob == pytest.approx(sum(want), abs=1e-4)
        assert score.tokens == len(want)
        assert score.greedy == all(p[i - 1].argmax() == text.ids[i] for i in range(text.start, n))


def test_text_without_tokens_to_score_is_refused():
    with pytest.raises(ValueError, match="start=3 must be from 1 to 2, as the text has 3 tokens"):
        score_texts(make_score(make_apply(BASE)), PARAMS, [Text([1, 2, 3], 3)])


def test_accuracy_by_logprob_and_by_length_normalized_logprob():
    scores = [[Score(-3.0, False, 1), Score(-4.0, False, 2)], [Score(-2.0, False, 1), Score(-1.0, True, 1)]]
    found = accuracy(scores, [1, 1], [[2, 8], [1, 1]])
    assert found["acc"] == 0.5 and found["acc_norm"] == 1.0 and found["n"] == 2
    assert found["stderr"] == pytest.approx(math.sqrt(0.5 * 0.5 * 2) / math.sqrt(2))
    single = accuracy([[Score(-1.0, True, 1)], [Score(-3.0, False, 2)]], [0, 0], [[1], [1]])
    assert single["acc"] == 0.5 and single["perplexity"] == pytest.approx(math.exp(2))
