"""Next-token cross entropy with multi-token prediction (DeepSeek-V3 2024, section 2.2).

Shape letters: K modules, B batch, L length, D model.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch
from models.config import AttentionMask
from trainer.objective import Losses, LossInputs, Mean, ModelNeeds
from trainer.objectives.cross_entropy import token_logprobs
from trainer.objectives.next_token import NextToken, NextTokenConfig


@dataclass
class MultiTokenConfig(NextTokenConfig):
    """Next-token loss plus multi-token prediction with `model.mtp_num_layers` modules."""

    kind: str = "multi_token"
    # weight of the multi-token loss, averaged over modules; DeepSeek-V3: 0.3, later 0.1
    weight: float = field(default=0.3, metadata={"min": 0})

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(masks=(AttentionMask.causal,), multi_token=True)  # modules read neighboring tokens

    def build(self, token_bytes: np.ndarray | None) -> "MultiToken":
        super().build(token_bytes)
        return MultiToken(self, token_bytes)


@dataclass(frozen=True)
class MultiToken(NextToken):
    """Multi-token loss. Adds metrics `nll_2`, `accuracy_2` (two tokens ahead), and so on, to those of `NextToken`."""

    config: MultiTokenConfig

    def compute_loss(self, inputs: LossInputs) -> Losses:
        """Divides the loss of each module by the number of next-token targets, as in equations 24 and 25."""
        batch, output = inputs.batch, inputs.forward(mtp=True)
        loss, metrics = self.of_output(output, batch)
        hidden_KBLD = output.mtp_KBLD
        assert hidden_KBLD is not None
        total = jnp.zeros(())
        for k, hidden_BLD in enumerate(hidden_KBLD, 1):
            targets_BL, mask_BL = mtp_targets(batch, k)
            tokens = token_logprobs(
                output._replace(hidden_BLD=hidden_BLD), targets_BL, chunk=self.config.loss_chunk_size
            )
            nll, weight = jnp.sum(-tokens.logprob * mask_BL), jnp.sum(mask_BL)
            total = total + nll
            metrics[f"nll_{k + 1}"] = Mean(nll, weight)
            metrics[f"accuracy_{k + 1}"] = Mean(jnp.sum(tokens.correct * mask_BL), weight)
        weight_per_module = self.config.weight / len(hidden_KBLD)
        return loss._replace(total=loss.total + weight_per_module * total), metrics


def mtp_targets(batch: TokenBatch, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns (targets, mask) [B, L] of the token k + 1 positions ahead; masked beyond the end of the document."""
    ahead = lambda field_BL: jnp.roll(jnp.asarray(field_BL), -k, axis=1)
    valid_L = jnp.arange(batch.tokens.shape[1]) < batch.tokens.shape[1] - k
    same_BL = (ahead(batch.segment_ids) == batch.segment_ids) & valid_L[None]
    return ahead(batch.targets), jnp.where(same_BL, ahead(batch.loss_mask), 0.0).astype(jnp.float32)
