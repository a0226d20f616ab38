"""Pairs of texts in the rows of a batch: pair n of a row is what segment n + 1 holds on either side.

Shape letters: B rows, S sides (0 chosen, 1 rejected), L length, N pairs of a row at most, P = B N pairs.
"""

import jax
import jax.numpy as jnp


def _of_pairs(segment_ids_BSL: jax.Array, pairs_per_row: int) -> jax.Array:
    """[B, S, L, N] bool: which pair of its row a token belongs to."""
    return segment_ids_BSL[..., None] == jnp.arange(1, pairs_per_row + 1)[None, None, None]


def summed(values_BSL: jax.Array, segment_ids_BSL: jax.Array, pairs_per_row: int) -> jax.Array:
    """[P, S]: over the tokens of each text; 0 where a row holds fewer pairs."""
    mine_BSLN = _of_pairs(segment_ids_BSL, pairs_per_row)
    return of_texts(jnp.sum(jnp.where(mine_BSLN, values_BSL[..., None], 0), axis=2))


def of_texts(values_BSN: jax.Array) -> jax.Array:
    """[P, S]: what is known of each text of a row, by pairs."""
    return values_BSN.swapaxes(1, 2).reshape(-1, 2)


def of_tokens(values_P: jax.Array, segment_ids_BSL: jax.Array, pairs_per_row: int) -> jax.Array:
    """[B, S, L]: of each token, what is known of its pair; 0 on padding."""
    mine_BSLN = _of_pairs(segment_ids_BSL, pairs_per_row)
    values_BN = values_P.reshape(-1, pairs_per_row)
    return jnp.sum(jnp.where(mine_BSLN, values_BN[:, None, None], 0), axis=-1)


def of_rows(values_R: jax.Array, pairs_per_row: int) -> jax.Array:
    """[P]: what is known of each row and side [B S], of its pairs: the mean of the sides."""
    return jnp.repeat(values_R.reshape(-1, 2).mean(-1), pairs_per_row)
