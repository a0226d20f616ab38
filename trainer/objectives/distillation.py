"""Knowledge distillation from a teacher's next-token distribution (Hinton et al. 2015; GKD, Agarwal et al. 2023).

P is the teacher's distribution and Q the student's, both computed from logits divided by the temperature.

Shape letters: B batch, L length, C chunk of the length, D model, V vocab.
"""

import enum
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.config import AttentionMask, ModelConfig
from models.transformer import ModelOutput
from trainer.objective import (
    TEACHER,
    Columns,
    FrozenModel,
    FrozenModelSpec,
    FrozenNeeds,
    Losses,
    LossInputs,
    Mean,
    ModelNeeds,
    Objective,
    ObjectiveConfig,
    means_of,
)
from trainer.objective_params import OBJECTIVE_PARAMS, model_params
from trainer.objectives.cross_entropy import chunk_logits, map_chunks
from trainer.objectives.feature_distillation import PROJECTION, FeatureLossConfig, feature_distances, weighted_distances
from trainer.objectives.moe_losses import auxiliary_terms
from trainer.objectives.topk_distribution import (
    Buckets,
    bucket_logprobs,
    buckets_to_columns,
    load_buckets,
    top_k_buckets,
)


class Divergence(enum.Enum):
    forward = "forward"  # KL(P | Q): mode-covering
    reverse = "reverse"  # KL(Q | P): mode-seeking
    jensen_shannon = "jensen_shannon"  # b KL(P | M) + (1 - b) KL(Q | M) with M = b P + (1 - b) Q, b = objective.beta


class CacheDtype(enum.Enum):
    float16 = "float16"
    float32 = "float32"


@dataclass
class DistillationConfig(ObjectiveConfig):
    kind: str = "distillation"
    # teacher model: a run (NAME, FOLDER, NAME@STEP), hf:FOLDER or gguf:FILE, with the same tokenizer as the run
    teacher: str | None = None
    divergence: Divergence = Divergence.forward  # divergence between teacher P and student Q
    # interpolation weight of jensen_shannon; the limits 0 and 1 give a zero divergence
    beta: float = field(
        default=0.5,
        metadata={"above": 0, "below": 1, "hint": "use objective.divergence=forward or reverse instead of 0 or 1"},
    )
    # softmax temperature; the divergence is multiplied by its square to preserve gradient magnitude
    temperature: float = field(default=1.0, metadata={"above": 0})
    # weight of the divergence; cross entropy on the text has weight 1 - alpha
    alpha: float = field(default=0.5, metadata={"min": 0, "max": 1})
    # compare the teacher's top-k tokens plus one bucket for the remaining probability; 0: the full vocabulary
    top_k: int = field(default=0, metadata={"min": 0})
    # compute the teacher's top_k log-probabilities once before training and cache them on disk
    cache_teacher_logits: bool = False
    cache_dtype: CacheDtype = CacheDtype.float16  # dtype of cached log-probabilities
    # losses on hidden states and attention maps, added to the loss
    feature_loss: FeatureLossConfig = field(default_factory=FeatureLossConfig)
    # tokens per row whose logits (teacher and student) exist at once
    loss_chunk_size: int = field(default=128, metadata={"min": 1})

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(
            masks=(AttentionMask.causal, AttentionMask.prefix), extra_params=self.feature_loss.extra_params
        )

    @property
    def frozen_needs(self) -> FrozenNeeds:
        if self.teacher is None:  # `build` raises
            return FrozenNeeds()
        return FrozenNeeds(
            {TEACHER: FrozenModelSpec(self.teacher, "objective.teacher", precompute=self.cache_teacher_logits)}
        )

    def check_frozen_model(self, role: str, model: ModelConfig, frozen: ModelConfig) -> None:
        self.feature_loss.check_models(model, frozen)
        if self.top_k > frozen.vocab_size > 0:
            raise ValueError(
                f"objective.top_k={self.top_k}: exceeds the teacher's vocabulary of {frozen.vocab_size} tokens; use 0 "
                "to compare all of them"
            )

    def build(self, token_bytes: np.ndarray | None) -> "Distillation":
        """Raises: ValueError if keys are incompatible."""
        if not self.teacher:
            raise ValueError("objective.teacher=null: distillation needs a teacher; set a run, hf:FOLDER or gguf:FILE")
        if self.cache_teacher_logits and not self.top_k:
            raise ValueError(
                "objective.cache_teacher_logits=true: caches the top-k tokens of each position, not full "
                "distributions; set their number, for example objective.top_k=64"
            )
        if self.cache_teacher_logits and self.feature_loss.layer_mapping:
            raise ValueError(
                "objective.cache_teacher_logits=true: caches log-probabilities, not hidden states or attention maps; "
                "remove objective.feature_loss.layer_mapping or set objective.cache_teacher_logits=false"
            )
        self.feature_loss.check()
        return Distillation(self)


class TokenTerms(NamedTuple):
    """Statistics per token, [B, L] f32."""

    divergence: jax.Array
    nll: jax.Array  # of the target under the student at temperature 1
    teacher_nll: jax.Array | None  # None if only the teacher's top-k tokens are cached
    agreement: jax.Array  # 1 if teacher and student have the same most probable token


def divergence(teacher_BCV: jax.Array, student_BCV: jax.Array, config: DistillationConfig) -> jax.Array:
    """Returns the divergence [B, C] of logits, not multiplied by temperature²; over buckets if `top_k` is set."""
    p_BCV, q_BCV = (jax.nn.log_softmax(x / config.temperature, axis=-1) for x in (teacher_BCV, student_BCV))
    if config.top_k:
        return divergence_of_buckets(top_k_buckets(p_BCV, config.top_k), q_BCV, config)
    return between(p_BCV, q_BCV, config)


def divergence_of_buckets(teacher: Buckets, student_BCV: jax.Array, config: DistillationConfig) -> jax.Array:
    """Returns the divergence [B, C] between the teacher's buckets and the student's log-probabilities [B, C, V]."""
    return between(teacher.logprobs, bucket_logprobs(student_BCV, teacher.ids), config)


def between(p_BCV: jax.Array, q_BCV: jax.Array, config: DistillationConfig) -> jax.Array:
    """Returns the divergence [B, C] between log-probabilities `p_BCV` (teacher) and `q_BCV` (student)."""
    kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)
    if config.divergence is Divergence.forward:
        return kl(p_BCV, q_BCV)
    if config.divergence is Divergence.reverse:
        return kl(q_BCV, p_BCV)
    b = config.beta
    m_BCV = jnp.logaddexp(p_BCV + np.log(b), q_BCV + np.log1p(-b))
    return b * kl(p_BCV, m_BCV) + (1 - b) * kl(q_BCV, m_BCV)


@dataclass(frozen=True)
class Distillation(Objective):
    """Distillation loss.

    Metrics: `divergence`, `nll`, `teacher_nll`, `agreement` (same most probable token), and `hidden_distance` and
    `attention_distance` of the layers in `feature_loss.layer_mapping`.
    """

    config: DistillationConfig

    def compute_loss(self, inputs: LossInputs) -> Losses:
        c, teacher, stored_columns, batch = self.config, inputs.frozen[TEACHER], inputs.columns, inputs.batch
        assert isinstance(teacher, FrozenModel)
        student = inputs._replace(params=model_params(inputs.params)).forward(capture=c.feature_loss.captures(0))
        target = None
        if not stored_columns:
            target = jax.lax.stop_gradient(inputs.with_frozen(TEACHER).forward(capture=c.feature_loss.captures(1)))

        def compute(parts: tuple[jax.Array, ...], targets_BC: jax.Array) -> TokenTerms:
            x_BCV = _logits(student, parts[0], teacher.vocab_size)
            is_target = jax.lax.broadcasted_iota(targets_BC.dtype, x_BCV.shape, 2) == targets_BC[..., None]
            nll = lambda z: jax.nn.logsumexp(z, axis=-1) - jnp.sum(jnp.where(is_target, z, 0.0), axis=-1)
            agrees = lambda top_BC: (x_BCV.argmax(-1) == top_BC).astype(jnp.float32)
            if target is None:
                top, q_BCV = load_buckets(*parts[1:]), jax.nn.log_softmax(x_BCV / c.temperature, axis=-1)
                return TokenTerms(divergence_of_buckets(top, q_BCV, c), nll(x_BCV), None, agrees(top.ids[..., 0]))
            t_BCV = jax.lax.stop_gradient(_logits(target, parts[1], teacher.vocab_size))
            return TokenTerms(divergence(t_BCV, x_BCV, c), nll(x_BCV), nll(t_BCV), agrees(t_BCV.argmax(-1)))

        cached = lambda: (stored_columns["top_ids"], stored_columns["top_logprobs"])
        of_teacher = cached() if target is None else (target.hidden_BLD,)
        terms: TokenTerms = map_chunks(compute, (student.hidden_BLD, *of_teacher), batch.targets, c.loss_chunk_size)
        mask_BL = batch.loss_mask.astype(jnp.float32)
        loss_BL = c.alpha * c.temperature**2 * terms.divergence + (1 - c.alpha) * terms.nll
        auxiliary_BL, router = auxiliary_terms(student, loss_BL.shape)
        metrics = {name: values for name, values in terms._asdict().items() if values is not None} | router
        if student.captures is not None and target is not None:
            projection = inputs.params.get(OBJECTIVE_PARAMS, {}).get(PROJECTION)
            distances = feature_distances(c.feature_loss, student.captures, target.captures, projection)
            loss_BL = sum(weighted_distances(c.feature_loss, distances), loss_BL)
            metrics |= distances
        return Mean.of(loss_BL + auxiliary_BL, mask_BL), means_of(metrics, mask_BL)

    def compute_columns(self, inputs: LossInputs) -> dict[str, jax.Array]:
        """Returns the teacher's top-k tokens [B, L, k] and the log-probabilities of the buckets [B, L, k + 1].

        Computed at the temperature of the loss: bucket probabilities at another temperature cannot be derived.
        """
        c, teacher, batch = self.config, inputs.frozen[TEACHER], inputs.batch
        output = inputs.with_frozen(TEACHER).forward()

        def compute(hidden_BCD: jax.Array, _: jax.Array) -> Buckets:
            t_BCV = _logits(output, hidden_BCD, teacher.vocab_size)
            return top_k_buckets(jax.nn.log_softmax(t_BCV / c.temperature, axis=-1), c.top_k)

        buckets = map_chunks(compute, output.hidden_BLD, batch.targets, c.loss_chunk_size)
        return buckets_to_columns(buckets, c.cache_dtype.name)

    def column_spec(self, seq_len: int) -> Columns:
        k, dtype = self.config.top_k, np.dtype(self.config.cache_dtype.name)
        return {"top_ids": ((seq_len, k), np.int32), "top_logprobs": ((seq_len, k + 1), dtype)}

    def column_settings(self) -> dict[str, Any]:
        c = self.config
        return {"top_k": c.top_k, "temperature": c.temperature, "dtype": c.cache_dtype.name}


def _logits(output: ModelOutput, hidden_BCD: jax.Array, vocab_size: int) -> jax.Array:
    """Returns logits [B, C, V] without vocabulary padding, which differs between models of one family."""
    return chunk_logits(hidden_BCD, output.head_DV[:, :vocab_size], output.logit_soft_cap)
