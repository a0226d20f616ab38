"""Contrastive training of text embeddings with in-batch negatives (InfoNCE, van den Oord et al. 2018).

In-batch negatives follow Karpukhin et al. 2020, section 3.2; see also Gao et al. 2021.

Shape letters: B matches, S texts per match (0 anchor, 1 positive, 2.. negatives), L length, D model, K candidates.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch, flat_rows
from data.records.encoding import DataFormat, DataNeeds
from models.config import AttentionMask
from models.transformer import ModelOutput
from trainer.objective import Losses, LossInputs, Mean, ModelNeeds, Objective, ObjectiveConfig, means_of
from trainer.objectives.pooling import Pooling, at_end, pool


@dataclass
class ContrastiveConfig(ObjectiveConfig):
    kind: str = "contrastive"
    pooling: Pooling = Pooling.mean  # hidden states that the embedding is computed from
    temperature: float = field(default=0.05, metadata={"above": 0})  # divisor of the cosine similarities
    # hard negatives per record, in addition to in-batch negatives
    negatives: int = field(default=0, metadata={"min": 0})
    symmetric: bool = True  # average with the loss of finding the anchor from the positive, as in CLIP

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds(formats=(DataFormat.retrieval,), phase="embed", num_negatives=self.negatives)

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(is_token_level=False, masks=(AttentionMask.causal, AttentionMask.bidirectional))

    def build(self, token_bytes: np.ndarray | None) -> "Contrastive":
        return Contrastive(self)


def cross_entropy(similarity_BK: jax.Array) -> jax.Array:
    """Returns [B]: cross entropy of selecting candidate i for anchor i."""
    return jax.nn.logsumexp(similarity_BK, axis=-1) - jnp.diagonal(similarity_BK)


@dataclass(frozen=True)
class Contrastive(Objective):
    """InfoNCE over batches [B, S, L]. Negatives come from the whole microbatch, across all devices.

    Metrics, means over matches: `accuracy` (the positive is the nearest candidate), `reciprocal_rank` of the positive
    and its `similarity` (cosine).
    """

    config: ContrastiveConfig

    def compute_loss(self, inputs: LossInputs) -> Losses:
        c, batch = self.config, inputs.batch
        flat = flat_rows(batch)
        output = inputs.forward(flat)
        vectors = self._vectors(output, flat)
        sides = batch.tokens.shape[1]
        vectors_BSD = vectors.reshape(-1, sides, vectors.shape[-1])
        real_BS = (batch.segment_ids > 0).any(-1)
        real_B = real_BS.all(-1)
        # All positives first, then the negatives: candidate i is the positive of anchor i.
        candidates_KD = vectors_BSD[:, 1:].swapaxes(0, 1).reshape(-1, vectors.shape[-1])
        valid_K = real_BS[:, 1:].T.reshape(-1)
        cosine_BK = jnp.einsum("BD,KD->BK", vectors_BSD[:, 0], candidates_KD, precision="highest")
        similarity_BK = jnp.where(valid_K[None], cosine_BK / c.temperature, -1e9)
        loss_B = cross_entropy(similarity_BK)
        if c.symmetric:
            valid_BB = real_B[None] | jnp.eye(len(real_B), dtype=bool)
            reverse_BB = jnp.where(valid_BB, cosine_BK[:, : len(real_B)].T / c.temperature, -1e9)
            loss_B = (loss_B + cross_entropy(reverse_BB)) / 2
        if output.auxiliary is not None:
            loss_B = loss_B + output.auxiliary.loss_B.reshape(-1, sides).mean(-1)
        positive_B = jnp.diagonal(similarity_BK)
        rank_B = 1 + jnp.sum(similarity_BK > positive_B[:, None], axis=-1)
        metrics = {
            "accuracy": (rank_B == 1).astype(jnp.float32),
            "reciprocal_rank": 1 / rank_B,
            "similarity": jnp.diagonal(cosine_BK),
        }
        return Mean.of(loss_B, real_B), means_of(metrics, real_B)

    def _vectors(self, output: ModelOutput, batch: TokenBatch) -> jax.Array:
        """Returns unit vectors [rows, D] f32."""
        vectors = at_end(pool(output.hidden_BLD, batch, self.config.pooling), batch.segment_ids).astype(jnp.float32)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True), 1e-24))
        return vectors / norm

    def score_texts(self, output: ModelOutput, batch: TokenBatch) -> jax.Array:
        """Returns unit vectors [B, D] f32 for rows of one text each; their dot products are cosine similarities."""
        return self._vectors(output, batch)

    def describe_output(self, values: list[float], classes: list[str]) -> dict[str, Any]:
        return {"vector": values}
