"""Next-token cross entropy for pretraining and supervised fine-tuning, which differ only in the loss mask."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch
from models.config import AttentionMask
from models.transformer import ModelOutput
from trainer.objective import Losses, LossInputs, Mean, ModelNeeds, Objective, ObjectiveConfig
from trainer.objectives.cross_entropy import TokenLogprobs, chunked_loss
from trainer.objectives.moe_losses import auxiliary_terms


@dataclass
class NextTokenConfig(ObjectiveConfig):
    kind: str = "next_token"
    # weight of the squared logsumexp of the logits (PaLM: 1e-4); 0 disables it
    z_loss: float = field(default=0.0, metadata={"min": 0})
    # fraction of the target probability distributed evenly over the vocabulary
    label_smoothing: float = field(default=0.0, metadata={"min": 0, "below": 1})
    dft: bool = False  # weight each token by its probability: dynamic fine-tuning (arXiv 2508.05629)
    # tokens per row whose logits exist at once; >= data.seq_len: all
    loss_chunk_size: int = field(default=128, metadata={"min": 1})

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(is_token_wise=True, masks=(AttentionMask.causal, AttentionMask.prefix))

    def build(self, token_bytes: np.ndarray | None) -> "NextToken":
        """Raises: ValueError if keys are incompatible."""
        if self.dft and self.label_smoothing:
            raise ValueError(
                f"objective.label_smoothing={self.label_smoothing}: cannot be combined with objective.dft=true, which "
                "weights only the target; remove one of them"
            )
        return NextToken(self, token_bytes)


@dataclass(frozen=True)
class NextToken(Objective):
    """Next-token loss.

    Metrics: `nll` (cross entropy without smoothing or z-loss), `accuracy`, `bytes` per token if known, and router
    metrics of MoE models.
    """

    config: NextTokenConfig
    token_bytes: np.ndarray | None  # [V] i32

    def compute_loss(self, inputs: LossInputs) -> Losses:
        return self.of_output(inputs.forward(), inputs.batch)

    def of_output(self, output: ModelOutput, batch: TokenBatch) -> Losses:
        """Returns loss and metrics from the output of a forward pass."""
        mask_BL = batch.loss_mask.astype(jnp.float32)
        weight = jnp.sum(mask_BL)
        of_token = partial(_token_loss, self.config)
        total, tokens = chunked_loss(of_token, output, batch.targets, mask_BL, chunk=self.config.loss_chunk_size)

        def mean(values_BL: jax.Array) -> Mean:
            return Mean(jnp.sum(values_BL * mask_BL), weight)

        auxiliary_BL, router = auxiliary_terms(output, mask_BL.shape)
        metrics = {"nll": mean(-tokens.logprob), "accuracy": mean(tokens.correct.astype(jnp.float32))}
        if self.token_bytes is not None:
            metrics["bytes"] = mean(jnp.asarray(self.token_bytes, jnp.float32)[batch.targets])
        metrics |= {name: mean(values_BL) for name, values_BL in router.items()}
        return Mean(total + mean(auxiliary_BL).total, weight), metrics


def _token_loss(config: NextTokenConfig, tokens: TokenLogprobs) -> jax.Array:
    """Returns the loss per token."""
    loss = nll = -tokens.logprob
    if smoothing := config.label_smoothing:
        uniform = tokens.logsumexp - tokens.mean_logit
        loss = (1 - smoothing) * nll + smoothing * uniform
    if config.dft:
        loss = jax.lax.stop_gradient(jnp.exp(tokens.logprob)) * nll
    if config.z_loss:
        loss = loss + config.z_loss * jnp.square(tokens.logsumexp)
    return loss
