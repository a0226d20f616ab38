"""Batch types that `data` passes to the trainer.

Shape letters: B batch, S sides (texts per example), L length.
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any  # a NumPy array on the host, a jax.Array on the mesh, a ShapeDtypeStruct in a plan


class TokenBatch(NamedTuple):
    """Packed token sequences. Every leaf has a leading batch dimension."""

    tokens: Array  # [B, L] i32
    targets: Array  # [B, L] i32: next token of the same document; for masked objectives, the original token
    loss_mask: Array  # [B, L] f32: 1 where the target contributes to the loss; for diffusion, the loss weight
    segment_ids: Array  # [B, L] i32: 1, 2, ... for the documents of a row; 0 is padding
    positions: Array  # [B, L] i32: position within the document, from 0


class ColumnBatch(NamedTuple):
    """A `TokenBatch` with additional per-row columns."""

    tokens: Array
    targets: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array
    columns: dict[str, Array]  # each [B, ...]: per-row values, such as margins, labels or cached log-probabilities


def tokens_of(batch: TokenBatch | ColumnBatch) -> TokenBatch:
    return TokenBatch(*batch[:5])


def columns_of(batch: TokenBatch | ColumnBatch) -> dict[str, Array]:
    return batch.columns if isinstance(batch, ColumnBatch) else {}


DTYPES = TokenBatch(np.int32, np.int32, np.float32, np.int32, np.int32)


def flat_rows(batch: TokenBatch | ColumnBatch) -> TokenBatch:
    """Reshapes fields from [B, S, L] to [B * S, L]: one row per text."""
    return TokenBatch(*(field.reshape(-1, field.shape[-1]) for field in batch[:5]))
