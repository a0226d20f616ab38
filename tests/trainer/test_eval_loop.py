"""Evaluation adds up sums, so that batches of any size and number give the same means."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.eval_loop import evaluate, evaluate_sources
from trainer.objective import Mean


@jax.jit
def eval_step(params, frozen, batch):
    nll, mask = batch["nll"], batch["mask"]
    weight = mask.sum()
    return {
        "loss": Mean((nll * mask).sum() * params, weight),
        "nll": Mean((nll * mask).sum(), weight),
        "accuracy": Mean(((nll < 1.0) * mask).sum(), weight),
        "bytes": Mean((batch["bytes"] * mask).sum(), weight),
    }


def tokens(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "nll": rng.uniform(0, 4, n).astype(np.float32),
        "mask": (rng.random(n) < 0.7).astype(np.float32),
        "bytes": rng.integers(1, 6, n).astype(np.float32),
    }


def cut(data: dict[str, np.ndarray], *at: int) -> list[dict[str, np.ndarray]]:
    edges = [0, *at, len(data["nll"])]
    return [{k: v[a:b] for k, v in data.items()} for a, b in itertools.pairwise(edges)]


def test_the_means_do_not_depend_on_how_tokens_fall_on_batches():
    data = tokens(60)
    whole = evaluate(eval_step, jnp.float32(2), {}, [data])
    parts = evaluate(eval_step, jnp.float32(2), {}, cut(data, 3, 4, 20, 45, 59))
    assert whole == pytest.approx(parts, rel=1e-6)
    mask, nll = data["mask"].astype(bool), data["nll"].astype(float)
    expected = nll[mask].mean()
    assert whole["loss"] == pytest.approx(expected, rel=1e-6)  # plain cross entropy, not what is minimised
    assert whole["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert whole["accuracy"] == pytest.approx((nll < 1)[mask].mean(), rel=1e-6)
    assert whole["bits_per_byte"] == pytest.approx(nll[mask].sum() / math.log(2) / data["bytes"][mask].sum(), rel=1e-6)
    assert whole["tokens"] == mask.sum()


def test_small_sums_are_not_lost_in_large_ones():
    """In f32, adding 1 to 2**24 changes nothing; 200 batches of it would vanish."""
    step = jax.jit(lambda params, frozen, batch: {"loss": Mean(batch, jnp.float32(1))})
    batches = [jnp.float32(2**24)] + [jnp.float32(1)] * 200
    assert evaluate(step, None, {}, batches)["loss"] == (2**24 + 200) / 201


def test_each_source_is_told_and_all_are_weighted_by_their_tokens():
    a, b = tokens(40, 1), tokens(10, 2)
    result = evaluate_sources(eval_step, jnp.float32(1), {}, {"books": cut(a, 7), "code": [b]})
    both = evaluate(eval_step, jnp.float32(1), {}, [a, b])
    alone = evaluate(eval_step, jnp.float32(1), {}, [b])
    for metric in ("loss", "bits_per_byte", "accuracy", "perplexity", "tokens"):
        assert result[f"eval/{metric}"] == pytest.approx(both[metric], rel=1e-6)
        assert result[f"eval/code/{metric}"] == pytest.approx(alone[metric], rel=1e-6)
    simple = (result["eval/books/loss"] + result["eval/code/loss"]) / 2
    assert abs(result["eval/loss"] - simple) > 1e-4


def test_a_source_without_a_batch_is_named():
    with pytest.raises(ValueError, match="source 'code' has no batch"):
        evaluate_sources(eval_step, jnp.float32(1), {}, {"books": [tokens(4)], "code": []})


def test_batches_are_taken_while_earlier_ones_are_computed_and_few_are_held():
    """The device is never waited for right after a batch was given to it, and never far behind."""
    fetched: list[int] = []

    class Late:
        def __init__(self, index: int):
            self.index = index

        def __array__(self, *args, **kwargs):
            fetched.append(self.index)
            return np.float32(1)

        def __float__(self):
            fetched.append(self.index)
            return 1.0

    behind: list[int] = []

    def batches():
        for i in range(10):
            behind.append(i - len(set(fetched)))
            yield i

    evaluate(lambda params, frozen, i: {"loss": Mean(Late(i), Late(i))}, None, {}, batches())
    assert max(behind) == 2 and set(fetched) == set(range(10))
