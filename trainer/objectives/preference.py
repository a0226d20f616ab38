"""Preference optimisation without a reward model: DPO and its relatives, one loss function each.

A loss sees four summed log-probabilities for each pair, of the chosen and of the rejected answer under the policy and
under the reference, and the lengths of the answers. Numbers in brackets are arXiv's.

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
from trainer.objectives.pooling import running
from trainer.objectives.segment_ops import of_rows, of_tokens, summed


class Loss(enum.Enum):
    sigmoid = "sigmoid"  # DPO [2305.18290]; with label_smoothing conservative DPO (Mitchell)
    robust = "robust"  # unbiased where a share label_smoothing of the labels is flipped [2403.00409]
    hinge = "hinge"  # SLiC and RSO [2305.10425, 2309.06657]
    ipo = "ipo"  # of log-probabilities per token [2310.12036]
    sigmoid_norm = "sigmoid_norm"  # DPO of log-probabilities per token [2411.15124]
    exo = "exo"  # needs label_smoothing above 0 [2402.00856]
    nca = "nca"  # [2402.05369]
    bco = "bco"  # [2404.04656], with a shift of 0
    sppo = "sppo"  # [2405.00675], hard labels
    aot = "aot"  # sorted margins of a microbatch [2406.05882]
    aot_unpaired = "aot_unpaired"
    apo_zero = "apo_zero"  # raises the chosen, lowers the rejected [2408.06266]
    apo_down = "apo_down"  # lowers both, the rejected more
    discopop = "discopop"  # log-ratio modulated [2406.08414]
    simpo = "simpo"  # log-probabilities per token, no reference [2405.14734]
    cpo = "cpo"  # no reference [2401.08417]
    orpo = "orpo"  # odds per token, no reference; goes with nll_weight=1 [2403.07691]


class FDivergence(enum.Enum):
    """What keeps the policy near the reference [2309.16240]: it decides how log-ratios u count."""

    reverse_kl = "reverse_kl"  # u
    forward_kl = "forward_kl"  # 1 - e^-u
    jensen_shannon = "jensen_shannon"  # log 2 + log sigmoid(u)


OF_MARGINS = (Loss.sigmoid, Loss.robust, Loss.hinge, Loss.ipo, Loss.sigmoid_norm, Loss.exo, Loss.discopop)
FREE_OF_REFERENCE = (Loss.simpo, Loss.cpo, Loss.orpo)


@dataclass
class PreferenceConfig(ObjectiveConfig):
    kind: str = "preference"
    loss_type: Loss = Loss.sigmoid  # Preference loss
    # how far the policy may leave the reference: larger, less far
    beta: float = field(default=0.1, metadata={"above": 0})
    f_divergence: FDivergence = FDivergence.reverse_kl  # of losses of a margin: sigmoid, robust, hinge, ipo, exo, ...
    # Share of labels taken for wrong: sigmoid, robust, exo, aot
    label_smoothing: float = field(default=0.0, metadata={"min": 0, "below": 0.5})
    simpo_gamma: float = 1.0  # simpo: the margin to be reached, after beta
    tau: float = field(default=0.05, metadata={"above": 0})  # discopop: temperature of the modulation
    # Times the negative log-probability of a chosen answer, per token [2404.19733]; 0: off
    nll_weight: float = field(default=0.0, metadata={"min": 0})
    nll_on_prompt: bool = False  # per token of prompt and answer, as TRL has it in ORPO
    # Weight of tokens beyond the shorter answer's length; 1: full [LD-DPO, 2409.06411]
    ld_alpha: float = field(default=1.0, metadata={"min": 0, "max": 1})
    use_weighting: bool = False  # weigh pairs by how near the policy they were sampled [2406.11827]
    # Updates after which the reference moves towards the policy [2404.09656]; 0: it never does
    ref_model_sync_steps: int = field(default=0, metadata={"min": 0})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"above": 0, "max": 1})  # of the policy in it then
    # ask the reference once about each pair, before training, and keep it on disk
    precompute_ref_log_probs: bool = False
    # At most; 1: each is padded to a row of its own
    pairs_per_row: int = field(default=1, metadata={"min": 1})
    loss_chunk_size: int = field(default=128, metadata={"min": 1})  # tokens of each row whose logits exist at once

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
        """Raises: ValueError for keys that do not go together."""
        smoothing, name = self.label_smoothing, self.loss_type.name
        if self.loss_type is Loss.exo and smoothing < 1e-9:
            raise ValueError(
                f"objective.label_smoothing={smoothing}: must be above 0 with objective.loss_type=exo; its authors use 0.001"
            )
        if smoothing and self.loss_type not in (Loss.sigmoid, Loss.robust, Loss.exo, Loss.aot, Loss.aot_unpaired):
            raise ValueError(
                f"objective.label_smoothing={smoothing}: has no meaning for objective.loss_type={name}; use 0"
            )
        if self.f_divergence is not FDivergence.reverse_kl and self.loss_type not in OF_MARGINS:
            known = ", ".join(loss.name for loss in OF_MARGINS)
            raise ValueError(
                f"objective.f_divergence={self.f_divergence.name}: is for objective.loss_type={known}; not {name}"
            )
        for key in ("cache_reference", "reference_every"):
            if getattr(self, key) and not self.has_reference:
                raise ValueError(
                    f"objective.{key}={getattr(self, key)}: objective.loss_type={name} has no reference; leave it out"
                )
        if self.precompute_ref_log_probs and self.ref_model_sync_steps:
            raise ValueError(
                f"objective.ref_model_sync_steps={self.ref_model_sync_steps}: a reference that moves cannot be asked in advance; "
                "use 0, or objective.precompute_ref_log_probs=false"
            )
        if self.use_weighting and self.loss_type in (Loss.aot, Loss.aot_unpaired):
            raise ValueError(
                f"objective.use_weighting=true: objective.loss_type={name} sorts, and has no pairs to weigh; use false"
            )
        return Preference(self)


class Pairs(NamedTuple):
    """[P, S] f32: summed log-probabilities of answers, and how many tokens they have."""

    policy: jax.Array
    reference: jax.Array  # 0 where a loss has none
    lengths: jax.Array

    @property
    def real(self) -> jax.Array:
        """[P] bool: which are there at all; a row may hold fewer than it could."""
        return jnp.all(self.lengths > 0, axis=-1)

    @property
    def ratios(self) -> jax.Array:
        return self.policy - self.reference

    def per_token(self) -> "Pairs":
        lengths = jnp.maximum(self.lengths, 1)
        return Pairs(self.policy / lengths, self.reference / lengths, lengths)


def margin(values_PS: jax.Array) -> jax.Array:
    return values_PS[:, 0] - values_PS[:, 1]


def scored(pairs: Pairs, kind: FDivergence) -> Pairs:
    """The pairs with what their log-ratios count in the place of the policy, beside a reference of 0."""
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
    """Values in ascending order, and whose they were; those that are not there come last, all alike."""
    values_P = jnp.where(real_P, values_P, jnp.finfo(values_P.dtype).max)
    order_P = jnp.argsort(values_P)
    return values_P[order_P], order_P


def _apart(upper_P: jax.Array, lower_P: jax.Array, real_P: jax.Array) -> jax.Array:
    """How far values of one rank are apart, at the place of the upper one."""
    (upper_P, order_P), (lower_P, _) = _ranked(upper_P, real_P), _ranked(lower_P, real_P)
    return jnp.zeros_like(upper_P).at[order_P].set(upper_P - lower_P)


def _aot(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    return smoothed(c.beta * _apart(margin(pairs.policy), margin(pairs.reference), pairs.real), c.label_smoothing)


def _aot_unpaired(pairs: Pairs, c: PreferenceConfig) -> jax.Array:
    chosen_P, rejected_P = pairs.ratios.T
    return smoothed(c.beta * _apart(chosen_P, rejected_P, pairs.real), c.label_smoothing)


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
    mean_PS = jnp.minimum(pairs.per_token().policy, -1e-7)  # a probability of 1 has no odds
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
    """An `Objective` over batches [B, 2, L], each row of which holds `pairs_per_row` pairs at most.

    The reference is a frozen model of the policy's own architecture.

    Metrics, means over pairs: `reward_margin`, `reward_accuracy` (strictly larger), `reward_chosen` and
    `reward_rejected` (beta times the log-ratio to the reference), `logprob_chosen` and `logprob_rejected` (summed),
    `length_chosen` and `length_rejected`. A pair weighs 1 in the loss, whatever its length.
    """

    config: PreferenceConfig

    def compute_loss(self, inputs: LossInputs) -> Losses:
        c, batch = self.config, inputs.batch
        policy, terms = self._forward(inputs)
        policy_PS = self._total(policy, batch)
        reference_PS = jnp.zeros_like(policy_PS)
        if c.has_reference:
            found = inputs.columns if REFERENCE in inputs.columns else self.compute_columns(inputs)
            reference_PS = jax.lax.stop_gradient(found[REFERENCE]).reshape(-1, 2)
        pairs = Pairs(policy_PS, reference_PS, self._summed(batch.loss_mask, batch))
        mean = lambda values_P: Mean.of(values_P, pairs.real)
        loss_P = LOSSES[c.loss_type](scored(pairs, c.f_divergence), c)
        if c.use_weighting:
            loss_P = loss_P * self._nearness(policy, batch)
        if c.nll_weight:
            loss_P = loss_P + c.nll_weight * self._nll(policy, batch)
        reward_PS = c.beta * (pairs.per_token().policy if c.loss_type is Loss.simpo else pairs.ratios)
        metrics = {"reward_margin": margin(reward_PS), "reward_accuracy": (margin(reward_PS) > 0).astype(jnp.float32)}
        for side, name in enumerate(("chosen", "rejected")):
            of_side = {"reward": reward_PS, "logprob": policy_PS, "length": pairs.lengths}
            metrics |= {f"{key}_{name}": values_PS[:, side] for key, values_PS in of_side.items()}
        if terms is not None:  # of the router: once a pair, not once a side
            loss_P = loss_P + of_rows(terms.loss_B, c.pairs_per_row)
            metrics |= {name: of_rows(values, c.pairs_per_row) for name, values in terms.metrics.items()}
        return mean(loss_P), means_of(metrics, pairs.real)

    def compute_columns(self, inputs: LossInputs) -> dict[str, jax.Array]:
        """[B, N, S] f32: the summed log-probabilities of each pair under the reference."""
        found, _ = self._forward(inputs.of_frozen(REFERENCE))
        return {REFERENCE: self._total(found, inputs.batch).reshape(-1, self.config.pairs_per_row, 2)}

    def column_spec(self, seq_len: int) -> Columns:
        return {REFERENCE: ((self.config.pairs_per_row, 2), np.float32)}

    def column_settings(self) -> dict[str, Any]:
        return {"length_weight": self.config.ld_alpha, "pairs_per_row": self.config.pairs_per_row}

    def _summed(self, values_BSL: jax.Array, batch: TokenBatch) -> jax.Array:
        """[P, S]: over the tokens of each answer."""
        return summed(values_BSL.astype(jnp.float32), batch.segment_ids, self.config.pairs_per_row)

    def _total(self, found: TokenLogprobs, batch: TokenBatch) -> jax.Array:
        """[P, S]: the log-probability of each answer."""
        counted_BSL = batch.loss_mask.astype(jnp.float32) * self._weights(batch)
        return self._summed(jnp.where(counted_BSL > 0, found.logprob * counted_BSL, 0.0), batch)

    def _forward(self, inputs: LossInputs) -> tuple[TokenLogprobs, Auxiliary | None]:
        """Of every target [B, S, L]; and what a mixture of experts adds, of every row [B S]."""
        shape, flat = inputs.batch.tokens.shape, flat_rows(inputs.batch)
        output = inputs.forward(flat)
        found = token_logprobs(output, flat.targets, chunk=self.config.loss_chunk_size)
        return jax.tree.map(lambda x: x.reshape(shape), found), output.auxiliary

    def _nearness(self, policy: TokenLogprobs, batch: TokenBatch) -> jax.Array:
        """[P]: of both answers, how likely they are beside what the policy says itself [2406.11827, equation 2]."""
        apart_BSL = jnp.where(batch.loss_mask > 0, policy.logprob - policy.collision, 0.0)
        mean_PS = self._summed(apart_BSL, batch) / jnp.maximum(self._summed(batch.loss_mask, batch), 1)
        return jax.lax.stop_gradient(jnp.exp(mean_PS.sum(-1)))

    def _nll(self, policy: TokenLogprobs, batch: TokenBatch) -> jax.Array:
        """[P]: of the chosen, per token, so that pairs add up whatever microbatch they fall in."""
        mask_BSL = batch.loss_mask
        if self.config.nll_on_prompt:
            segments_BSL = jnp.pad(batch.segment_ids, ((0, 0), (0, 0), (0, 1)))
            same_BSL = segments_BSL[..., 1:] == segments_BSL[..., :-1]  # the last token of a text has no target
            mask_BSL = same_BSL & (batch.segment_ids > 0)
        nll_PS = self._summed(jnp.where(mask_BSL > 0, -policy.logprob, 0.0), batch)
        return nll_PS[:, 0] / jnp.maximum(self._summed(mask_BSL, batch)[:, 0], 1)

    def _weights(self, batch: TokenBatch) -> jax.Array:
        """[B, S, L]: of tokens; those beyond the length of the shorter answer may count less."""
        mask_BSL = batch.loss_mask.astype(jnp.float32)
        if self.config.ld_alpha == 1:
            return jnp.ones_like(mask_BSL)
        flat = flat_rows(batch)
        place_BSL = running(flat.loss_mask[..., None], flat.positions).reshape(mask_BSL.shape)
        shorter_P = self._summed(mask_BSL, batch).min(-1)
        shorter_BSL = of_tokens(shorter_P, batch.segment_ids, self.config.pairs_per_row)
        return jnp.where(place_BSL <= shorter_BSL, 1.0, self.config.ld_alpha)
