"""Cross entropy on the next token and on further ones (DeepSeek-V3 2024, section 2.2).

Shape letters: K modules, B batch, L length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch
from models.transformer import Apply
from trainer.objective import Mean, Params, token_spec
from trainer.objectives.cross_entropy import token_logprobs
from trainer.objectives.next_token import NextToken, NextTokenConfig


@dataclass
class MultiTokenConfig(NextTokenConfig):
    """How many tokens: `model.mtp_num_layers`. Its build checks the values."""

    kind: str = "multi_token"
    weight: float = 0.3  # of the mean over further tokens: DeepSeek-V3, 0.3 at first and 0.1 at last

    @property
    def by_token(self) -> bool:
        return False  # modules read their neighbours

    def build(self, token_bytes: np.ndarray | None) -> "MultiToken":
        """Raises: ValueError naming the key of a value that cannot be."""
        if self.weight < 0:
            raise ValueError(f"objective.weight={self.weight}: must not be negative; 0 trains no modules")
        return MultiToken(self, super().build(token_bytes))


@dataclass(frozen=True)
class MultiToken:
    """Metrics beside those of the next token: `nll_2`, `accuracy_2` of the token after it, and so on."""

    config: MultiTokenConfig
    next_token: NextToken

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: TokenBatch,
        rng: jax.Array | None,
    ) -> tuple[Mean, dict[str, Mean]]:
        """As in equations 24 and 25, further tokens are divided by the count of next ones."""
        given = {"positions_BL": batch.positions, "segment_ids_BL": batch.segment_ids}
        output = apply(params, batch.tokens, **given, rng=rng, further=True)
        loss, metrics = self.next_token.of_output(output, batch)
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

    def batch_spec(self, batch_size: int, seq_len: int) -> TokenBatch:
        return token_spec(batch_size, seq_len)


def further_targets(batch: TokenBatch, k: int) -> tuple[jax.Array, jax.Array]:
    """(targets, mask) [B, L] of the token k + 1 places on; masked where that lies in another document, or in none."""
    ahead = lambda field_BL: jnp.roll(jnp.asarray(field_BL), -k, axis=1)
    inside_L = jnp.arange(batch.tokens.shape[1]) < batch.tokens.shape[1] - k
    same_BL = (ahead(batch.segment_ids) == batch.segment_ids) & inside_L[None]
    return ahead(batch.targets), jnp.where(same_BL, ahead(batch.loss_mask), 0.0).astype(jnp.float32)
