"""Cross entropy on the next token and on further ones (DeepSeek-V3 2024, section 2.2).

Shape letters: K modules, B batch, L length.
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
    """How many tokens: `model.mtp_num_layers`."""

    kind: str = "multi_token"
    # Of the mean over further tokens: DeepSeek-V3, 0.3 at first and 0.1 at last
    weight: float = field(default=0.3, metadata={"min": 0})

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(masks=(AttentionMask.causal,), multi_token=True)  # modules read their neighbours

    def build(self, token_bytes: np.ndarray | None) -> "MultiToken":
        super().build(token_bytes)
        return MultiToken(self, token_bytes)


@dataclass(frozen=True)
class MultiToken(NextToken):
    """Metrics beside those of the next token: `nll_2`, `accuracy_2` of the token after it, and so on."""

    config: MultiTokenConfig

    def compute_loss(self, inputs: LossInputs) -> Losses:
        """As in equations 24 and 25, further tokens are divided by the count of next ones."""
        batch, output = inputs.batch, inputs.forward(further=True)
        loss, metrics = self.of_output(output, batch)
        further_KBLD = output.further_KBLD
        assert further_KBLD is not None
        total = jnp.zeros(())
        for k, hidden_BLD in enumerate(further_KBLD, 1):
            targets_BL, mask_BL = further_targets(batch, k)
            found = token_logprobs(
                output._replace(hidden_BLD=hidden_BLD), targets_BL, chunk=self.config.loss_chunk_size
            )
            nll, weight = jnp.sum(-found.logprob * mask_BL), jnp.sum(mask_BL)
            total = total + nll
            metrics[f"nll_{k + 1}"] = Mean(nll, weight)
            metrics[f"accuracy_{k + 1}"] = Mean(jnp.sum(found.correct * mask_BL), weight)
        share = self.config.weight / len(further_KBLD)
        return loss._replace(total=loss.total + share * total), metrics


def further_targets(batch: TokenBatch, k: int) -> tuple[jax.Array, jax.Array]:
    """(targets, mask) [B, L] of the token k + 1 places on; masked where that lies in another document, or in none."""
    ahead = lambda field_BL: jnp.roll(jnp.asarray(field_BL), -k, axis=1)
    inside_L = jnp.arange(batch.tokens.shape[1]) < batch.tokens.shape[1] - k
    same_BL = (ahead(batch.segment_ids) == batch.segment_ids) & inside_L[None]
    return ahead(batch.targets), jnp.where(same_BL, ahead(batch.loss_mask), 0.0).astype(jnp.float32)
