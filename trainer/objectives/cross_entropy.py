"""Chunked log-probabilities of target tokens: the logits of a full batch are never materialized.

Shared by all objectives. Logits [B, C, V] are computed for C tokens per row at a time and recomputed in the backward
pass.

Shape letters: B batch, L length, C chunk of the length, D model, V vocab.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.matmul import einsum_f32, gradients
from models.transformer import ModelOutput

HEAD = "BCD,DV->BCV"
F32 = jnp.dtype("float32")


class TokenLogprobs(NamedTuple):
    """Statistics per token, [B, L]."""

    logprob: jax.Array  # f32: log-probability of the target (natural logarithm)
    logsumexp: jax.Array  # f32: of the logits, for the z-loss
    mean_logit: jax.Array  # f32: over the vocabulary, for label smoothing
    collision: jax.Array  # f32: log of the sum of squared probabilities (the probability that two samples are equal)
    correct: jax.Array  # bool: the target is the most probable token (greedy accuracy)


def chunk_logits(hidden_BCD: jax.Array, head_DV: jax.Array, soft_cap: float | None) -> jax.Array:
    """Returns logits [B, C, V] f32."""
    return _capped(einsum_f32(HEAD, hidden_BCD, head_DV, F32), soft_cap)


def _capped(logits_BCV: jax.Array, soft_cap: float | None) -> jax.Array:
    return logits_BCV if soft_cap is None else soft_cap * jnp.tanh(logits_BCV / soft_cap)


def _of_logits(logits_BCV: jax.Array, targets_BC: jax.Array) -> TokenLogprobs:
    max_BC1 = jax.lax.stop_gradient(jnp.max(logits_BCV, axis=-1, keepdims=True))
    exp_BCV = jnp.exp(logits_BCV - max_BC1)
    sum_BC = jnp.sum(exp_BCV, axis=-1)
    logsumexp_BC = jnp.log(sum_BC) + max_BC1[..., 0]
    collision_BC = jnp.log(jnp.sum(jnp.square(exp_BCV), axis=-1)) - 2 * jnp.log(sum_BC)
    # Compare and sum instead of a gather, which keeps the vocabulary sharded. Broadcast a [1, 1, V] iota: a constant of
    # the logits' size would be materialized outside the loop.
    token_11V = jnp.arange(logits_BCV.shape[-1], dtype=targets_BC.dtype)[None, None]
    target_BC = jnp.sum(logits_BCV * (token_11V == targets_BC[..., None]), axis=-1)
    # The first of equal logits wins, as in argmax, which is slow on CPUs.
    earlier_BCV = (logits_BCV == max_BC1) & (token_11V < targets_BC[..., None])
    before_BC = jnp.sum(earlier_BCV.astype(F32), axis=-1)  # f32: XLA's CPU backend sums integers in windows
    correct_BC = (target_BC == max_BC1[..., 0]) & (before_BC == 0)
    return TokenLogprobs(
        target_BC - logsumexp_BC, logsumexp_BC, jnp.mean(logits_BCV, axis=-1), collision_BC, correct_BC
    )


def token_logprobs(output: ModelOutput, targets_BL: jax.Array, *, chunk: int) -> TokenLogprobs:
    """Computes log-probabilities of targets. `chunk`: tokens per row whose logits exist at once; >= L: all."""
    hidden_BLD, head_DV, soft_cap = output[:3]
    # The gradient of the head is accumulated over chunks in f32.
    compute = lambda x, targets: _of_logits(chunk_logits(x, head_DV, soft_cap), targets)
    return map_chunks(compute, hidden_BLD, targets_BL, chunk)


def map_chunks(compute: Callable[..., Any], hidden_BLD: Any, targets_BL: jax.Array, chunk: int) -> Any:
    """Applies `compute(hidden_BCD, targets_BC)` to chunks of C = `chunk` tokens per row; joins results to [B, L, ...].

    `hidden_BLD` may be a tuple of arrays. Each chunk is recomputed in the backward pass. Chunk m of M takes tokens
    m, M + m, 2M + m, ...: with context parallelism a device owns consecutive tokens, so each chunk is spread over all
    devices and no token moves between them.
    """
    length = targets_BL.shape[1]
    if chunk >= length:
        return compute(hidden_BLD, targets_BL)

    def body(_: None, part: Any) -> tuple[None, Any]:
        return None, compute(*part)

    # The steps of a scan are never merged, so barriers against common subexpression elimination are not needed.
    body = jax.checkpoint(body, prevent_cse=False)
    parts = jax.lax.scan(body, None, _split((hidden_BLD, targets_BL), length, chunk))[1]
    return _join(parts, length)


def _split(tree: Any, length: int, chunk: int) -> Any:
    """Splits [B, L, ...] into [M, B, C, ...], zero-padded if C M > L."""
    num_chunks = _num_chunks(length, chunk)
    chunk = -(-length // num_chunks)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], chunk, num_chunks, *x.shape[2:]), 2, 0)

    return jax.tree.map(split, tree)


def _join(tree: Any, length: int) -> Any:
    """Inverts `_split` and removes its padding."""

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, tree)


def _num_chunks(length: int, chunk: int) -> int:
    """Returns the number of chunks of at most `chunk` tokens, up to twice the minimum if that avoids padding."""
    least = -(-length // chunk)
    return next((n for n in range(least, 2 * least + 1) if length % n == 0), least)


LossOf = Callable[[TokenLogprobs], jax.Array]  # loss per token


def chunked_loss(
    loss_of: LossOf, output: ModelOutput, targets_BL: jax.Array, weights_BL: jax.Array, *, chunk: int
) -> tuple[jax.Array, TokenLogprobs]:
    """Returns (sum of weight times loss over all tokens in f32, statistics per token without a gradient).

    The incoming gradient of the sum is a scalar, so gradients of hidden states and head are computed in the forward
    pass up to that factor, while the logits of a chunk exist. Logits are computed once, whereas `token_logprobs`
    recomputes them in the backward pass (Hsu et al. 2024 [2410.10989], section 3.2). Weights have no gradient.
    """
    hidden_BLD, head_DV, soft_cap = output[:3]
    return _summed(loss_of, soft_cap, chunk, hidden_BLD, head_DV, targets_BL, weights_BL)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(loss_of: LossOf, soft_cap, chunk: int, hidden_BLD, head_DV, targets_BL, weights_BL):
    tokens = token_logprobs(ModelOutput(hidden_BLD, head_DV, soft_cap), targets_BL, chunk=chunk)
    return jnp.sum(loss_of(tokens) * weights_BL), tokens


def _summed_forward(loss_of: LossOf, soft_cap, chunk: int, hidden_BLD, head_DV, targets_BL, weights_BL):
    cast_DV = head_DV.astype(hidden_BLD.dtype)  # once, not per chunk

    def compute(hidden_BCD, targets_BC, weights_BC):
        def sum_of(logits_BCV):
            tokens = _of_logits(_capped(logits_BCV, soft_cap), targets_BC)
            return jnp.sum(loss_of(tokens) * weights_BC), tokens

        total, pull, tokens = jax.vjp(sum_of, einsum_f32(HEAD, hidden_BCD, cast_DV, F32), has_aux=True)
        dhidden_BCD, dhead_DV = gradients(HEAD, hidden_BCD, cast_DV, *pull(jnp.ones_like(total)))
        return (total, dhead_DV), (dhidden_BCD, tokens)

    rows, length = (hidden_BLD, targets_BL, weights_BL), targets_BL.shape[1]
    if chunk >= length:
        (total, dhead_DV), (dhidden_BLD, tokens) = compute(*rows)
        return (total, tokens), (dhidden_BLD, dhead_DV.astype(head_DV.dtype))

    def body(sums: Any, part: Any) -> tuple[Any, Any]:
        more, made = compute(*part)
        return jax.tree.map(jnp.add, sums, more), made

    start = jnp.zeros(()), jnp.zeros(head_DV.shape, F32)
    (total, dhead_DV), made = jax.lax.scan(body, start, _split(rows, length, chunk))
    dhidden_BLD, tokens = _join(made, length)
    return (total, tokens), (dhidden_BLD, dhead_DV.astype(head_DV.dtype))


def _summed_backward(loss_of: LossOf, soft_cap, chunk: int, made, dsum):
    times = lambda gradient: (gradient * dsum[0]).astype(gradient.dtype)
    return *map(times, made), None, None


_summed.defvjp(_summed_forward, _summed_backward)
