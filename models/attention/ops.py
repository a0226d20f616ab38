"""Attention, for training on packed rows and for decoding from a cache.

A query sees a key when both lie in the same document, the key is not later or is one that all may see, and it is
within the window. Positions restart with each document, so inside a document their order is the order of tokens.

Shape letters: B batch, L length, S key length, N query heads, K kv heads, G queries of a kv head (N = K G), H head dim,
T keys of a block, W width of values.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.cpu_workarounds import from_bits
from models.kv_cache import BLOCK, LayerKVCache
from models.layers import dropout
from models.matmul import einsum_f32
from models.remat import checkpoint_name_fwd

UNLIMITED = 2**30  # a window that hides nothing
HIDDEN = -1e30  # finite: a row that sees nothing stays free of NaN
F32 = jnp.dtype("float32")


def attention_mask(q_positions, k_positions, q_segments, k_segments, window, shown_BS=None) -> jax.Array:
    """[B, L, S] bool. Positions and segments are [B, L] and [B, S]; `window` is a scalar.

    `shown_BS` bool: keys that earlier tokens of their document see as well.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    same = q_segments[:, :, None] == k_segments[:, None, :]
    if shown_BS is None:
        return same & (distance >= 0) & (distance < window)
    return same & ((distance >= 0) | shown_BS[:, None, :]) & (jnp.abs(distance) < window)


def attention(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BLS: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with f32 scores: [B, L, N, width of v] in q's dtype.

    `sinks_N`: logits that take part in each softmax and stand for no key (GPT-OSS; Xiao et al. 2023).
    """
    options = {"scale": scale, "soft_cap": soft_cap, "sinks_N": sinks_N}
    p_BKGLS = attention_weights(q_BLNH, k_BSKH, mask_BLS, dtype=v_BSKH.dtype, **options)
    p_BKGLS = dropout(p_BKGLS, dropout_rate, rng)
    o_BKGLH = einsum_f32("BKGLS,BKSH->BKGLH", p_BKGLS, v_BSKH.swapaxes(1, 2), q_BLNH.dtype)
    B, L, N, _ = q_BLNH.shape
    return o_BKGLH.reshape(B, N, L, v_BSKH.shape[-1]).swapaxes(1, 2)


def attention_weights(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    mask_BLS: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    dtype: jnp.dtype = F32,
) -> jax.Array:
    """What each query takes of each key: [B, K, G, L, S] in `dtype`, computed in f32, without dropout."""
    B, L, N, H = q_BLNH.shape
    K = k_BSKH.shape[2]
    # Heads first, so that both products are batches of plain matrices.
    q_BKGLH = (q_BLNH * jnp.asarray(scale, q_BLNH.dtype)).swapaxes(1, 2).reshape(B, K, N // K, L, H)
    s_BKGLS = einsum_f32("BKGLH,BKSH->BKGLS", q_BKGLH, k_BSKH.swapaxes(1, 2), jnp.dtype("float32"))
    if soft_cap is not None:
        s_BKGLS = soft_cap * jnp.tanh(s_BKGLS / soft_cap)
    mask_B11LS = mask_BLS[:, None, None]
    if sinks_N is None:
        return masked_softmax(dtype, s_BKGLS, mask_B11LS)
    s_BKGLS = jnp.where(mask_B11LS, s_BKGLS, HIDDEN)
    sinks_KG11 = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    sinks_BKGL1 = jnp.broadcast_to(sinks_KG11, (*s_BKGLS.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([s_BKGLS, sinks_BKGL1], axis=-1), axis=-1)[..., :-1].astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def masked_softmax(dtype: jnp.dtype, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last dim of f32 scores, in `dtype`; 0 for what `mask` hides, which must not be a whole row.

    The gradient needs only what is returned, which the product with the values keeps anyway; by JAX's own rules it
    would keep exponentials in f32 and the mask, for each head, beside it.
    """
    return jax.nn.softmax(jnp.where(mask, scores, HIDDEN), axis=-1).astype(dtype)


def _softmax_forward(dtype, scores, mask):
    p = checkpoint_name_fwd("attn_weights", masked_softmax(dtype, scores, mask))
    return p, p


def _softmax_backward(dtype, p, dp):
    p, dp = p.astype(F32), dp.astype(F32)
    return p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True)), None


masked_softmax.defvjp(_softmax_forward, _softmax_backward)


def per_head_weights(q_BLNH: jax.Array, k_BSKH: jax.Array, mask_BLS: jax.Array, **options) -> jax.Array:
    """[B, N, L, S] f32: the weights of `attention` with these options, 0 where a query sees no key at all.

    The compiler makes them once for both.
    """
    p_BKGLS = jnp.where(mask_BLS[:, None, None], attention_weights(q_BLNH, k_BSKH, mask_BLS, **options), 0.0)
    return p_BKGLS.reshape(p_BKGLS.shape[0], -1, *p_BKGLS.shape[-2:])


class OnlineSoftmax(NamedTuple):
    """A softmax over the keys that a query has met so far, block by block, f32 (Milakov & Gimelshein 2018)."""

    max: jax.Array  # [..., L]
    sum: jax.Array  # [..., L]: of exp(score - max)
    output: jax.Array  # [..., L, W]: the sum of values, weighed by exp(score - max)

    @classmethod
    def init(cls, shape: tuple[int, ...], width: int, sinks_KG: jax.Array | None) -> "OnlineSoftmax":
        """Of queries [..., K, G, L]. With sinks as if a key had been there that has no value."""
        output = jnp.zeros((*shape, width))
        if sinks_KG is None:
            return cls(jnp.full(shape, HIDDEN), jnp.zeros(shape), output)
        return cls(jnp.broadcast_to(sinks_KG.astype(F32)[..., None], shape), jnp.ones(shape), output)

    def update(self, s_BKGLT: jax.Array, v_BKTW: jax.Array) -> "OnlineSoftmax":
        """With one more block of keys: their scores, `HIDDEN` where one is not seen, and values."""
        max_BKGL = jnp.maximum(self.max, s_BKGLT.max(-1))
        p_BKGLT = jnp.exp(s_BKGLT - max_BKGL[..., None])
        keep_BKGL = jnp.exp(self.max - max_BKGL)
        o_BKGLW = einsum_f32("BKGLT,BKTW->BKGLW", p_BKGLT.astype(v_BKTW.dtype), v_BKTW, F32)
        output_BKGLW = self.output * keep_BKGL[..., None] + o_BKGLW
        return OnlineSoftmax(max_BKGL, self.sum * keep_BKGL + p_BKGLT.sum(-1), output_BKGLW)

    @property
    def total(self) -> jax.Array:
        """[..., L]: the sum, which nothing must be divided by 0 with."""
        return jnp.maximum(self.sum, 1e-30)


def cached_attention(
    q_BLNH: jax.Array,
    cache: LayerKVCache,
    positions_BL: jax.Array,
    first_row: jax.Array | int,
    *,
    window: jax.Array | int,
    scale: float,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    shown: jax.Array | int | None = None,
) -> jax.Array:
    """Attention to the cached tokens of rows `first_row` onwards: [B, L, N, width of values] in q's dtype.

    Reads the cache block by block as far as the furthest row needs. A block that holds nothing for a row changes no bit
    of its result, so that a row gets the same whatever its neighbours are. Tokens whose position lies beyond the cache
    are padding, and get zeros or noise; a row that starts with one is idle. Of the keys the first `shown` are seen by
    earlier ones, too; the last of them must be among `positions_BL`.
    """
    B, L, N, H = q_BLNH.shape
    K, S = cache.keys.shape[1:3]
    q_BKGLH = (q_BLNH * jnp.asarray(scale, q_BLNH.dtype)).swapaxes(1, 2).reshape(B, K, N // K, L, H)
    busy_B1 = positions_BL[:, :1] < S
    last = jnp.max(jnp.where(positions_BL < S, positions_BL, 0))
    first = jnp.min(jnp.where(busy_B1, positions_BL, S)) - window + 1

    def body(i, running):
        part = lambda x: jax.lax.dynamic_slice(x, (first_row, 0, i * BLOCK, 0), (B, K, BLOCK, x.shape[-1]))
        block = lambda x: from_bits(part(x))
        s_BKGLT = einsum_f32("BKGLH,BKTH->BKGLT", q_BKGLH, block(cache.keys), F32)
        if soft_cap is not None:
            s_BKGLT = soft_cap * jnp.tanh(s_BKGLT / soft_cap)
        distance_BLT = positions_BL[:, :, None] - (i * BLOCK + jnp.arange(BLOCK))[None, None]
        mask_BLT = (distance_BLT >= 0) & (distance_BLT < window)
        if shown is not None:
            early_T = i * BLOCK + jnp.arange(BLOCK) < shown
            mask_BLT |= early_T[None, None] & (jnp.abs(distance_BLT) < window)
        return running.update(jnp.where(mask_BLT[:, None, None], s_BKGLT, HIDDEN), block(cache.values))

    sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)
    start = OnlineSoftmax.init((B, K, N // K, L), cache.values.shape[-1], sinks_KG)
    blocks = jnp.maximum(first, 0) // BLOCK, jnp.minimum(last, S - 1) // BLOCK + 1
    running = jax.lax.fori_loop(*blocks, body, start)
    o_BKGLW = running.output / running.total[..., None]
    return o_BKGLW.reshape(B, N, L, -1).swapaxes(1, 2).astype(q_BLNH.dtype)
