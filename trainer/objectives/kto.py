"""Learning from answers that are good or not, each by itself: KTO (Ethayarajh et al. 2024 [2402.01306], section 4.1).

Batches are [B, 2, L]: side 0 a prompt with its answer, side 1 the same prompt with another record's, which tells how
far the policy is from its reference where nothing is meant: z0, at least 0 and without a gradient. It is a mean over
the microbatch, all devices together, so that the size of a microbatch is part of what the loss means.

Shape letters: B answers, S sides, L length.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid

from data.batch import TokenBatch, columns_of, tokens_of
from data.records.encoding import DataFormat
from models.transformer import Apply
from trainer.objective import REFERENCE, Batch, Mean, ObjectiveConfig, Params, column_spec, token_spec
from trainer.objectives.cross_entropy import token_logprobs

LABEL = "label"  # the column [B] f32: 1 where an answer is good


class Loss(enum.Enum):
    kto = "kto"
    apo_zero = "apo_zero"  # the same with z0 = 0: raises what is good, lowers what is not [2408.06266]


@dataclass
class KtoConfig(ObjectiveConfig):
    """Its build checks the values."""

    kind: str = "kto"
    loss_type: Loss = Loss.kto  # Loss of desirable and undesirable answers
    beta: float = 0.1  # how far the policy may leave the reference: larger, less far
    # Where n answers are good and m are not, n desirable_weight / (m undesirable_weight) is best between 1 and 4/3.
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0  # Loss weight of undesirable answers
    precompute_ref_log_probs: bool = (
        False  # ask the reference once about each answer, before training, and keep it on disk
    )
    loss_chunk_size: int = 128  # tokens of each row whose logits exist at once

    @property
    def records(self) -> tuple[DataFormat, ...]:
        return (DataFormat.unpaired_preference,)

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def cached(self) -> str | None:
        return REFERENCE if self.precompute_ref_log_probs else None

    def build(self, token_bytes: np.ndarray | None) -> "Kto":
        """Raises: ValueError naming the key of a value that cannot be."""
        if self.beta <= 0:
            raise ValueError(f"objective.beta={self.beta}: must be above 0")
        for key in ("desirable_weight", "undesirable_weight"):
            if getattr(self, key) < 0:
                raise ValueError(f"objective.{key}={getattr(self, key)}: must not be negative")
        if self.loss_chunk_size < 1:
            raise ValueError(f"objective.loss_chunk_size={self.loss_chunk_size}: must be at least 1")
        return Kto(self)


def losses(ratios_B: jax.Array, good_B: jax.Array, z0: jax.Array, config: KtoConfig) -> jax.Array:
    """[B], of the log-ratio of each answer, whether it is good, and z0."""
    z0 = z0 if config.loss_type is Loss.kto else jnp.zeros_like(z0)
    up_B, down_B = (1 - sigmoid(config.beta * sign * (ratios_B - z0)) for sign in (1, -1))
    return jnp.where(good_B > 0, config.desirable_weight * up_B, config.undesirable_weight * down_B)


@dataclass(frozen=True)
class Kto:
    """An `Objective`. The reference is a frozen model of the policy's own architecture.

    Metrics: `z0`, and over good and bad answers by themselves `reward_good`, `reward_bad` (beta times the log-ratio)
    and `logprob_good`, `logprob_bad` (summed). An answer weighs 1 in the loss, whatever its length.
    """

    config: KtoConfig

    def loss(
        self, apply: Apply, params: Params, frozen: Mapping[str, Any], batch: Batch, rng: jax.Array | None
    ) -> tuple[Mean, dict[str, Mean]]:
        c, columns = self.config, columns_of(batch)
        kept = columns if REFERENCE in columns else self.columns(apply, frozen, batch)
        reference_BS = jax.lax.stop_gradient(kept[REFERENCE])
        policy_B, added_B = self._answers(apply, params, tokens_of(batch), 0, rng)
        real_B = (batch.loss_mask[:, 0].sum(-1) > 0).astype(jnp.float32)
        mean = lambda values_B, of_B=real_B: Mean.of(values_B, of_B)
        z0 = jnp.zeros(())
        if c.loss_type is Loss.kto:
            other_B, _ = self._answers(apply, jax.lax.stop_gradient(params), tokens_of(batch), 1, None)
            z0 = jnp.maximum(mean(other_B - reference_BS[:, 1]).value(), 0)
        ratios_B, good_B = policy_B - reference_BS[:, 0], columns[LABEL].astype(jnp.float32)
        metrics = {"z0": mean(jnp.broadcast_to(z0, real_B.shape))}
        for name, of_B in (("good", real_B * good_B), ("bad", real_B * (1 - good_B))):
            metrics |= {f"reward_{name}": mean(c.beta * ratios_B, of_B), f"logprob_{name}": mean(policy_B, of_B)}
        return mean(losses(ratios_B, good_B, z0, c) + added_B), metrics

    def _answers(
        self, apply: Apply, params: Params, batch: TokenBatch, side: int, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """[B]: the summed log-probability of one side's answers, and what a mixture of experts adds to their loss."""
        one = TokenBatch(*(field[:, side] for field in batch))
        output = apply(params, one.tokens, positions_BL=one.positions, segment_ids_BL=one.segment_ids, rng=rng)
        found = token_logprobs(output, one.targets, chunk=self.config.loss_chunk_size)
        total_B = jnp.sum(jnp.where(one.loss_mask > 0, found.logprob, 0.0), axis=-1)
        return total_B, jnp.zeros_like(total_B) if output.auxiliary is None else output.auxiliary.loss_B

    def columns(self, apply: Apply, frozen: Mapping[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """[B, S] f32: the summed log-probabilities under the reference."""
        sides = [self._answers(apply, frozen[REFERENCE], tokens_of(batch), side, None)[0] for side in (0, 1)]
        return {REFERENCE: jnp.stack(sides, axis=-1)}

    def column_spec(self, seq_len: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {REFERENCE: ((2,), np.float32)}

    def column_settings(self) -> dict[str, Any]:
        return {}

    def batch_spec(self, batch_size: int, seq_len: int) -> Batch:
        kept = self.column_spec(seq_len) if self.config.cached else {}
        return column_spec(token_spec(batch_size, 2, seq_len), {LABEL: ((), np.float32), **kept})
