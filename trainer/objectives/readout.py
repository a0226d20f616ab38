"""What a model says of a whole text, read at the last token of it.

Shape letters: B batch, L length, D model, O outputs.
"""

import enum

import jax
import jax.numpy as jnp

from data.batch import TokenBatch
from models.layers import contract
from models.transformer import Output


class Pooling(enum.Enum):
    last = "last"  # the last token's vector: all that a causal model has read
    mean = "mean"  # of all tokens of a text


def pooled(hidden_BLD: jax.Array, batch: TokenBatch, pooling: Pooling) -> jax.Array:
    """[B, L, D]: at each token, the vector of its text as far as it has been read; so at its last one, of all of it.

    Texts of one row never mix.
    """
    if pooling is Pooling.last:
        return hidden_BLD
    real_BL = batch.segment_ids > 0
    sums_BLD = jnp.cumsum(jnp.where(real_BL[..., None], hidden_BLD.astype(jnp.float32), 0.0), axis=1)
    before_BL = jnp.arange(batch.tokens.shape[1])[None] - batch.positions - 1  # the last token before the text
    before_BLD = jnp.take_along_axis(sums_BLD, jnp.maximum(before_BL, 0)[..., None], axis=1)
    own_BLD = sums_BLD - jnp.where((before_BL >= 0)[..., None], before_BLD, 0.0)
    return (own_BLD / (batch.positions + 1)[..., None]).astype(hidden_BLD.dtype)


def scores(output: Output, batch: TokenBatch, pooling: Pooling) -> jax.Array:
    """[B, L, O] f32: what the head gives of each text at each token."""
    hidden_BLD = pooled(output.hidden_BLD, batch, pooling)
    return contract("BLD,DO->BLO", hidden_BLD, output.head_DV, jnp.dtype("float32"))


def at_end(values_BLX: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """[B, X] of rows of one text: at its last token, wherever padding stands; of an empty row at its first token."""
    place_BL = jnp.where(segment_ids_BL > 0, jnp.arange(segment_ids_BL.shape[1])[None], 0)
    return jnp.take_along_axis(values_BLX, place_BL.max(1)[:, None, None], axis=1)[:, 0]
