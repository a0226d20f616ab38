"""Evaluation sums in f64, so means are independent of the split into batches."""

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


def test_means_do_not_depend_on_the_split_into_batches():
    data = tokens(60)
    full = evaluate(eval_step, jnp.float32(2), {}, [data])
    parts = evaluate(eval_step, jnp.float32(2), {}, cut(data, 3, 4, 20, 45, 59))
    assert full == pytest.approx(parts, rel=1e-6)
    mask, nll = data["mask"].astype(bool), data["nll"].astype(float)
    expected = nll[mask].mean()
    assert full["loss"] == pytest.approx(expected, rel=1e-6)  # plain cross entropy, not the training objective
    assert full["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert full["accuracy"] == pytest.approx((nll < 1)[mask].mean(), rel=1e-6)
    assert full["bits_per_byte"] == pytest.approx(nll[mask].sum() / math.log(2) / data["bytes"][mask].sum(), rel=1e-6)
    assert full["tokens"] == mask.sum()


def test_small_sums_are_not_lost_in_large_ones():
    """In f32, adding 1 to 2**24 changes nothing; 200 batches of it would vanish."""
    step = jax.jit(lambda params, frozen, batch: {"loss": Mean(batch, jnp.float32(1))})
    batches = [jnp.float32(2**24)] + [jnp.float32(1)] * 200
    assert evaluate(step, None, {}, batches)["loss"] == (2**24 + 200) / 201


def test_metrics_per_source_and_token_weighted_over_all():
    a, b = tokens(40, 1), tokens(10, 2)
    result = evaluate_sources(eval_step, jnp.float32(1), {}, {"books": cut(a, 7), "code": [b]})
    both = evaluate(eval_step, jnp.float32(1), {}, [a, b])
    alone = evaluate(eval_step, jnp.float32(1), {}, [b])
    for metric in ("loss", "bits_per_byte", "accuracy", "perplexity", "tokens"):
        assert result[f"eval/{metric}"] == pytest.approx(both[metric], rel=1e-6)
        assert result[f"eval/code/{metric}"] == pytest.approx(alone[metric], rel=1e-6)
    simple = (result["eval/books/loss"] + result["eval/code/loss"]) / 2
    assert abs(result["eval/loss"] - simple) > 1e-4


def test_source_without_a_batch_is_named():
    with pytest.raises(ValueError, match="source 'code' has no batch"):
        evaluate_sources(eval_step, jnp.float32(1), {}, {"books": [tokens(4)], "code": []})


def test_batches_are_fetched_ahead_and_few_are_in_flight():
    """The loop never waits for the batch just dispatched, and at most a few batches are in flight."""
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
