"""Feature distillation: losses on hidden states and attention maps of paired layers.

Hidden states follow TinyBERT (Jiao et al. 2020 [1909.10351], section 3.1), with one learned projection for all layers
if the widths differ. Attention maps are compared by KL divergence as in MiniLM (Wang et al. 2020 [2002.10957],
section 3.1) or by squared difference; unlike TinyBERT, after the softmax. Each distance is a mean over pairs of layers,
one number per token, so masked tokens do not contribute.

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

PROJECTION = "hidden_projection"  # name of the [D, T] projection among the objective's parameters
EPS = 1e-6  # minimum vector norm in cosines
LEAST = 1e-9  # minimum attention probability in logarithms


class Hidden(enum.Enum):
    mse = "mse"  # squared difference, averaged over the width
    cosine = "cosine"  # 1 - cosine


class Maps(enum.Enum):
    kl = "kl"  # KL(teacher | student) over the keys of a query
    mse = "mse"  # squared difference, summed over the keys of a query


@dataclass
class FeatureLossConfig:
    """Feature losses; disabled if `layer_mapping` is empty."""

    # pairs of layers to compare, [student layer, teacher layer], counted from 0; []: no feature loss
    layer_mapping: list[list[int]] = field(default_factory=list)
    hidden_loss: Hidden = Hidden.mse  # distance between hidden states
    # weight of the hidden state loss; 0: not compared
    hidden_loss_weight: float = field(default=1.0, metadata={"min": 0})
    attention_loss: Maps = Maps.kl  # distance between attention maps
    # weight of the attention loss; 0: not compared
    attention_loss_weight: float = field(default=0.0, metadata={"min": 0})
    # width of the teacher's hidden states if it differs from the student's: trains a projection between them
    teacher_dim: int | None = None

    def check(self) -> None:
        """Raises: ValueError naming the key of an invalid value."""
        key = f"objective.feature_loss.layer_mapping={self.layer_mapping}"
        for pair in self.layer_mapping:
            if len(pair) != 2:
                raise ValueError(f"{key}: {pair} is not a pair; give [student, teacher], for example [[0,1]]")
        if self.layer_mapping and not self.hidden_loss_weight and not self.attention_loss_weight:
            raise ValueError(
                f"{key}: both loss weights are 0; set objective.feature_loss.hidden_loss_weight or "
                "objective.feature_loss.attention_loss_weight above 0"
            )
        if not self.layer_mapping and (self.attention_loss_weight or self.teacher_dim):
            raise ValueError(
                "objective.feature_loss.layer_mapping=[]: no layers to compare; set pairs, for example [[0,1],[1,3]]"
            )

    def extra_params(self, student: ModelConfig) -> dict[str, ParamSpec]:
        """Returns the spec of the projection, if there is one; initialized to preserve the scale of its input."""
        if self.teacher_dim is None or not self.hidden_loss_weight:
            return {}
        D = student.embed_dim
        return {PROJECTION: ParamSpec((D, self.teacher_dim), ("embed", "mlp"), D**-0.5)}

    def check_models(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Raises: ValueError if the layers or widths of student and teacher do not match the config."""
        for side, (whose, model) in enumerate((("student", student), ("teacher", teacher))):
            for pair in self.layer_mapping:
                if not 0 <= pair[side] < model.num_layers:
                    raise ValueError(
                        f"objective.feature_loss.layer_mapping={self.layer_mapping}: in {list(pair)}, the {whose} has "
                        f"no layer {pair[side]}; choose 0 to {model.num_layers - 1}"
                    )
        D, T = student.embed_dim, teacher.embed_dim
        if self.layer_mapping and self.hidden_loss_weight and (self.teacher_dim or D) != T:
            fix = "null" if D == T else f"{T} to train a projection"
            given = "null" if self.teacher_dim is None else self.teacher_dim
            raise ValueError(
                f"objective.feature_loss.teacher_dim={given}: hidden states have width {D} in the student and {T} in "
                f"the teacher; set it to {fix}"
            )

    def captures(self, side: int) -> CaptureSpec | None:
        """Returns the activations to capture in the student (side 0) or the teacher (side 1)."""
        if not self.layer_mapping:
            return None
        layers = tuple(pair[side] for pair in self.layer_mapping)
        return CaptureSpec(layers, self.hidden_loss_weight > 0, self.attention_loss_weight > 0)


def feature_distances(
    config: FeatureLossConfig, student: Captures, teacher: Captures, projection_DT: jax.Array | None
) -> dict[str, jax.Array]:
    """Returns `hidden_distance` and `attention_distance`, [B, L] f32, if captured."""
    distances = {}
    if student.hidden_PBLD is not None:
        states = student.hidden_PBLD, teacher.hidden_PBLD
        distances["hidden_distance"] = hidden_distance(config.hidden_loss, *states, projection_DT)
    if student.attention_PBNLS is not None:
        maps = student.attention_PBNLS, teacher.attention_PBNLS
        distances["attention_distance"] = attention_distance(config.attention_loss, *maps)
    return distances


def weighted_distances(config: FeatureLossConfig, distances: dict[str, jax.Array]) -> Sequence[jax.Array]:
    """Multiplies each distance [B, L] by its weight in the loss."""
    weights = {"hidden_distance": config.hidden_loss_weight, "attention_distance": config.attention_loss_weight}
    return [weights[name] * values_BL for name, values_BL in distances.items()]


def hidden_distance(
    kind: Hidden, student_PBLD: jax.Array, teacher_PBLT: jax.Array, projection_DT: jax.Array | None
) -> jax.Array:
    """Returns the distance of hidden states [B, L] f32, averaged over pairs."""
    x_PBLT, y_PBLT = student_PBLD.astype(jnp.float32), teacher_PBLT.astype(jnp.float32)
    if projection_DT is not None:
        x_PBLT = jnp.einsum("PBLD,DT->PBLT", x_PBLT, projection_DT, preferred_element_type=jnp.float32)
    if kind is Hidden.mse:
        return jnp.square(x_PBLT - y_PBLT).mean(-1).mean(0)
    norm = lambda z: jnp.sqrt(jnp.square(z).sum(-1) + EPS**2)  # differentiable at 0
    return (1 - (x_PBLT * y_PBLT).sum(-1) / (norm(x_PBLT) * norm(y_PBLT))).mean(0)


def attention_distance(kind: Maps, student_PBNLS: jax.Array, teacher_PBNLS: jax.Array) -> jax.Array:
    """Returns the distance of attention maps per query [B, L] f32, averaged over heads and pairs.

    If the numbers of heads differ, maps are averaged over heads first.
    """
    if student_PBNLS.shape[2] != teacher_PBNLS.shape[2]:
        student_PBNLS, teacher_PBNLS = (x.mean(2, keepdims=True) for x in (student_PBNLS, teacher_PBNLS))
    if kind is Maps.mse:
        distance_PBNL = jnp.square(student_PBNLS - teacher_PBNLS).sum(-1)
    else:
        log = lambda x: jnp.log(jnp.maximum(x, LEAST))
        distance_PBNL = (teacher_PBNLS * (log(teacher_PBNLS) - log(student_PBNLS))).sum(-1)
    return distance_PBNL.mean(2).mean(0)
