"""Learning from a teacher's distribution over the next token (Hinton et al. 2015; Agarwal et al. 2023, GKD).

P is the teacher's distribution and Q the student's, both of logits divided by the temperature.

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
from trainer.objectives.feature_distillation import PROJECTION, FeatureLossConfig, matched, weighted
from trainer.objectives.moe_losses import auxiliary_terms
from trainer.objectives.topk_distribution import Buckets, in_buckets, likeliest, recalled, stored


class Divergence(enum.Enum):
    forward = "forward"  # KL(P | Q): the student covers all that the teacher may say
    reverse = "reverse"  # KL(Q | P): the student says only what the teacher might
    jensen_shannon = "jensen_shannon"  # b KL(P | M) + (1 - b) KL(Q | M) with M = b P + (1 - b) Q, b = objective.beta


class CacheDtype(enum.Enum):
    float16 = "float16"
    float32 = "float32"


@dataclass
class DistillationConfig(ObjectiveConfig):
    kind: str = "distillation"
    teacher: str | None = None  # a run (NAME, FOLDER, NAME@STEP), hf:FOLDER or gguf:FILE, with the run's own tokenizer
    divergence: Divergence = Divergence.forward  # Divergence between teacher P and student Q
    # jensen_shannon; its ends are no other divergence, but 0
    beta: float = field(
        default=0.5,
        metadata={"above": 0, "below": 1, "hint": "for the ends take objective.divergence=forward or reverse"},
    )
    # the divergence is multiplied by its square, so that gradients keep their size
    temperature: float = field(default=1.0, metadata={"above": 0})
    # of the divergence; the rest is cross entropy with the text
    alpha: float = field(default=0.5, metadata={"min": 0, "max": 1})
    # compare the teacher's likeliest tokens, and the rest as one; 0: all of the vocabulary
    top_k: int = field(default=0, metadata={"min": 0})
    # ask the teacher once about each row, before training, and keep its top_k on disk
    cache_teacher_logits: bool = False
    cache_dtype: CacheDtype = CacheDtype.float16  # of log-probabilities there
    # of what happens inside, added to the loss
    feature_loss: FeatureLossConfig = field(default_factory=FeatureLossConfig)
    # Tokens of each row whose logits exist at once, the teacher's and the student's
    loss_chunk_size: int = field(default=128, metadata={"min": 1})

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(masks=(AttentionMask.causal, AttentionMask.prefix), extra_params=self.feature_loss.extras)

    @property
    def frozen_needs(self) -> FrozenNeeds:
        if self.teacher is None:  # refused by `build`
            return FrozenNeeds()
        return FrozenNeeds(
            {TEACHER: FrozenModelSpec(self.teacher, "objective.teacher", precompute=self.cache_teacher_logits)}
        )

    def check_frozen_model(self, role: str, model: ModelConfig, frozen: ModelConfig) -> None:
        self.feature_loss.check_models(model, frozen)
        if self.top_k > frozen.vocab_size > 0:
            raise ValueError(
                f"objective.top_k={self.top_k}: the teacher has {frozen.vocab_size} tokens; 0 compares all of them"
            )

    def build(self, token_bytes: np.ndarray | None) -> "Distillation":
        """Raises: ValueError for keys that do not go together."""
        if not self.teacher:
            raise ValueError("objective.teacher=null: name a run, hf:FOLDER or gguf:FILE to learn from")
        if self.cache_teacher_logits and not self.top_k:
            raise ValueError(
                "objective.cache_teacher_logits=true: keeps the likeliest tokens of each place, not whole distributions; say "
                "how many, as objective.top_k=64"
            )
        if self.cache_teacher_logits and self.feature_loss.layer_mapping:
            raise ValueError(
                "objective.cache_teacher_logits=true: keeps what the teacher says, not its layers; leave out objective.feature_loss.layer_mapping, "
                "or train beside the teacher"
            )
        self.feature_loss.check()
        return Distillation(self)


class Found(NamedTuple):
    """Per token, [B, L] f32."""

    divergence: jax.Array
    nll: jax.Array  # of the target under the student at temperature 1
    teacher_nll: jax.Array | None  # unknown where only the teacher's likeliest tokens are
    agreement: jax.Array  # 1 where the likeliest token is the same


def divergence(teacher_BCV: jax.Array, student_BCV: jax.Array, config: DistillationConfig) -> jax.Array:
    """[B, C] of logits, without the square of the temperature; over buckets where only `top_k` are compared."""
    p_BCV, q_BCV = (jax.nn.log_softmax(x / config.temperature, axis=-1) for x in (teacher_BCV, student_BCV))
    if config.top_k:
        return divergence_of_buckets(likeliest(p_BCV, config.top_k), q_BCV, config)
    return between(p_BCV, q_BCV, config)


def divergence_of_buckets(teacher: Buckets, student_BCV: jax.Array, config: DistillationConfig) -> jax.Array:
    """[B, C] of log-probabilities, the student's of all tokens."""
    return between(teacher.logprobs, in_buckets(student_BCV, teacher.ids), config)


def between(p_BCV: jax.Array, q_BCV: jax.Array, config: DistillationConfig) -> jax.Array:
    """[B, C] of log-probabilities, the teacher's first."""
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
    """Metrics beside the loss: `divergence`, `nll`, `teacher_nll`, `agreement` of the likeliest tokens; and
    `hidden_distance` and `attention_distance` of layers that are compared.
    """

    config: DistillationConfig

    def compute_loss(self, inputs: LossInputs) -> Losses:
        c, teacher, stored_columns, batch = self.config, inputs.frozen[TEACHER], inputs.columns, inputs.batch
        assert isinstance(teacher, FrozenModel)
        student = inputs._replace(params=model_params(inputs.params)).forward(asked=c.feature_loss.asked(0))
        taught = None
        if not stored_columns:
            taught = jax.lax.stop_gradient(inputs.of_frozen(TEACHER).forward(asked=c.feature_loss.asked(1)))

        def compute(parts: tuple[jax.Array, ...], targets_BC: jax.Array) -> Found:
            x_BCV = _logits(student, parts[0], teacher.vocab_size)
            is_target = jax.lax.broadcasted_iota(targets_BC.dtype, x_BCV.shape, 2) == targets_BC[..., None]
            nll = lambda z: jax.nn.logsumexp(z, axis=-1) - jnp.sum(jnp.where(is_target, z, 0.0), axis=-1)
            alike = lambda likeliest_BC: (x_BCV.argmax(-1) == likeliest_BC).astype(jnp.float32)
            if taught is None:
                top, q_BCV = recalled(*parts[1:]), jax.nn.log_softmax(x_BCV / c.temperature, axis=-1)
                return Found(divergence_of_buckets(top, q_BCV, c), nll(x_BCV), None, alike(top.ids[..., 0]))
            t_BCV = jax.lax.stop_gradient(_logits(taught, parts[1], teacher.vocab_size))
            return Found(divergence(t_BCV, x_BCV, c), nll(x_BCV), nll(t_BCV), alike(t_BCV.argmax(-1)))

        from_store = lambda: (stored_columns["top_ids"], stored_columns["top_logprobs"])
        of_teacher = from_store() if taught is None else (taught.hidden_BLD,)
        found: Found = map_chunks(compute, (student.hidden_BLD, *of_teacher), batch.targets, c.loss_chunk_size)
        mask_BL = batch.loss_mask.astype(jnp.float32)
        loss_BL = c.alpha * c.temperature**2 * found.divergence + (1 - c.alpha) * found.nll
        added_BL, router = auxiliary_terms(student, loss_BL.shape)
        metrics = {name: values for name, values in found._asdict().items() if values is not None} | router
        if student.inside is not None and taught is not None:
            apart = matched(
                c.feature_loss, student.inside, taught.inside, inputs.params.get(OBJECTIVE_PARAMS, {}).get(PROJECTION)
            )
            loss_BL = sum(weighted(c.feature_loss, apart), loss_BL)
            metrics |= apart
        return Mean.of(loss_BL + added_BL, mask_BL), means_of(metrics, mask_BL)

    def compute_columns(self, inputs: LossInputs) -> dict[str, jax.Array]:
        """The teacher's likeliest tokens [B, L, k], and at the loss's temperature their log-probabilities and that of
        the rest [B, L, k + 1]: that of another temperature would not follow from them.
        """
        c, teacher, batch = self.config, inputs.frozen[TEACHER], inputs.batch
        taught = inputs.of_frozen(TEACHER).forward()

        def compute(hidden_BCD: jax.Array, _: jax.Array) -> Buckets:
            t_BCV = _logits(taught, hidden_BCD, teacher.vocab_size)
            return likeliest(jax.nn.log_softmax(t_BCV / c.temperature, axis=-1), c.top_k)

        return stored(map_chunks(compute, taught.hidden_BLD, batch.targets, c.loss_chunk_size), c.cache_dtype.name)

    def column_spec(self, seq_len: int) -> Columns:
        k, dtype = self.config.top_k, np.dtype(self.config.cache_dtype.name)
        return {"top_ids": ((seq_len, k), np.int32), "top_logprobs": ((seq_len, k + 1), dtype)}

    def column_settings(self) -> dict[str, Any]:
        c = self.config
        return {"top_k": c.top_k, "temperature": c.temperature, "dtype": c.cache_dtype.name}


def _logits(output: ModelOutput, hidden_BCD: jax.Array, vocab_size: int) -> jax.Array:
    """[B, C, V] over the tokens that there are: models of one family are padded to different sizes."""
    return chunk_logits(hidden_BCD, output.head_DV[:, :vocab_size], output.logit_soft_cap)
