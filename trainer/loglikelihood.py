"""Log-likelihood of continuations, and accuracy over multiple-choice problems.

Shape letters: B batch, L length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.logical_axes import ShardingConstraint, no_constraint
from models.transformer import Apply
from trainer.objective import Params
from trainer.objectives.cross_entropy import token_logprobs

TOKENS = 2048  # approximate tokens per forward pass: large enough for efficient matmuls, small enough for memory


class Text(NamedTuple):
    """Token ids; tokens from index `start` (at least 1) are scored, each given all preceding tokens."""

    ids: Sequence[int]
    start: int


class Score(NamedTuple):
    logprob: float  # natural, summed
    greedy: bool  # every scored token is the argmax
    tokens: int


def make_score(apply: Apply, *, constrain: ShardingConstraint = no_constraint, chunk: int = 128, prefix: bool = False):
    """Returns a jitted `score(params, tokens_BL, lengths_B, starts_B)`: summed log-probabilities [B], greedy [B].

    `prefix`: attention among the tokens before `starts_B` is bidirectional (prefix LM).
    """

    @jax.jit
    def score(params, tokens_BL, lengths_B, starts_B):
        B, L = tokens_BL.shape
        positions_BL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
        real_BL = positions_BL < lengths_B[:, None]
        inputs = {"positions_BL": positions_BL, "segment_ids_BL": real_BL.astype(jnp.int32)}
        if prefix:
            inputs["prefix_BL"] = positions_BL < starts_B[:, None]
        output = apply(params, tokens_BL, **inputs)
        targets_BL = jnp.roll(tokens_BL, -1, axis=1)
        found = token_logprobs(output, targets_BL, chunk=chunk)
        scored_BL = (positions_BL + 1 >= starts_B[:, None]) & (positions_BL + 1 < lengths_B[:, None])
        logprob_B = jnp.sum(jnp.where(scored_BL, found.logprob, 0), axis=1)
        greedy_B = jnp.all(found.correct | ~scored_BL, axis=1)
        # Replicated, because every process reads them.
        return constrain(logprob_B, (None,)), constrain(greedy_B, (None,))

    return score


def score_texts(
    score, params: Params, texts: Sequence[Text], *, rows_multiple: int = 1, progress: Callable[[int], None] = print
) -> list[Score]:
    """Returns scores in the order of `texts`. Batches texts of similar length; every process must call it.

    `progress` receives the number of texts done. Raises: ValueError if a text has no token to score.
    """
    found: list[Score | None] = [None] * len(texts)
    done = 0
    for length, numbers in _batches(texts, rows_multiple):
        rows = max(TOKENS // length // rows_multiple, 1) * rows_multiple
        tokens, lengths, starts = np.zeros((rows, length), np.int32), np.ones(rows, np.int32), np.ones(rows, np.int32)
        for row, number in enumerate(numbers):
            ids, start = texts[number]
            tokens[row, : len(ids)], lengths[row], starts[row] = ids, len(ids), start
        logprobs, greedy = map(np.asarray, score(params, tokens, lengths, starts))
        for row, number in enumerate(numbers):
            count = len(texts[number].ids) - texts[number].start
            found[number] = Score(float(logprobs[row]), bool(greedy[row]), count)
        done += len(numbers)
        progress(done)
    return [score for score in found if score is not None]


def _batches(texts: Sequence[Text], rows_multiple: int) -> Iterator[tuple[int, list[int]]]:
    """Yields (padded length, indices of texts). Lengths are multiples of 16 to limit recompilation."""
    by_length: dict[int, list[int]] = {}
    for number, (ids, start) in enumerate(texts):
        if not 1 <= start < len(ids):
            raise ValueError(
                f"text {number}: start={start} must be from 1 to {len(ids) - 1}, as the text has {len(ids)} tokens"
            )
        by_length.setdefault(-(-len(ids) // 16) * 16, []).append(number)
    for length, numbers in sorted(by_length.items()):
        rows = max(TOKENS // length // rows_multiple, 1) * rows_multiple
        for at in range(0, len(numbers), rows):
            yield length, numbers[at : at + rows]


def accuracy(scores: Sequence[Sequence[Score]], golds: Sequence[int], characters: Sequence[Sequence[int]]):
    """Returns `acc`, `acc_norm` or `perplexity`, `stderr` and `n` over problems. `scores`: one per option.

    `acc`: the option with the highest log-probability is correct; for single-option problems: it matches greedy
    decoding token for token. `acc_norm`: the same with log-probabilities divided by the characters of the option.
    `perplexity`: for single-option problems, exp(-mean log-probability) over problems, as reported for LAMBADA.
    `stderr`: standard error of `acc`.
    """
    if all(len(options) == 1 for options in scores):
        right = np.array([options[0].greedy for options in scores], np.float64)
        more = {"perplexity": math.exp(-float(np.mean([options[0].logprob for options in scores])))}
    else:
        best = lambda values: int(np.argmax(values))  # the first in case of ties
        right = np.array([best([s.logprob for s in o]) == g for o, g in zip(scores, golds, strict=True)], np.float64)
        norm = [
            best([s.logprob / c for s, c in zip(o, chars, strict=True)]) == g
            for o, g, chars in zip(scores, golds, characters, strict=True)
        ]
        more = {"acc_norm": float(np.mean(norm))}
    n = len(right)
    error = float(right.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return {"acc": float(right.mean()), **more, "stderr": error, "n": n}
