"""Cross entropy on the next token: pretraining and supervised fine-tuning, which differ in the mask only."""

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
    # Times the squared logsumexp of the logits, which keeps them near 0 (PaLM: 1e-4); 0: off
    z_loss: float = field(default=0.0, metadata={"min": 0})
    # Share of the target's probability spread evenly over the vocabulary
    label_smoothing: float = field(default=0.0, metadata={"min": 0, "below": 1})
    dft: bool = False  # weigh each token by its own probability: dynamic fine-tuning (arXiv 2508.05629)
    # Tokens of each row whose logits exist at once; the length or more: all
    loss_chunk_size: int = field(default=128, metadata={"min": 1})

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(is_token_wise=True, masks=(AttentionMask.causal, AttentionMask.prefix))

    def build(self, token_bytes: np.ndarray | None) -> "NextToken":
        """Raises: ValueError for keys that do not go together."""
        if self.dft and self.label_smoothing:
            raise ValueError(
                f"objective.label_smoothing={self.label_smoothing}: objective.dft=true weighs the target alone; leave "
                "one of them out"
            )
        return NextToken(self, token_bytes)


@dataclass(frozen=True)
class NextToken(Objective):
    """Metrics beside the loss: `nll` (plain cross entropy), `accuracy`, `bytes` per token where known, and those of
    the router where the model has experts.
    """

    config: NextTokenConfig
    token_bytes: np.ndarray | None  # [V] i32

    def compute_loss(self, inputs: LossInputs) -> Losses:
        return self.of_output(inputs.forward(), inputs.batch)

    def of_output(self, output: ModelOutput, batch: TokenBatch) -> Losses:
        """Loss and metrics of a forward pass over the batch."""
        mask_BL = batch.loss_mask.astype(jnp.float32)
        weight = jnp.sum(mask_BL)
        of_token = partial(_token_loss, self.config)
        total, tokens = chunked_loss(of_token, output, batch.targets, mask_BL, chunk=self.config.loss_chunk_size)

        def mean(values_BL: jax.Array) -> Mean:
            return Mean(jnp.sum(values_BL * mask_BL), weight)

        added_BL, router = auxiliary_terms(output, mask_BL.shape)
        metrics = {"nll": mean(-tokens.logprob), "accuracy": mean(tokens.correct.astype(jnp.float32))}
        if self.token_bytes is not None:
            metrics["bytes"] = mean(jnp.asarray(self.token_bytes, jnp.float32)[batch.targets])
        metrics |= {name: mean(values_BL) for name, values_BL in router.items()}
        return Mean(total + mean(added_BL).total, weight), metrics


def _token_loss(config: NextTokenConfig, tokens: TokenLogprobs) -> jax.Array:
    """The loss of each."""
    loss = nll = -tokens.logprob
    if smoothing := config.label_smoothing:
        uniform = tokens.logsumexp - tokens.mean_logit
        loss = (1 - smoothing) * nll + smoothing * uniform
    if config.dft:
        loss = jax.lax.stop_gradient(jnp.exp(tokens.logprob)) * nll
    if config.z_loss:
        loss = loss + config.z_loss * jnp.square(tokens.logsumexp)
    return loss
