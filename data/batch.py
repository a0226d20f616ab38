"""The one shape of training data that crosses from `data` to the core.

Shape letters: B batch, L length.
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any  # a NumPy array on the host, a jax.Array on the mesh, a ShapeDtypeStruct in a plan


class TokenBatch(NamedTuple):
    """Packed token sequences. Every leaf has a leading batch dim."""

    tokens: Array  # [B, L] i32
    targets: Array  # [B, L] i32: the token that follows, inside the same document; of masks, what they hide
    loss_mask: Array  # [B, L] f32: 1 where `targets` is to be learnt; in diffusion the weight of it
    segment_ids: Array  # [B, L] i32: 1, 2, ... for the documents of a row; 0 is padding
    positions: Array  # [B, L] i32: restart at 0 with each document


class ColumnBatch(NamedTuple):
    """The same, and further numbers of each row beside them."""

    tokens: Array
    targets: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array
    columns: dict[str, Array]  # each [B, ...] f32: what is known of a row beforehand


def tokens_of(batch: TokenBatch | ColumnBatch) -> TokenBatch:
    return TokenBatch(*batch[:5])


def columns_of(batch: TokenBatch | ColumnBatch) -> dict[str, Array]:
    return batch.columns if isinstance(batch, ColumnBatch) else {}


DTYPES = TokenBatch(np.int32, np.int32, np.float32, np.int32, np.int32)


def flat_rows(batch: TokenBatch | ColumnBatch) -> TokenBatch:
    """Fields [B, S, L] as [B S, L]: a row of each text."""
    return TokenBatch(*(field.reshape(-1, field.shape[-1]) for field in batch[:5]))
