"""Attention in one function, for training on packed rows and for decoding from a cache alike.

A query sees a key when both lie in the same document, the key is not later, and it is within the window. Positions
restart with each document, so inside a document the order of positions is the order of tokens.

Shape letters: B batch, L length, S key length, N query heads, K kv heads, G queries of a kv head (N = K G), H head dim.
"""

import jax
import jax.numpy as jnp

from models.layers import contract, dropout

UNLIMITED = 2**30  # a window that hides nothing
HIDDEN = -1e30  # finite: a row that sees nothing stays free of NaN


def visible(q_positions, k_positions, q_segments, k_segments, window) -> jax.Array:
    """[B, L, S] bool. Positions and segments are [B, L] and [B, S]; `window` is a scalar."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    same = q_segments[:, :, None] == k_segments[:, None, :]
    return same & (distance >= 0) & (distance < window)


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
    B, L, N, H = q_BLNH.shape
    K = k_BSKH.shape[2]
    # Heads first, so that both products are batches of plain matrices.
    q_BKGLH = (q_BLNH * jnp.asarray(scale, q_BLNH.dtype)).swapaxes(1, 2).reshape(B, K, N // K, L, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    s_BKGLS = contract("BKGLH,BKSH->BKGLS", q_BKGLH, k_BKSH, jnp.dtype("float32"))
    if soft_cap is not None:
        s_BKGLS = soft_cap * jnp.tanh(s_BKGLS / soft_cap)
    s_BKGLS = jnp.where(mask_BLS[:, None, None], s_BKGLS, HIDDEN)
    if sinks_N is None:
        p_BKGLS = jax.nn.softmax(s_BKGLS, axis=-1)
    else:
        sinks_KG11 = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        sinks_BKGL1 = jnp.broadcast_to(sinks_KG11, (*s_BKGLS.shape[:-1], 1))
        p_BKGLS = jax.nn.softmax(jnp.concatenate([s_BKGLS, sinks_BKGL1], axis=-1), axis=-1)[..., :-1]
    p_BKGLS = dropout(p_BKGLS.astype(v_BSKH.dtype), dropout_rate, rng)
    o_BKGLH = contract("BKGLS,BKSH->BKGLH", p_BKGLS, v_BKSH, q_BLNH.dtype)
    return o_BKGLH.reshape(B, N, L, v_BSKH.shape[-1]).swapaxes(1, 2)
