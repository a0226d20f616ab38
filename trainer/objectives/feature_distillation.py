"""Learning what happens inside a teacher: its hidden states and its attention, layer by layer.

Hidden states as in TinyBERT (Jiao et al. 2020 [1909.10351], section 3.1), through one learned projection for all layers
where the teacher is wider; attention by the divergence of its weights as in MiniLM (Wang et al. 2020 [2002.10957],
section 3.1), or by their squared difference. TinyBERT compares scores before the softmax; here it is what the softmax
gives. Each value is a mean over pairs of layers, and one number a token, so that what is masked has no part in it.

Shape letters: P pairs of layers, B batch, L length, S key length, D width of the student, T of the teacher, N heads.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from models.captures import Captures, CaptureSpec
from models.config import ModelConfig
from trainer.objective_params import ParamSpec

PROJECTION = "hidden_projection"  # [D, T], among the parameters beside the model
EPS = 1e-6  # of the length of a vector, in cosines
LEAST = 1e-9  # of a weight, in logarithms


class Hidden(enum.Enum):
    mse = "mse"  # mean square of the difference over the width
    cosine = "cosine"  # 1 - cosine


class Maps(enum.Enum):
    kl = "kl"  # KL(teacher | student) over the keys of a query
    mse = "mse"  # sum of squares over the keys of a query


@dataclass
class FeatureLossConfig:
    """Nothing is compared where `layers` is empty."""

    # pairs [layer of the student, layer of the teacher], from 0
    layer_mapping: list[list[int]] = field(default_factory=list)
    hidden_loss: Hidden = Hidden.mse  # Distance of hidden states
    # of the mean over pairs; 0: hidden states are not compared
    hidden_loss_weight: float = field(default=1.0, metadata={"min": 0})
    attention_loss: Maps = Maps.kl  # Distance of attention maps
    attention_loss_weight: float = field(default=0.0, metadata={"min": 0})  # likewise
    teacher_dim: int | None = None  # width of the teacher's hidden states where it is another: a projection is learnt

    def check(self) -> None:
        """Raises: ValueError naming the key of a value that cannot be."""
        for pair in self.layer_mapping:
            if len(pair) != 2:
                raise ValueError(
                    f"objective.feature_loss.layer_mapping={self.layer_mapping}: {pair} is no pair; give [student, teacher], as [[0,1]]"
                )
        if self.layer_mapping and not self.hidden_loss_weight and not self.attention_loss_weight:
            raise ValueError(
                f"objective.feature_loss.layer_mapping={self.layer_mapping}: nothing of them is compared; set objective.feature_loss.hidden_loss_weight "
                "or attention_weight above 0"
            )
        if not self.layer_mapping and (self.attention_loss_weight or self.teacher_dim):
            raise ValueError(
                "objective.feature_loss.layer_mapping=[]: name the pairs of layers to compare, as [[0,1],[1,3]]"
            )

    def extras(self, student: ModelConfig) -> dict[str, ParamSpec]:
        """The projection, where one is learnt: its output has the size of its input."""
        if self.teacher_dim is None or not self.hidden_loss_weight:
            return {}
        D = student.embed_dim
        return {PROJECTION: ParamSpec((D, self.teacher_dim), ("embed", "mlp"), D**-0.5)}

    def check_models(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Raises: ValueError where the two cannot be compared so."""
        for side, (whose, model) in enumerate((("student", student), ("teacher", teacher))):
            for pair in self.layer_mapping:
                if not 0 <= pair[side] < model.num_layers:
                    raise ValueError(
                        f"objective.feature_loss.layer_mapping={self.layer_mapping}: in {list(pair)}, the {whose} has no layer "
                        f"{pair[side]}; it has 0 to {model.num_layers - 1}"
                    )
        D, T = student.embed_dim, teacher.embed_dim
        if self.layer_mapping and self.hidden_loss_weight and (self.teacher_dim or D) != T:
            fix = "null" if D == T else f"{T}, and a projection between them is learnt"
            given = "null" if self.teacher_dim is None else self.teacher_dim
            raise ValueError(
                f"objective.feature_loss.teacher_dim={given}: hidden states are {D} wide in the student and {T} in the "
                f"teacher; set it to {fix}"
            )

    def asked(self, side: int) -> CaptureSpec | None:
        """What to ask of the student (0) or the teacher (1)."""
        if not self.layer_mapping:
            return None
        layers = tuple(pair[side] for pair in self.layer_mapping)
        return CaptureSpec(layers, self.hidden_loss_weight > 0, self.attention_loss_weight > 0)


def matched(
    config: FeatureLossConfig, student: Captures, teacher: Captures, projection_DT: jax.Array | None
) -> dict[str, jax.Array]:
    """`hidden_distance` and `attention_distance`, [B, L] f32, those that are compared."""
    found, one, other = {}, student, teacher
    if one.hidden_PBLD is not None:
        found["hidden_distance"] = hidden_distance(
            config.hidden_loss, one.hidden_PBLD, other.hidden_PBLD, projection_DT
        )
    if one.attention_PBNLS is not None:
        maps = one.attention_PBNLS, other.attention_PBNLS
        found["attention_distance"] = attention_distance(config.attention_loss, *maps)
    return found


def weighted(config: FeatureLossConfig, found: dict[str, jax.Array]) -> Sequence[jax.Array]:
    """Each [B, L] with its weight in the loss."""
    weights = {"hidden_distance": config.hidden_loss_weight, "attention_distance": config.attention_loss_weight}
    return [weights[name] * values_BL for name, values_BL in found.items()]


def hidden_distance(
    kind: Hidden, student_PBLD: jax.Array, teacher_PBLT: jax.Array, projection_DT: jax.Array | None
) -> jax.Array:
    """[B, L] f32, the mean over pairs."""
    x_PBLT, y_PBLT = student_PBLD.astype(jnp.float32), teacher_PBLT.astype(jnp.float32)
    if projection_DT is not None:
        x_PBLT = jnp.einsum("PBLD,DT->PBLT", x_PBLT, projection_DT, preferred_element_type=jnp.float32)
    if kind is Hidden.mse:
        return jnp.square(x_PBLT - y_PBLT).mean(-1).mean(0)
    length = lambda z: jnp.sqrt(jnp.square(z).sum(-1) + EPS**2)  # with a gradient at 0
    return (1 - (x_PBLT * y_PBLT).sum(-1) / (length(x_PBLT) * length(y_PBLT))).mean(0)


def attention_distance(kind: Maps, student_PBNLS: jax.Array, teacher_PBNLS: jax.Array) -> jax.Array:
    """[B, L] f32 of each query, the mean over heads and pairs; over mean heads where they are not equally many."""
    if student_PBNLS.shape[2] != teacher_PBNLS.shape[2]:
        student_PBNLS, teacher_PBNLS = (x.mean(2, keepdims=True) for x in (student_PBNLS, teacher_PBNLS))
    if kind is Maps.mse:
        apart_PBNL = jnp.square(student_PBNLS - teacher_PBNLS).sum(-1)
    else:
        log = lambda x: jnp.log(jnp.maximum(x, LEAST))
        apart_PBNL = (teacher_PBNLS * (log(teacher_PBNLS) - log(student_PBNLS))).sum(-1)
    return apart_PBNL.mean(2).mean(0)
