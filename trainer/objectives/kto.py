"""KTO on unpaired preferences (Ethayarajh et al. 2024 [2402.01306], section 4.1).

Batches are [B, 2, L]: side 0 is a prompt with its completion, side 1 the same prompt with the completion of another
record. The KL baseline z0 is estimated from these mismatched pairs, clipped at 0, without a gradient. It is a mean over
the microbatch across all devices, so the loss depends on the microbatch size.

Shape letters: B answers, S sides, L length.
"""

import enum
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid

from data.batch import TokenBatch
from data.records.encoding import DataFormat, DataNeeds
from models.config import AttentionMask
from trainer.objective import (
    REFERENCE,
    Columns,
    FrozenModelSpec,
    FrozenNeeds,
    Losses,
    LossInputs,
    Mean,
    ModelNeeds,
    Objective,
    ObjectiveConfig,
)
from trainer.objectives.cross_entropy import token_logprobs

LABEL = "label"  # column [B] f32: 1 for a desirable answer, 0 otherwise


class Loss(enum.Enum):
    kto = "kto"
    apo_zero = "apo_zero"  # z0 = 0: raises desirable answers, lowers undesirable ones [2408.06266]


@dataclass
class KtoConfig(ObjectiveConfig):
    kind: str = "kto"
    loss_type: Loss = Loss.kto  # loss function
    # strength of the KL regularization: larger values keep the policy closer to the reference
    beta: float = field(default=0.1, metadata={"above": 0})
    # loss weight of desirable answers; with n desirable and m undesirable answers, choose the weights such that
    # n desirable_weight / (m undesirable_weight) is between 1 and 4/3
    desirable_weight: float = field(default=1.0, metadata={"min": 0})
    undesirable_weight: float = field(default=1.0, metadata={"min": 0})  # loss weight of undesirable answers
    # compute reference log-probabilities once before training and cache them on disk
    precompute_ref_log_probs: bool = False
    loss_chunk_size: int = field(default=128, metadata={"min": 1})  # tokens per row whose logits exist at once

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds(formats=(DataFormat.unpaired_preference,), phase="kto")

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(masks=(AttentionMask.causal,))

    @property
    def frozen_needs(self) -> FrozenNeeds:
        return FrozenNeeds({REFERENCE: FrozenModelSpec(precompute=self.precompute_ref_log_probs)})

    def build(self, token_bytes: np.ndarray | None) -> "Kto":
        return Kto(self)


def losses(ratios_B: jax.Array, good_B: jax.Array, z0: jax.Array, config: KtoConfig) -> jax.Array:
    """Returns the loss [B] of each answer from its log-ratio, its label (1: desirable) and z0."""
    z0 = z0 if config.loss_type is Loss.kto else jnp.zeros_like(z0)
    up_B, down_B = (1 - sigmoid(config.beta * sign * (ratios_B - z0)) for sign in (1, -1))
    return jnp.where(good_B > 0, config.desirable_weight * up_B, config.undesirable_weight * down_B)


@dataclass(frozen=True)
class Kto(Objective):
    """KTO loss. The reference is a frozen model with the policy's architecture.

    Metrics: `z0`; over desirable and undesirable answers separately `reward_good`, `reward_bad` (beta times the
    log-ratio) and `logprob_good`, `logprob_bad` (summed over tokens). Each answer has weight 1, regardless of length.
    """

    config: KtoConfig

    def compute_loss(self, inputs: LossInputs) -> Losses:
        c, batch, columns = self.config, inputs.batch, inputs.columns
        computed = columns if REFERENCE in columns else self.compute_columns(inputs)
        reference_BS = jax.lax.stop_gradient(computed[REFERENCE])
        policy_B, auxiliary_B = self._answers(inputs, 0)
        real_B = (batch.loss_mask[:, 0].sum(-1) > 0).astype(jnp.float32)
        mean = lambda values_B, of_B=real_B: Mean.of(values_B, of_B)
        z0 = jnp.zeros(())
        if c.loss_type is Loss.kto:
            mismatched_B, _ = self._answers(inputs._replace(params=jax.lax.stop_gradient(inputs.params), rng=None), 1)
            z0 = jnp.maximum(mean(mismatched_B - reference_BS[:, 1]).value(), 0)
        ratios_B, good_B = policy_B - reference_BS[:, 0], columns[LABEL].astype(jnp.float32)
        metrics = {"z0": mean(jnp.broadcast_to(z0, real_B.shape))}
        for name, of_B in (("good", real_B * good_B), ("bad", real_B * (1 - good_B))):
            metrics |= {f"reward_{name}": mean(c.beta * ratios_B, of_B), f"logprob_{name}": mean(policy_B, of_B)}
        return mean(losses(ratios_B, good_B, z0, c) + auxiliary_B), metrics

    def _answers(self, inputs: LossInputs, side: int) -> tuple[jax.Array, jax.Array]:
        """Returns ([B] summed log-probability of the answers of one side, [B] auxiliary loss of MoE layers)."""
        batch = TokenBatch(*(column[:, side] for column in inputs.batch))
        output = inputs.forward(batch)
        tokens = token_logprobs(output, batch.targets, chunk=self.config.loss_chunk_size)
        total_B = jnp.sum(jnp.where(batch.loss_mask > 0, tokens.logprob, 0.0), axis=-1)
        return total_B, jnp.zeros_like(total_B) if output.auxiliary is None else output.auxiliary.loss_B

    def compute_columns(self, inputs: LossInputs) -> dict[str, jax.Array]:
        """Returns the summed log-probabilities under the reference, [B, S] f32."""
        sides = [self._answers(inputs.with_frozen(REFERENCE), side)[0] for side in (0, 1)]
        return {REFERENCE: jnp.stack(sides, axis=-1)}

    def column_spec(self, seq_len: int) -> Columns:
        return {REFERENCE: ((2,), np.float32)}
