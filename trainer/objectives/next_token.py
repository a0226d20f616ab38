"""Cross entropy on the next token: pretraining and supervised fine-tuning, which differ in the mask only."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch
from models.transformer import Apply, ModelOutput
from trainer.objective import Mean, ObjectiveConfig, Params, token_spec
from trainer.objectives.cross_entropy import TokenLogprobs, chunked_loss
from trainer.objectives.moe_losses import auxiliary_terms


@dataclass
class NextTokenConfig(ObjectiveConfig):
    """Its build checks the values."""

    kind: str = "next_token"
    z_loss: float = 0.0  # times the squared logsumexp of the logits, which keeps them near 0 (PaLM: 1e-4)
    label_smoothing: float = 0.0  # share of the target's probability spread evenly over the vocabulary
    dft: bool = False  # weigh each token by its own probability: dynamic fine-tuning (arXiv 2508.05629)
    loss_chunk_size: int = 128  # tokens of each row whose logits exist at once; the length or more: all

    @property
    def by_token(self) -> bool:
        return True

    def build(self, token_bytes: np.ndarray | None) -> "NextToken":
        """Raises: ValueError naming the key of a value that cannot be."""
        if self.loss_chunk_size < 1:
            raise ValueError(f"objective.loss_chunk_size={self.loss_chunk_size}: must be at least 1; nearest valid: 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"objective.label_smoothing={self.label_smoothing}: must be at least 0 and below 1")
        if self.dft and self.label_smoothing:
            raise ValueError(
                f"objective.label_smoothing={self.label_smoothing}: objective.dft=true weighs the target alone; leave "
                "one of them out"
            )
        if self.z_loss < 0:
            raise ValueError(f"objective.z_loss={self.z_loss}: must not be negative; 0 turns it off")
        return NextToken(self, token_bytes)


@dataclass(frozen=True)
class NextToken:
    """Metrics beside the loss: `nll` (plain cross entropy), `accuracy`, `bytes` per token where known, and those of
    the router where the model has experts.
    """

    config: NextTokenConfig
    token_bytes: np.ndarray | None  # [V] i32

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: TokenBatch,
        rng: jax.Array | None,
    ) -> tuple[Mean, dict[str, Mean]]:
        output = apply(params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids, rng=rng)
        return self.of_output(output, batch)

    def of_output(self, output: ModelOutput, batch: TokenBatch) -> tuple[Mean, dict[str, Mean]]:
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

    def batch_spec(self, batch_size: int, seq_len: int) -> TokenBatch:
        return token_spec(batch_size, seq_len)


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
