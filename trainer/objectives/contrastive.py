"""Embeddings of texts: those that belong together near, all others of a batch far (van den Oord et al. 2018, InfoNCE;
Karpukhin et al. 2020, section 3.2, for the other pairs of a batch as negatives; Gao et al. 2021).

Shape letters: B matches, S texts of one (0 anchor, 1 positive, further ones negatives), L length, D model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch, flat_rows
from data.records.encoding import DataFormat
from models.transformer import Apply
from trainer.objective import Mean, ObjectiveConfig, Params, token_spec
from trainer.objectives.pooling import Pooling, at_end, pooled


@dataclass
class ContrastiveConfig(ObjectiveConfig):
    """Its build checks the values."""

    kind: str = "contrastive"
    pooling: Pooling = Pooling.mean  # Hidden states that the embedding is computed from
    temperature: float = 0.05  # cosines are divided by it
    negatives: int = 0  # texts of each record that are to be told from the positive one
    symmetric: bool = True  # the anchor is also to be found from the positive, as in CLIP

    @property
    def of_tokens(self) -> bool:
        return False

    @property
    def records(self) -> tuple[DataFormat, ...]:
        return (DataFormat.retrieval,)

    @property
    def num_negatives(self) -> int:
        return self.negatives

    def build(self, token_bytes: np.ndarray | None) -> "Contrastive":
        """Raises: ValueError naming the key of a value that cannot be."""
        if self.temperature <= 0:
            raise ValueError(f"objective.temperature={self.temperature}: must be above 0, as 0.05")
        if self.negatives < 0:
            raise ValueError(f"objective.negatives={self.negatives}: must not be negative")
        return Contrastive(self)


def cross_entropy(similarity_BK: jax.Array) -> jax.Array:
    """[B]: of finding candidate i from i."""
    return jax.nn.logsumexp(similarity_BK, axis=-1) - jnp.diagonal(similarity_BK)


@dataclass(frozen=True)
class Contrastive:
    """An `Objective` over batches [B, S, L]. A match is told from the others of its microbatch, on all devices.

    Metrics, means over matches: `accuracy` (the positive is the nearest of all candidates), `reciprocal_rank` of the
    positive, and its `similarity` (cosine).
    """

    config: ContrastiveConfig

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: TokenBatch,
        rng: jax.Array | None,
    ) -> tuple[Mean, dict[str, Mean]]:
        c = self.config
        flat = flat_rows(batch)
        vectors, terms_B = self._vectors(apply, params, flat, rng)
        sides = batch.tokens.shape[1]
        vectors_BSD = vectors.reshape(-1, sides, vectors.shape[-1])
        real_BS = (batch.segment_ids > 0).any(-1)
        real_B = real_BS.all(-1)
        # First the positives, then the negatives of all matches, so that candidate i belongs to anchor i.
        candidates_KD = vectors_BSD[:, 1:].swapaxes(0, 1).reshape(-1, vectors.shape[-1])
        there_K = real_BS[:, 1:].T.reshape(-1)
        cosine_BK = jnp.einsum("BD,KD->BK", vectors_BSD[:, 0], candidates_KD, precision="highest")
        similarity_BK = jnp.where(there_K[None], cosine_BK / c.temperature, -1e9)
        loss_B = cross_entropy(similarity_BK)
        if c.symmetric:
            among = real_B[None] | jnp.eye(len(real_B), dtype=bool)
            back_BB = jnp.where(among, cosine_BK[:, : len(real_B)].T / c.temperature, -1e9)
            loss_B = (loss_B + cross_entropy(back_BB)) / 2
        if terms_B is not None:
            loss_B = loss_B + terms_B.reshape(-1, sides).mean(-1)
        own_B = jnp.diagonal(similarity_BK)
        rank_B = 1 + jnp.sum(similarity_BK > own_B[:, None], axis=-1)
        metrics = {
            "accuracy": (rank_B == 1).astype(jnp.float32),
            "reciprocal_rank": 1 / rank_B,
            "similarity": jnp.diagonal(cosine_BK),
        }
        return Mean.of(loss_B, real_B), {name: Mean.of(values_B, real_B) for name, values_B in metrics.items()}

    def _vectors(
        self, apply: Apply, params: Params, batch: TokenBatch, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """[rows, D] f32 of length 1; and what a mixture of experts adds, of every row."""
        output = apply(params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids, rng=rng)
        found = at_end(pooled(output.hidden_BLD, batch, self.config.pooling), batch.segment_ids).astype(jnp.float32)
        length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(found), axis=-1, keepdims=True), 1e-24))
        return found / length, None if output.auxiliary is None else output.auxiliary.loss_B

    def batch_spec(self, batch_size: int, seq_len: int) -> TokenBatch:
        return token_spec(batch_size, 2 + self.config.negatives, seq_len)

    def read(self, apply: Apply, params: Params, batch: TokenBatch) -> jax.Array:
        """[B, D] f32: the vector of each row, which holds one text, of length 1: products are cosines."""
        return self._vectors(apply, params, batch, None)[0]
