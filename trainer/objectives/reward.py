"""Reward models: one number for an answer, higher for the better of two (Bradley & Terry 1952; Ouyang et al. 2022).

Numbers in brackets are arXiv's.

Shape letters: B rows, S sides (0 chosen, 1 rejected), L length, P pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import ColumnBatch, TokenBatch, columns_of, flat_rows
from data.records.encoding import DataFormat
from models.transformer import Apply
from trainer.objective import Mean, ObjectiveConfig, Params, token_spec
from trainer.objectives.pooling import Pooling, at_end, at_ends, scores
from trainer.objectives.segment_ops import check_pairs_per_row, of_rows, of_texts, summed


@dataclass
class RewardConfig(ObjectiveConfig):
    """Its build checks the values."""

    kind: str = "reward"
    center_rewards_coefficient: float = (
        0.01  # times the square of a pair's summed rewards, which keeps them near 0 [2312.09244]
    )
    margins: bool = False  # records say in "margin" how much better the chosen answer is [2307.09288, section 3.2.2]
    pairs_per_row: int = 1  # at most; 1: each is padded to a row of its own

    @property
    def of_tokens(self) -> bool:
        return False

    @property
    def records(self) -> tuple[DataFormat, ...]:
        return (DataFormat.preference,)

    @property
    def per_row(self) -> int:
        return self.pairs_per_row

    @property
    def reads_margins(self) -> bool:
        return self.margins

    def outputs(self, num_classes: int) -> int:
        return 1

    def build(self, token_bytes: np.ndarray | None) -> "Reward":
        """Raises: ValueError naming the key of a value that cannot be."""
        if self.center_rewards_coefficient < 0:
            raise ValueError(
                f"objective.center_rewards_coefficient={self.center_rewards_coefficient}: must not be negative; 0 turns it off"
            )
        check_pairs_per_row(self.pairs_per_row)
        return Reward(self)


def bradley_terry(reward_PS: jax.Array, margin_P: jax.Array) -> jax.Array:
    """[P]: the negative logarithm of the probability that the chosen answer is preferred, by `margin_P` at least."""
    return -jax.nn.log_sigmoid(reward_PS[:, 0] - reward_PS[:, 1] - margin_P)


@dataclass(frozen=True)
class Reward:
    """An `Objective` over batches [B, 2, L] of a model with one output, read at the last token of an answer.

    Metrics, means over pairs: `reward_margin`, `reward_accuracy` (strictly larger), `reward_chosen`, `reward_rejected`,
    and the accuracy among the pairs whose chosen answer is the longer one, and the shorter one: far apart, they tell
    of a model that has learnt to count.
    """

    config: RewardConfig

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: TokenBatch | ColumnBatch,
        rng: jax.Array | None,
    ) -> tuple[Mean, dict[str, Mean]]:
        flat, per_row = flat_rows(batch), self.config.pairs_per_row
        output = apply(params, flat.tokens, positions_BL=flat.positions, segment_ids_BL=flat.segment_ids, rng=rng)
        ends_RN = at_ends(scores(output, flat, Pooling.last), flat.segment_ids, per_row)[..., 0]
        reward_PS = of_texts(ends_RN.reshape(-1, 2, per_row))
        length_PS = summed(jnp.ones_like(batch.segment_ids), batch.segment_ids, per_row)
        real_P = jnp.all(length_PS > 0, axis=-1)
        margin_P = columns_of(batch).get("margin", jnp.zeros_like(reward_PS[:, 0])).reshape(-1)
        loss_P = bradley_terry(reward_PS, margin_P) + self.config.center_rewards_coefficient * jnp.square(
            reward_PS.sum(-1)
        )
        right_P = (reward_PS[:, 0] > reward_PS[:, 1]).astype(jnp.float32)

        mean = lambda values_P, counted_P=real_P: Mean.of(values_P, counted_P)
        metrics = {
            "reward_margin": mean(reward_PS[:, 0] - reward_PS[:, 1]),
            "reward_accuracy": mean(right_P),
            "reward_chosen": mean(reward_PS[:, 0]),
            "reward_rejected": mean(reward_PS[:, 1]),
            "reward_accuracy_longer": mean(right_P, real_P & (length_PS[:, 0] > length_PS[:, 1])),
            "reward_accuracy_shorter": mean(right_P, real_P & (length_PS[:, 0] < length_PS[:, 1])),
        }
        if output.auxiliary is not None:  # of the router: once a pair, not once a side
            loss_P = loss_P + of_rows(output.auxiliary.loss_B, per_row)
            metrics |= {name: mean(of_rows(values, per_row)) for name, values in output.auxiliary.metrics.items()}
        return mean(loss_P), metrics

    def batch_spec(self, batch_size: int, seq_len: int) -> TokenBatch | ColumnBatch:
        spec = token_spec(batch_size, 2, seq_len)
        margin = jax.ShapeDtypeStruct((batch_size, self.config.pairs_per_row), np.float32)
        return ColumnBatch(*spec, {"margin": margin}) if self.config.margins else spec

    def read(self, apply: Apply, params: Params, batch: TokenBatch) -> jax.Array:
        """[B, 1] f32: the reward of each row, which holds one text."""
        output = apply(params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids)
        return at_end(scores(output, batch, Pooling.last), batch.segment_ids)
