"""Reductions over packed pairs: pair n of a row is segment n + 1 on both sides.

Shape letters: B rows, S sides (0 chosen, 1 rejected), L length, N maximum pairs per row, P = B N pairs.
"""

import jax
import jax.numpy as jnp


def _of_pairs(segment_ids_BSL: jax.Array, pairs_per_row: int) -> jax.Array:
    """Returns [B, S, L, N] bool: membership of tokens in pairs."""
    return segment_ids_BSL[..., None] == jnp.arange(1, pairs_per_row + 1)[None, None, None]


def summed(values_BSL: jax.Array, segment_ids_BSL: jax.Array, pairs_per_row: int) -> jax.Array:
    """Returns sums [P, S] over the tokens of each text; 0 for missing pairs."""
    member_BSLN = _of_pairs(segment_ids_BSL, pairs_per_row)
    return of_texts(jnp.sum(jnp.where(member_BSLN, values_BSL[..., None], 0), axis=2))


def of_texts(values_BSN: jax.Array) -> jax.Array:
    """Reshapes values per text of a row to pairs, [P, S]."""
    return values_BSN.swapaxes(1, 2).reshape(-1, 2)


def of_tokens(values_P: jax.Array, segment_ids_BSL: jax.Array, pairs_per_row: int) -> jax.Array:
    """Broadcasts values per pair to tokens, [B, S, L]; 0 on padding."""
    member_BSLN = _of_pairs(segment_ids_BSL, pairs_per_row)
    values_BN = values_P.reshape(-1, pairs_per_row)
    return jnp.sum(jnp.where(member_BSLN, values_BN[:, None, None], 0), axis=-1)


def of_rows(values_R: jax.Array, pairs_per_row: int) -> jax.Array:
    """Broadcasts values per row and side [B S] to pairs [P], averaged over sides."""
    return jnp.repeat(values_R.reshape(-1, 2).mean(-1), pairs_per_row)
