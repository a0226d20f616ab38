"""Telling hidden tokens from all around them: masked language modelling, and masked diffusion.

Targets are of the same place. A model that is not causal predicts there what a mask hides.

Shape letters: B batch, L length, V vocab.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch
from models.transformer import Apply
from trainer.objective import Mean, ObjectiveConfig, Params, token_spec
from trainer.objectives.cross_entropy import token_logprobs
from trainer.objectives.moe_losses import auxiliary_terms


@dataclass
class MaskedLMConfig(ObjectiveConfig):
    """Cross entropy of the tokens that are hidden (Devlin et al. 2019, section 3.1). Its build checks the values."""

    kind: str = "masked"
    loss_chunk_size: int = 128  # tokens of each row whose logits exist at once; the length or more: all

    @property
    def by_token(self) -> bool:
        return True

    def build(self, token_bytes: np.ndarray | None) -> "Masked":
        """Raises: ValueError naming the key of a value that cannot be."""
        if self.loss_chunk_size < 1:
            raise ValueError(f"objective.loss_chunk_size={self.loss_chunk_size}: must be at least 1; nearest valid: 1")
        return Masked(self.loss_chunk_size)


@dataclass
class MaskedDiffusionConfig(MaskedLMConfig):
    """The bound on the negative log-likelihood that masked diffusion gives (Sahoo et al. 2024, equation 10; Nie et al.
    2025, equation 3): cross entropy of what is masked, weighed by 1 / ratio, over all tokens.
    """

    kind: str = "masked_diffusion"

    def build(self, token_bytes: np.ndarray | None) -> "Masked":
        """Raises: ValueError as `MaskedLMConfig`."""
        super().build(token_bytes)
        return Masked(self.loss_chunk_size, bound=True, token_bytes=token_bytes)


@dataclass(frozen=True)
class Masked:
    """Metrics beside the loss: `nll` (cross entropy; of diffusion the bound), `accuracy` of what is hidden, and of
    diffusion `bytes` per token where known, and those of the router where the model has experts.
    """

    chunk: int
    bound: bool = False
    token_bytes: np.ndarray | None = None  # [V] i32

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: TokenBatch,
        rng: jax.Array | None,
    ) -> tuple[Mean, dict[str, Mean]]:
        output = apply(params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids, rng=rng)
        tokens = token_logprobs(output, batch.targets, chunk=self.chunk)
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

    def batch_spec(self, batch_size: int, seq_len: int) -> TokenBatch:
        return token_spec(batch_size, seq_len)
