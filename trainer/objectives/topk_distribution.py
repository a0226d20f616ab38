"""Distributions compressed to the top-k tokens plus one bucket for the remaining probability.

Merging outcomes never increases a divergence: the divergence of buckets is a lower bound of that of the distributions,
grows with k and is exact at k = V. Renormalizing over k tokens instead would ignore the student's tail.

Shape letters: B batch, C chunk of the length, V vocab, k tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NOTHING = -6e4  # log-probability of 0: finite, also in float16


class Buckets(NamedTuple):
    """Top-k tokens and bucket log-probabilities."""

    ids: jax.Array  # [B, C, k] i32: the top-k tokens, in descending order of probability
    logprobs: jax.Array  # [B, C, k + 1] f32: log-probabilities of the tokens, then of all other tokens together


def top_k_buckets(logprobs_BCV: jax.Array, k: int) -> Buckets:
    """Returns the buckets of each position; ties are broken by the lower token id."""
    _, ids_BCk = jax.lax.top_k(logprobs_BCV, k)
    return Buckets(ids_BCk, bucket_logprobs(logprobs_BCV, ids_BCk))


def bucket_logprobs(logprobs_BCV: jax.Array, ids_BCk: jax.Array) -> jax.Array:
    """Returns log-probabilities [B, C, k + 1] of the tokens and of the rest.

    The rest is summed, not computed as 1 minus the others: exact for small values.
    """
    top_BCV = jnp.put_along_axis(jnp.zeros(logprobs_BCV.shape, bool), ids_BCk, True, axis=-1, inplace=False)
    rest_BC = jax.nn.logsumexp(jnp.where(top_BCV, NOTHING, logprobs_BCV), axis=-1)
    return jnp.concatenate([jnp.take_along_axis(logprobs_BCV, ids_BCk, axis=-1), rest_BC[..., None]], axis=-1)


def buckets_to_columns(buckets: Buckets, dtype: Any) -> dict[str, jax.Array]:
    """Converts buckets to batch columns. float16 has 11 bits: relative error below 0.5 % for probabilities of e^-10."""
    return {"top_ids": buckets.ids, "top_logprobs": jnp.maximum(buckets.logprobs, NOTHING).astype(dtype)}


def load_buckets(ids_BCk: jax.Array, logprobs_BCk1: jax.Array) -> Buckets:
    """Converts batch columns to buckets, renormalized to correct for rounding."""
    return Buckets(ids_BCk, jax.nn.log_softmax(logprobs_BCk1.astype(jnp.float32), axis=-1))
