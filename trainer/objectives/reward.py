"""Reward models trained on preference pairs (Bradley & Terry 1952; Ouyang et al. 2022).

Numbers in brackets are arXiv's.

Shape letters: B rows, S sides (0 chosen, 1 rejected), L length, P pairs.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch, flat_rows
from data.records.encoding import DataFormat, DataNeeds
from models.config import AttentionMask
from models.transformer import ModelOutput
from trainer.objective import Losses, LossInputs, Mean, ModelNeeds, Objective, ObjectiveConfig
from trainer.objectives.pooling import Pooling, at_end, at_ends, scores
from trainer.objectives.segment_ops import of_rows, of_texts, summed


@dataclass
class RewardConfig(ObjectiveConfig):
    kind: str = "reward"
    # weight of the squared sum of a pair's rewards, which centers rewards at 0 [2312.09244]; 0 disables it
    center_rewards_coefficient: float = field(default=0.01, metadata={"min": 0})
    margins: bool = False  # read the minimum reward difference from the field "margin" [2307.09288, section 3.2.2]
    # maximum pairs packed into a row; 1: pad each pair to its own row
    pairs_per_row: int = field(default=1, metadata={"min": 1})

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds(
            (DataFormat.preference,), phase="reward", margins=self.margins, pairs_per_row=self.pairs_per_row
        )

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(num_labels=1, is_token_level=False, masks=(AttentionMask.causal, AttentionMask.bidirectional))

    def build(self, token_bytes: np.ndarray | None) -> "Reward":
        return Reward(self)


def bradley_terry(reward_PS: jax.Array, margin_P: jax.Array) -> jax.Array:
    """Returns the negative log-probability [P] that the chosen answer is preferred by at least `margin_P`."""
    return -jax.nn.log_sigmoid(reward_PS[:, 0] - reward_PS[:, 1] - margin_P)


@dataclass(frozen=True)
class Reward(Objective):
    """Reward loss over batches [B, 2, L] of a model with one output, read at the last token of an answer.

    Metrics, means over pairs: `reward_margin`, `reward_accuracy` (strictly larger), `reward_chosen`, `reward_rejected`,
    and `reward_accuracy_longer`, `reward_accuracy_shorter` over pairs whose chosen answer is longer or shorter: a large
    gap between them indicates length bias.
    """

    config: RewardConfig

    def compute_loss(self, inputs: LossInputs) -> Losses:
        batch, flat, per_row = inputs.batch, flat_rows(inputs.batch), self.config.pairs_per_row
        output = inputs.forward(flat)
        ends_RN = at_ends(scores(output, flat, Pooling.last), flat.segment_ids, per_row)[..., 0]
        reward_PS = of_texts(ends_RN.reshape(-1, 2, per_row))
        length_PS = summed(jnp.ones_like(batch.segment_ids), batch.segment_ids, per_row)
        real_P = jnp.all(length_PS > 0, axis=-1)
        margin_P = inputs.columns.get("margin", jnp.zeros_like(reward_PS[:, 0])).reshape(-1)
        loss_P = bradley_terry(reward_PS, margin_P) + self.config.center_rewards_coefficient * jnp.square(
            reward_PS.sum(-1)
        )
        correct_P = (reward_PS[:, 0] > reward_PS[:, 1]).astype(jnp.float32)

        mean = lambda values_P, counted_P=real_P: Mean.of(values_P, counted_P)
        metrics = {
            "reward_margin": mean(reward_PS[:, 0] - reward_PS[:, 1]),
            "reward_accuracy": mean(correct_P),
            "reward_chosen": mean(reward_PS[:, 0]),
            "reward_rejected": mean(reward_PS[:, 1]),
            "reward_accuracy_longer": mean(correct_P, real_P & (length_PS[:, 0] > length_PS[:, 1])),
            "reward_accuracy_shorter": mean(correct_P, real_P & (length_PS[:, 0] < length_PS[:, 1])),
        }
        if output.auxiliary is not None:  # router losses count once per pair, not per side
            loss_P = loss_P + of_rows(output.auxiliary.loss_B, per_row)
            metrics |= {name: mean(of_rows(values, per_row)) for name, values in output.auxiliary.metrics.items()}
        return mean(loss_P), metrics

    def score_texts(self, output: ModelOutput, batch: TokenBatch) -> jax.Array:
        """Returns rewards [B, 1] f32 for rows of one text each."""
        return at_end(scores(output, batch, Pooling.last), batch.segment_ids)

    def describe_output(self, values: list[float], classes: list[str]) -> dict[str, Any]:
        return {"reward": values[0]}
