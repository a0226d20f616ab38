"""A distribution as its k likeliest tokens and one bucket for all the others.

Merging outcomes never makes two distributions look further apart, so that a divergence of buckets is at most that of
the distributions, grows with k, and is the same at k = V; renormalised on k tokens it would not see the student's tail.

Shape letters: B batch, C chunk of the length, V vocab, k tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NOTHING = -6e4  # the logarithm of no probability: finite, in float16 too


class Buckets(NamedTuple):
    """Logarithms of probabilities."""

    ids: jax.Array  # [B, C, k] i32: the k tokens, the likeliest first
    logprobs: jax.Array  # [B, C, k + 1] f32: theirs, and last that of the rest together


def likeliest(logprobs_BCV: jax.Array, k: int) -> Buckets:
    """The k likeliest tokens of each place, ties by their number, and the rest."""
    _, ids_BCk = jax.lax.top_k(logprobs_BCV, k)
    return Buckets(ids_BCk, in_buckets(logprobs_BCV, ids_BCk))


def in_buckets(logprobs_BCV: jax.Array, ids_BCk: jax.Array) -> jax.Array:
    """[B, C, k + 1]: of these tokens, and of the rest, which is summed and not what is left of 1: exact when small."""
    inside_BCV = jnp.put_along_axis(jnp.zeros(logprobs_BCV.shape, bool), ids_BCk, True, axis=-1, inplace=False)
    rest_BC = jax.nn.logsumexp(jnp.where(inside_BCV, NOTHING, logprobs_BCV), axis=-1)
    return jnp.concatenate([jnp.take_along_axis(logprobs_BCV, ids_BCk, axis=-1), rest_BC[..., None]], axis=-1)


def stored(buckets: Buckets, dtype: Any) -> dict[str, jax.Array]:
    """As columns of a batch. float16 keeps 11 bits of a logarithm: a few thousandths of a probability of e^-10."""
    return {"top_ids": buckets.ids, "top_logprobs": jnp.maximum(buckets.logprobs, NOTHING).astype(dtype)}


def recalled(ids_BCk: jax.Array, logprobs_BCk1: jax.Array) -> Buckets:
    """From columns; what rounding took from or added to the sum is shared out."""
    return Buckets(ids_BCk, jax.nn.log_softmax(logprobs_BCk1.astype(jnp.float32), axis=-1))
