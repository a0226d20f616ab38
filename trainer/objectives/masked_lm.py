"""Masked language modeling and masked diffusion.

A bidirectional model predicts each masked token at its own position.

Shape letters: B batch, L length, V vocab.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from data.records.encoding import DataNeeds
from models.config import AttentionMask
from trainer.objective import Losses, LossInputs, Mean, ModelNeeds, Objective, ObjectiveConfig
from trainer.objectives.cross_entropy import token_logprobs
from trainer.objectives.moe_losses import auxiliary_terms


@dataclass
class MaskedLMConfig(ObjectiveConfig):
    """Cross entropy on masked tokens (BERT, Devlin et al. 2019, section 3.1)."""

    kind: str = "masked"
    # tokens per row whose logits exist at once; >= data.seq_len: all
    loss_chunk_size: int = field(default=128, metadata={"min": 1})

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds(phase="mlm", transform="mlm")

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(is_token_wise=True, masks=(AttentionMask.bidirectional,))

    def build(self, token_bytes: np.ndarray | None) -> "Masked":
        return Masked(self)


@dataclass
class MaskedDiffusionConfig(MaskedLMConfig):
    """Negative log-likelihood bound of masked diffusion (Sahoo et al. 2024, eq. 10; Nie et al. 2025, eq. 3).

    Cross entropy on masked tokens, weighted by 1 / mask ratio and divided by the number of all tokens.
    """

    kind: str = "masked_diffusion"

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds(phase="masked_diffusion", transform="diffusion")

    def build(self, token_bytes: np.ndarray | None) -> "Masked":
        return Masked(self, bound=True, token_bytes=token_bytes)


@dataclass(frozen=True)
class Masked(Objective):
    """Loss of masked language modeling and masked diffusion.

    Metrics: `nll` (cross entropy; for diffusion the bound), `accuracy` on masked tokens, for diffusion `bytes` per
    token if known, and router metrics of MoE models.
    """

    config: MaskedLMConfig
    bound: bool = False
    token_bytes: np.ndarray | None = None  # [V] i32

    def compute_loss(self, inputs: LossInputs) -> Losses:
        batch, output = inputs.batch, inputs.forward()
        tokens = token_logprobs(output, batch.targets, chunk=self.config.loss_chunk_size)
        weight_BL = batch.loss_mask.astype(jnp.float32)
        masked_BL = (weight_BL > 0).astype(jnp.float32)
        counted_BL = (batch.segment_ids > 0).astype(jnp.float32) if self.bound else masked_BL
        mean = lambda values_BL, of_BL: Mean(jnp.sum(values_BL * of_BL), jnp.sum(of_BL))
        nll = Mean(jnp.sum(-tokens.logprob * weight_BL), jnp.sum(counted_BL))
        auxiliary_BL, router = auxiliary_terms(output, counted_BL.shape)
        metrics = {"nll": nll, "accuracy": mean(tokens.correct.astype(jnp.float32), masked_BL)}
        if self.token_bytes is not None:
            metrics["bytes"] = mean(jnp.asarray(self.token_bytes, jnp.float32)[batch.targets], counted_BL)
        metrics |= {name: mean(values_BL, counted_BL) for name, values_BL in router.items()}
        return nll._replace(total=nll.total + jnp.sum(auxiliary_BL * counted_BL)), metrics
