"""Reward models: one number for an answer, higher for the better of two (Bradley & Terry 1952; Ouyang et al. 2022).

Numbers in brackets are arXiv's.

Shape letters: B pairs, S sides (0 chosen, 1 rejected), L length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import ColumnBatch, TokenBatch, columns_of, flat_rows
from data.examples import Records
from models.transformer import Apply
from trainer.objective import Mean, ObjectiveConfig, Params, token_spec
from trainer.objectives.readout import Pooling, at_end, scores


@dataclass
class RewardConfig(ObjectiveConfig):
    """Its build checks the values."""

    kind: str = "reward"
    centering: float = 0.01  # times the square of a pair's summed rewards, which keeps them near 0 [2312.09244]
    margins: bool = False  # records say in "margin" how much better the chosen answer is [2307.09288, section 3.2.2]

    @property
    def of_tokens(self) -> bool:
        return False

    @property
    def records(self) -> tuple[Records, ...]:
        return (Records.pairs,)

    @property
    def reads_margins(self) -> bool:
        return self.margins

    def outputs(self, num_classes: int) -> int:
        return 1

    def build(self, token_bytes: np.ndarray | None) -> "Reward":
        """Raises: ValueError naming the key of a value that cannot be."""
        if self.centering < 0:
            raise ValueError(f"objective.centering={self.centering}: must not be negative; 0 turns it off")
        return Reward(self)


def bradley_terry(reward_BS: jax.Array, margin_B: jax.Array) -> jax.Array:
    """[B]: the negative logarithm of the probability that the chosen answer is preferred, by `margin_B` at least."""
    return -jax.nn.log_sigmoid(reward_BS[:, 0] - reward_BS[:, 1] - margin_B)


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
        flat = flat_rows(batch)
        output = apply(params, flat.tokens, positions_BL=flat.positions, segment_ids_BL=flat.segment_ids, rng=rng)
        reward_BS = at_end(scores(output, flat, Pooling.last), flat.segment_ids).reshape(-1, 2)
        length_BS = (batch.segment_ids > 0).sum(-1)
        real_B = jnp.all(length_BS > 0, axis=-1)
        margin_B = columns_of(batch).get("margin", jnp.zeros_like(reward_BS[:, 0]))
        loss_B = bradley_terry(reward_BS, margin_B) + self.config.centering * jnp.square(reward_BS.sum(-1))
        right_B = (reward_BS[:, 0] > reward_BS[:, 1]).astype(jnp.float32)

        mean = lambda values_B, counted_B=real_B: Mean.of(values_B, counted_B)
        metrics = {
            "reward_margin": mean(reward_BS[:, 0] - reward_BS[:, 1]),
            "reward_accuracy": mean(right_B),
            "reward_chosen": mean(reward_BS[:, 0]),
            "reward_rejected": mean(reward_BS[:, 1]),
            "reward_accuracy_longer": mean(right_B, real_B & (length_BS[:, 0] > length_BS[:, 1])),
            "reward_accuracy_shorter": mean(right_B, real_B & (length_BS[:, 0] < length_BS[:, 1])),
        }
        if output.auxiliary is not None:  # of the router: once a pair, not once a side
            of_pairs = lambda values: values.reshape(-1, 2).mean(-1)
            loss_B = loss_B + of_pairs(output.auxiliary.loss_B)
            metrics |= {name: mean(of_pairs(values)) for name, values in output.auxiliary.metrics.items()}
        return mean(loss_B), metrics

    def batch_spec(self, batch_size: int, seq_len: int) -> TokenBatch | ColumnBatch:
        spec = token_spec(batch_size, 2, seq_len)
        margin = jax.ShapeDtypeStruct((batch_size,), np.float32)
        return ColumnBatch(*spec, {"margin": margin}) if self.config.margins else spec

    def read(self, apply: Apply, params: Params, batch: TokenBatch) -> jax.Array:
        """[B, 1] f32: the reward of each row, which holds one text."""
        output = apply(params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids)
        return at_end(scores(output, batch, Pooling.last), batch.segment_ids)
