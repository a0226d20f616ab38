"""Preference optimization without a reward model: DPO and related losses, one function each.

A loss receives four summed log-probabilities per pair (chosen and rejected answer, policy and reference) and the
lengths of the answers. Numbers in brackets are arXiv identifiers.

Shape letters: B rows, S sides (0 chosen, 1 rejected), L length, P pairs.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid, sigmoid

from data.batch import TokenBatch, flat_rows
from data.records.encoding import DataFormat, DataNeeds
from models.config import AttentionMask
from models.moe import Auxiliary
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
    Sync,
    means_of,
)
from trainer.objectives.cross_entropy import TokenLogprobs, token_logprobs
from trainer.objectives.pooling import segment_cumsum
from trainer.objectives.segment_ops import of_rows, of_tokens, summed


class Loss(enum.Enum):
    sigmoid = "sigmoid"  # DPO [2305.18290]; with label_smoothing conservative DPO (Mitchell)
    robust = "robust"  # unbiased if a fraction label_smoothing of the labels is flipped [2403.00409]
    hinge = "hinge"  # SLiC and RSO [2305.10425, 2309.06657]
    ipo = "ipo"  # IPO, on log-probabilities per token [2310.12036]
    sigmoid_norm = "sigmoid_norm"  # DPO on log-probabilities per token [2411.15124]
    exo = "exo"  # EXO; requires label_smoothing above 0 [2402.00856]
    nca = "nca"  # NCA [2402.05369]
    bco = "bco"  # BCO with a reward shift of 0 [2404.04656]
    sppo = "sppo"  # SPPO with hard labels [2405.00675]
    aot = "aot"  # AOT: sorted margins within a microbatch [2406.05882]
    aot_unpaired = "aot_unpaired"  # AOT with log-ratios of chosen and rejected answers sorted separately
    apo_zero = "apo_zero"  # APO-zero: raises chosen answers, lowers rejected ones [2408.06266]
    apo_down = "apo_down"  # APO-down: lowers both, the rejected answer more
    discopop = "discopop"  # DiscoPOP: log-ratio modulated loss [2406.08414]
    simpo = "simpo"  # SimPO: log-probabilities per token, no reference [2405.14734]
    cpo = "cpo"  # CPO, no reference [2401.08417]
    orpo = "orpo"  # ORPO: odds ratio per token, no reference; use with nll_weight=1 [2403.07691]


class FDivergence(enum.Enum):
    """f-divergence that regularizes the policy toward the reference [2309.16240]: score of a log-ratio u."""

    reverse_kl = "reverse_kl"  # u
    forward_kl = "forward_kl"  # 1 - e^-u
    jensen_shannon = "jensen_shannon"  # log 2 + log sigmoid(u)


OF_MARGINS = (Loss.sigmoid, Loss.robust, Loss.hinge, Loss.ipo, Loss.sigmoid_norm, Loss.exo, Loss.discopop)
FREE_OF_REFERENCE = (Loss.simpo, Loss.cpo, Loss.orpo)


@dataclass
class PreferenceConfig(ObjectiveConfig):
    kind: str = "preference"
    loss_type: Loss = Loss.sigmoid  # preference loss
    # strength of the regularization: larger values keep the policy closer to the reference
    beta: float = field(default=0.1, metadata={"above": 0})
    f_divergence: FDivergence = FDivergence.reverse_kl  # f-divergence of sigmoid, robust, hinge, ipo, exo, discopop
    # assumed fraction of flipped labels, with sigmoid, robust, exo and aot
    label_smoothing: float = field(default=0.0, metadata={"min": 0, "below": 0.5})
    simpo_gamma: float = 1.0  # target reward margin of simpo
    tau: float = field(default=0.05, metadata={"above": 0})  # modulation temperature of discopop
    # weight of the negative log-likelihood per token of chosen answers [2404.19733]; 0 disables it
    nll_weight: float = field(default=0.0, metadata={"min": 0})
    nll_on_prompt: bool = False  # include the prompt in the negative log-likelihood, as in TRL's ORPO
    # weight of tokens beyond the length of the shorter answer [LD-DPO, 2409.06411]; 1 disables it
    ld_alpha: float = field(default=1.0, metadata={"min": 0, "max": 1})
    use_weighting: bool = False  # weight pairs by their likelihood under the policy [WPO, 2406.11827]
    # updates between synchronizations of the reference with the policy [TR-DPO, 2404.09656]; 0: never
    ref_model_sync_steps: int = field(default=0, metadata={"min": 0})
    # weight of the policy in a synchronization
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"above": 0, "max": 1})
    # compute reference log-probabilities once before training and cache them on disk
    precompute_ref_log_probs: bool = False
    # maximum pairs packed into a row; 1: pad each pair to its own row
    pairs_per_row: int = field(default=1, metadata={"min": 1})
    loss_chunk_size: int = field(default=128, metadata={"min": 1})  # tokens per row whose logits exist at once

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds((DataFormat.preference,), phase="dpo", pairs_per_row=self.pairs_per_row)

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(masks=(AttentionMask.causal,))

    @property
    def has_reference(self) -> bool:
        return self.loss_type not in FREE_OF_REFERENCE

    @property
    def frozen_needs(self) -> FrozenNeeds:
        if not self.has_reference:
            return FrozenNeeds()
        sync = Sync(self.ref_model_sync_steps, self.ref_model_mixup_alpha) if self.ref_model_sync_steps else None
        return FrozenNeeds({REFERENCE: FrozenModelSpec(precompute=self.precompute_ref_log_probs, sync=sync)})

    def build(self, token_bytes: np.ndarray | None) -> "Preference":
        """Raises: ValueError if keys are incompatible."""
        smoothing, name = self.label_smoothing, self.loss_type.name
        if self.loss_type is Loss.exo and smoothing < 1e-9:
            raise ValueError(
                f"objective.label_smoothing={smoothing}: must be above 0 with objective.loss_type=exo; the paper uses "
                "0.001"
            )
        if smoothing and self.loss_type not in (Loss.sigmoid, Loss.robust, Loss.exo, Loss.aot, Loss.aot_unpaired):
            raise ValueError(
                f"objective.label_smoothing={smoothing}: not supported with objective.loss_type={name}; use 0"
            )
        if self.f_divergence is not FDivergence.reverse_kl and self.loss_type not in OF_MARGINS:
            known = ", ".join(loss.name for loss in OF_MARGINS)
            raise ValueError(
                f"objective.f_divergence={self.f_divergence.name}: not supported with objective.loss_type={name}; use "
                f"reverse_kl, or objective.loss_type={known}"
            )
        for key in ("precompute_ref_log_probs", "ref_model_sync_steps"):
            if getattr(self, key) and not self.has_reference:
                raise ValueError(
                    f"objective.{key}={getattr(self, key)}: objective.loss_type={name} has no reference; remove the key"
                )
        if self.precompute_ref_log_probs and self.ref_model_sync_steps:
            raise ValueError(
                f"objective.ref_model_sync_steps={self.ref_model_sync_steps}: log-probabilities of a synchronized "
                "reference cannot be precomputed; use 0, or objective.precompute_ref_log_probs=false"
            )
        if self.use_weighting and self.loss_type in (Loss.aot, Loss.aot_unpaired):
            raise ValueError(
                f"objective.use_weighting=true: objective.loss_type={name} sorts log-ratios, so it has no pairs to "
                "weight; use false"
            )
        return Preference(self)


class Pairs(NamedTuple):
    """Summed log-probabilities of answers and their lengths in tokens, [P, S] f32."""

    policy: jax.Array
    reference: jax.Array  # 0 for losses without a reference
    lengths: jax.Array

    @property
    def real(self) -> jax.Array:
        """[P] bool: False for missing pairs of rows that are not full."""
        return jnp.all(self.lengths > 0, axis=-1)

    @property
    def ratios(self) -> jax.Array:
        return self.policy - self.reference

    def per_token(self) -> "Pairs":
        lengths = jnp.maximum(self.lengths, 1)
        return Pairs(self.policy / lengths, self.reference / lengths, lengths)


def margin(values_PS: jax.Array) -> jax.Array:
    return values_PS[:, 0] - values_PS[:, 1]


def apply_f_divergence(pairs: Pairs, kind: FDivergence) -> Pairs:
    """Replaces the policy by the f-divergence scores of the log-ratios, and the reference by 0."""
    if kind is FDivergence.reverse_kl:
        return pairs
    js = kind is FDivergence.jensen_shannon
    score = (lambda u: np.log(2) + log_sigmoid(u)) if js else lambda u: 1 - jnp.exp(-u)
    return pairs._replace(policy=score(pairs.ratios), reference=jnp.zeros_like(pairs.reference))


def smoothed(z_P: jax.Array, smoothing: float) -> jax.Array:
    return -(1 - smoothing) * log_sigmoid(z_P) - smoothing * log_sigmoid(-z_P)


def _sigmoid(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    return smoothed(c.beta * margin(pairs.ratios), c.label_smoothing)


def _robust(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    z_P, e = c.beta * margin(pairs.ratios), c.label_smoothing
    return (-(1 - e) * log_sigmoid(z_P) + e * log_sigmoid(-z_P)) / (1 - 2 * e)


def _hinge(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    return jax.nn.relu(1 - c.beta * margin(pairs.ratios))


def _ipo(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    return jnp.square(margin(pairs.per_token().ratios) - 1 / (2 * c.beta))


def _sigmoid_norm(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    return -log_sigmoid(c.beta * margin(pairs.per_token().ratios))


def _exo(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    z_P, e = c.beta * margin(pairs.ratios), c.label_smoothing
    return sigmoid(z_P) * (log_sigmoid(z_P) - np.log1p(-e)) + sigmoid(-z_P) * (log_sigmoid(-z_P) - np.log(e))


def _nca(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    chosen_P, rejected_P = (c.beta * pairs.ratios).T
    return -log_sigmoid(chosen_P) - 0.5 * log_sigmoid(-chosen_P) - 0.5 * log_sigmoid(-rejected_P)


def _bco(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    chosen_P, rejected_P = (c.beta * pairs.ratios).T
    return -log_sigmoid(chosen_P) - log_sigmoid(-rejected_P)


def _sppo(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    chosen_P, rejected_P = pairs.ratios.T
    return jnp.square(chosen_P - 0.5 / c.beta) + jnp.square(rejected_P + 0.5 / c.beta)


def _ranked(values_P: jax.Array, real_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (values in ascending order, their original indices); missing pairs come last, with equal values."""
    values_P = jnp.where(real_P, values_P, jnp.finfo(values_P.dtype).max)
    order_P = jnp.argsort(values_P)
    return values_P[order_P], order_P


def _ranked_difference(upper_P: jax.Array, lower_P: jax.Array, real_P: jax.Array) -> jax.Array:
    """Returns the differences between values of equal rank, at the indices of `upper_P`."""
    (upper_P, order_P), (lower_P, _) = _ranked(upper_P, real_P), _ranked(lower_P, real_P)
    return jnp.zeros_like(upper_P).at[order_P].set(upper_P - lower_P)


def _aot(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    margins = margin(pairs.policy), margin(pairs.reference)
    return smoothed(c.beta * _ranked_difference(*margins, pairs.real), c.label_smoothing)


def _aot_unpaired(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    chosen_P, rejected_P = pairs.ratios.T
    return smoothed(c.beta * _ranked_difference(chosen_P, rejected_P, pairs.real), c.label_smoothing)


def _apo_zero(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    chosen_P, rejected_P = (c.beta * pairs.ratios).T
    return 1 - sigmoid(chosen_P) + sigmoid(rejected_P)


def _apo_down(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    return sigmoid(c.beta * pairs.ratios[:, 0]) + 1 - sigmoid(c.beta * margin(pairs.ratios))


def _discopop(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    z_P = c.beta * margin(pairs.ratios)
    modulation_P = sigmoid(z_P / c.tau)
    return -(1 - modulation_P) * log_sigmoid(z_P) + modulation_P * jnp.exp(-z_P)


def _simpo(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    return -log_sigmoid(c.beta * margin(pairs.per_token().policy) - c.simpo_gamma)


def _cpo(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    return -log_sigmoid(c.beta * margin(pairs.policy))


def _orpo(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    mean_PS = jnp.minimum(pairs.per_token().policy, -1e-7)  # the odds of probability 1 are infinite
    return -c.beta * log_sigmoid(margin(mean_PS) - margin(log1mexp(mean_PS)))


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x) for x < 0, stable at both ends (Mächler 2012)."""
    near = x > -np.log(2)
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


LOSSES: dict[Loss, Callable[[Pairs, PreferenceConfig], jax.Array]] = {
    Loss.sigmoid: _sigmoid,
    Loss.robust: _robust,
    Loss.hinge: _hinge,
    Loss.ipo: _ipo,
    Loss.sigmoid_norm: _sigmoid_norm,
    Loss.exo: _exo,
    Loss.nca: _nca,
    Loss.bco: _bco,
    Loss.sppo: _sppo,
    Loss.aot: _aot,
    Loss.aot_unpaired: _aot_unpaired,
    Loss.apo_zero: _apo_zero,
    Loss.apo_down: _apo_down,
    Loss.discopop: _discopop,
    Loss.simpo: _simpo,
    Loss.cpo: _cpo,
    Loss.orpo: _orpo,
}


@dataclass(frozen=True)
class Preference(Objective):
    """Preference loss over batches [B, 2, L] with up to `pairs_per_row` pairs per row.

    The reference is a frozen model with the policy's architecture.

    Metrics, means over pairs: `reward_margin`, `reward_accuracy` (strictly larger), `reward_chosen` and
    `reward_rejected` (beta times the log-ratio to the reference), `logprob_chosen` and `logprob_rejected` (summed over
    tokens), `length_chosen` and `length_rejected`. Each pair has weight 1, regardless of its length.
    """

    config: PreferenceConfig

    def compute_loss(self, inputs: LossInputs) -> Losses:
        c, batch = self.config, inputs.batch
        policy, terms = self._forward(inputs)
        policy_PS = self._total(policy, batch)
        reference_PS = jnp.zeros_like(policy_PS)
        if c.has_reference:
            computed = inputs.columns if REFERENCE in inputs.columns else self.compute_columns(inputs)
            reference_PS = jax.lax.stop_gradient(computed[REFERENCE]).reshape(-1, 2)
        pairs = Pairs(policy_PS, reference_PS, self._summed(batch.loss_mask, batch))
        mean = lambda values_P: Mean.of(values_P, pairs.real)
        loss_P = LOSSES[c.loss_type](apply_f_divergence(pairs, c.f_divergence), c)
        if c.use_weighting:
            loss_P = loss_P * self._wpo_weights(policy, batch)
        if c.nll_weight:
            loss_P = loss_P + c.nll_weight * self._nll(policy, batch)
        reward_PS = c.beta * (pairs.per_token().policy if c.loss_type is Loss.simpo else pairs.ratios)
        metrics = {"reward_margin": margin(reward_PS), "reward_accuracy": (margin(reward_PS) > 0).astype(jnp.float32)}
        for side, name in enumerate(("chosen", "rejected")):
            of_side = {"reward": reward_PS, "logprob": policy_PS, "length": pairs.lengths}
            metrics |= {f"{key}_{name}": values_PS[:, side] for key, values_PS in of_side.items()}
        if terms is not None:  # router losses count once per pair, not per side
            loss_P = loss_P + of_rows(terms.loss_B, c.pairs_per_row)
            metrics |= {name: of_rows(values, c.pairs_per_row) for name, values in terms.metrics.items()}
        return mean(loss_P), means_of(metrics, pairs.real)

    def compute_columns(self, inputs: LossInputs) -> dict[str, jax.Array]:
        """Returns the summed log-probabilities of each pair under the reference, [B, N, S] f32."""
        tokens, _ = self._forward(inputs.with_frozen(REFERENCE))
        return {REFERENCE: self._total(tokens, inputs.batch).reshape(-1, self.config.pairs_per_row, 2)}

    def column_spec(self, seq_len: int) -> Columns:
        return {REFERENCE: ((self.config.pairs_per_row, 2), np.float32)}

    def column_settings(self) -> dict[str, Any]:
        return {"length_weight": self.config.ld_alpha, "pairs_per_row": self.config.pairs_per_row}

    def _summed(self, values_BSL: jax.Array, batch: TokenBatch) -> jax.Array:
        """Returns sums [P, S] over the tokens of each answer."""
        return summed(values_BSL.astype(jnp.float32), batch.segment_ids, self.config.pairs_per_row)

    def _total(self, tokens: TokenLogprobs, batch: TokenBatch) -> jax.Array:
        """Returns the log-probability of each answer, [P, S]."""
        weight_BSL = batch.loss_mask.astype(jnp.float32) * self._ld_weights(batch)
        return self._summed(jnp.where(weight_BSL > 0, tokens.logprob * weight_BSL, 0.0), batch)

    def _forward(self, inputs: LossInputs) -> tuple[TokenLogprobs, Auxiliary | None]:
        """Returns (statistics per target [B, S, L], auxiliary MoE terms per row and side [B S])."""
        shape, flat = inputs.batch.tokens.shape, flat_rows(inputs.batch)
        output = inputs.forward(flat)
        tokens = token_logprobs(output, flat.targets, chunk=self.config.loss_chunk_size)
        return jax.tree.map(lambda x: x.reshape(shape), tokens), output.auxiliary

    def _wpo_weights(self, policy: TokenLogprobs, batch: TokenBatch) -> jax.Array:
        """Returns pair weights [P]: likelihood relative to samples of the policy [2406.11827, equation 2]."""
        relative_BSL = jnp.where(batch.loss_mask > 0, policy.logprob - policy.collision, 0.0)
        mean_PS = self._summed(relative_BSL, batch) / jnp.maximum(self._summed(batch.loss_mask, batch), 1)
        return jax.lax.stop_gradient(jnp.exp(mean_PS.sum(-1)))

    def _nll(self, policy: TokenLogprobs, batch: TokenBatch) -> jax.Array:
        """Returns the negative log-likelihood per token [P] of chosen answers.

        Normalized per pair, so that the loss does not depend on how pairs are split into microbatches.
        """
        mask_BSL = batch.loss_mask
        if self.config.nll_on_prompt:
            segments_BSL = jnp.pad(batch.segment_ids, ((0, 0), (0, 0), (0, 1)))
            same_BSL = segments_BSL[..., 1:] == segments_BSL[..., :-1]  # the last token of a text has no target
            mask_BSL = same_BSL & (batch.segment_ids > 0)
        nll_PS = self._summed(jnp.where(mask_BSL > 0, -policy.logprob, 0.0), batch)
        return nll_PS[:, 0] / jnp.maximum(self._summed(mask_BSL, batch)[:, 0], 1)

    def _ld_weights(self, batch: TokenBatch) -> jax.Array:
        """Returns token weights [B, S, L]: `ld_alpha` beyond the length of the shorter answer, else 1."""
        mask_BSL = batch.loss_mask.astype(jnp.float32)
        if self.config.ld_alpha == 1:
            return jnp.ones_like(mask_BSL)
        flat = flat_rows(batch)
        position_BSL = segment_cumsum(flat.loss_mask[..., None], flat.positions).reshape(mask_BSL.shape)
        shorter_P = self._summed(mask_BSL, batch).min(-1)
        shorter_BSL = of_tokens(shorter_P, batch.segment_ids, self.config.pairs_per_row)
        return jnp.where(position_BSL <= shorter_BSL, 1.0, self.config.ld_alpha)
