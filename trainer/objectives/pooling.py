"""Pooling of hidden states: one vector or score per text, read at its last token.

Shape letters: B batch, L length, D model, O outputs.
"""

import enum

import jax
import jax.numpy as jnp

from data.batch import TokenBatch
from models.matmul import einsum_f32
from models.transformer import ModelOutput


class Pooling(enum.Enum):
    last = "last"  # hidden state of the last token
    mean = "mean"  # mean over all tokens of a text


def pool(hidden_BLD: jax.Array, batch: TokenBatch, pooling: Pooling) -> jax.Array:
    """Returns [B, L, D]: pooled hidden states of each text up to each token, so at its last token over the full text.

    Texts in the same row are pooled separately.
    """
    if pooling is Pooling.last:
        return hidden_BLD
    real_BL1 = (batch.segment_ids > 0)[..., None]
    sums_BLD = segment_cumsum(jnp.where(real_BL1, hidden_BLD.astype(jnp.float32), 0.0), batch.positions)
    return (sums_BLD / (batch.positions + 1)[..., None]).astype(hidden_BLD.dtype)


def segment_cumsum(values_BLX: jax.Array, positions_BL: jax.Array) -> jax.Array:
    """Returns cumulative sums [B, L, X] within each text."""
    sums_BLX = jnp.cumsum(values_BLX, axis=1)
    before_BL = jnp.arange(positions_BL.shape[1])[None] - positions_BL - 1  # last token before the text
    before_BLX = jnp.take_along_axis(sums_BLX, jnp.maximum(before_BL, 0)[..., None], axis=1)
    return sums_BLX - jnp.where((before_BL >= 0)[..., None], before_BLX, 0.0)


def scores(output: ModelOutput, batch: TokenBatch, pooling: Pooling) -> jax.Array:
    """Returns head outputs [B, L, O] f32 at each token."""
    hidden_BLD = pool(output.hidden_BLD, batch, pooling)
    return einsum_f32("BLD,DO->BLO", hidden_BLD, output.head_DV, jnp.dtype("float32"))


def at_ends(values_BLX: jax.Array, segment_ids_BL: jax.Array, texts: int = 1) -> jax.Array:
    """Returns the values [B, N, X] at the last token of each of up to N texts per row; padding may be anywhere.

    Missing texts read the first token of the row.
    """
    member_BLN = segment_ids_BL[..., None] == jnp.arange(1, texts + 1)[None, None]
    last_BN = jnp.where(member_BLN, jnp.arange(segment_ids_BL.shape[1])[None, :, None], 0).max(1)
    return jnp.take_along_axis(values_BLX, last_BN[..., None], axis=1)


def at_end(values_BLX: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """Returns the values [B, X] at the last token, for rows of one text."""
    return at_ends(values_BLX, segment_ids_BL)[:, 0]
