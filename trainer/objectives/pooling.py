"""What a model says of a whole text, read at the last token of it.

Shape letters: B batch, L length, D model, O outputs.
"""

import enum

import jax
import jax.numpy as jnp

from data.batch import TokenBatch
from models.matmul import einsum_f32
from models.transformer import ModelOutput


class Pooling(enum.Enum):
    last = "last"  # the last token's vector: all that a causal model has read
    mean = "mean"  # of all tokens of a text


def pooled(hidden_BLD: jax.Array, batch: TokenBatch, pooling: Pooling) -> jax.Array:
    """[B, L, D]: at each token, the vector of its text as far as it has been read; so at its last one, of all of it.

    Texts of one row never mix.
    """
    if pooling is Pooling.last:
        return hidden_BLD
    real_BL1 = (batch.segment_ids > 0)[..., None]
    sums_BLD = running(jnp.where(real_BL1, hidden_BLD.astype(jnp.float32), 0.0), batch.positions)
    return (sums_BLD / (batch.positions + 1)[..., None]).astype(hidden_BLD.dtype)


def running(values_BLX: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """[B, L, X]: sums from the beginning of each text on."""
    sums_BLX = jnp.cumsum(values_BLX, axis=1)
    before_BL = jnp.arange(positions_BL.shape[1])[None] - positions_BL - 1  # the last token before the text
    before_BLX = jnp.take_along_axis(sums_BLX, jnp.maximum(before_BL, 0)[..., None], axis=1)
    return sums_BLX - jnp.where((before_BL >= 0)[..., None], before_BLX, 0.0)


def scores(output: ModelOutput, batch: TokenBatch, pooling: Pooling) -> jax.Array:
    """[B, L, O] f32: what the head gives of each text at each token."""
    hidden_BLD = pooled(output.hidden_BLD, batch, pooling)
    return einsum_f32("BLD,DO->BLO", hidden_BLD, output.head_DV, jnp.dtype("float32"))


def at_ends(values_BLX: jax.Array, segment_ids_BL: jax.Array, texts: int = 1) -> jax.Array:
    """[B, N, X] of rows of N texts at most: at the last token of each, wherever padding stands; of one that is not
    there at the row's first token.
    """
    mine_BLN = segment_ids_BL[..., None] == jnp.arange(1, texts + 1)[None, None]
    place_BN = jnp.where(mine_BLN, jnp.arange(segment_ids_BL.shape[1])[None, :, None], 0).max(1)
    return jnp.take_along_axis(values_BLX, place_BN[..., None], axis=1)


def at_end(values_BLX: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """[B, X] of rows of one text."""
    return at_ends(values_BLX, segment_ids_BL)[:, 0]
