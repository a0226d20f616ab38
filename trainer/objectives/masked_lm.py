"""Telling hidden tokens from all around them: masked language modelling, and masked diffusion.

Targets are of the same place. A model that is not causal predicts there what a mask hides.

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
    """Cross entropy of the tokens that are hidden (Devlin et al. 2019, section 3.1)."""

    kind: str = "masked"
    # Tokens of each row whose logits exist at once; the length or more: all
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
    """The bound on the negative log-likelihood that masked diffusion gives (Sahoo et al. 2024, equation 10; Nie et al.
    2025, equation 3): cross entropy of what is masked, weighed by 1 / ratio, over all tokens.
    """

    kind: str = "masked_diffusion"

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds(phase="masked_diffusion", transform="diffusion")

    def build(self, token_bytes: np.ndarray | None) -> "Masked":
        return Masked(self, bound=True, token_bytes=token_bytes)


@dataclass(frozen=True)
class Masked(Objective):
    """Metrics beside the loss: `nll` (cross entropy; of diffusion the bound), `accuracy` of what is hidden, and of
    diffusion `bytes` per token where known, and those of the router where the model has experts.
    """

    config: MaskedLMConfig
    bound: bool = False
    token_bytes: np.ndarray | None = None  # [V] i32

    def compute_loss(self, inputs: LossInputs) -> Losses:
        batch, output = inputs.batch, inputs.forward()
        tokens = token_logprobs(output, batch.targets, chunk=self.config.loss_chunk_size)
        weight_BL = batch.loss_mask.astype(jnp.float32)
        hidden_BL = (weight_BL > 0).astype(jnp.float32)
        counted_BL = (batch.segment_ids > 0).astype(jnp.float32) if self.bound else hidden_BL
        mean = lambda values_BL, of_BL: Mean(jnp.sum(values_BL * of_BL), jnp.sum(of_BL))
        nll = Mean(jnp.sum(-tokens.logprob * weight_BL), jnp.sum(counted_BL))
        added_BL, router = auxiliary_terms(output, counted_BL.shape)
        metrics = {"nll": nll, "accuracy": mean(tokens.correct.astype(jnp.float32), hidden_BL)}
        if self.token_bytes is not None:
            metrics["bytes"] = mean(jnp.asarray(self.token_bytes, jnp.float32)[batch.targets], counted_BL)
        metrics |= {name: mean(values_BL, counted_BL) for name, values_BL in router.items()}
        return nll._replace(total=nll.total + jnp.sum(added_BL * counted_BL)), metrics
