"""Text classification: cross entropy between the class of a text and the scores at its last token.

The class is the target of the last token, the only one that contributes to the loss, so texts are packed like
conversations.

Shape letters: B batch, L length, C classes, N texts.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch
from data.records.encoding import DataFormat, DataNeeds
from models.config import AttentionMask
from models.transformer import ModelOutput
from trainer.objective import Losses, LossInputs, Mean, ModelNeeds, Objective, ObjectiveConfig, means_of
from trainer.objectives.moe_losses import auxiliary_terms
from trainer.objectives.pooling import Pooling, at_end, scores


@dataclass
class ClassificationConfig(ObjectiveConfig):
    kind: str = "classification"
    pooling: Pooling = Pooling.last  # hidden states that the score is computed from
    # loss weight of each of data.classes; []: all 1
    class_weights: list[float] = field(default_factory=list, metadata={"above": 0})
    # fraction of the target probability distributed evenly over all classes
    label_smoothing: float = field(default=0.0, metadata={"min": 0, "below": 1})

    @property
    def data_needs(self) -> DataNeeds:
        return DataNeeds(formats=(DataFormat.classification,), phase="classify")

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds(
            num_labels=None, is_token_level=False, masks=(AttentionMask.causal, AttentionMask.bidirectional)
        )

    def check_classes(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(
                f"data.classes: has {num_classes} classes; classification needs at least two, in label order: "
                "data.classes=[ham,spam]"
            )
        if self.class_weights and len(self.class_weights) != num_classes:
            raise ValueError(
                f"objective.class_weights: {len(self.class_weights)} weights for {num_classes} classes of "
                "data.classes; give one weight per class"
            )

    def build(self, token_bytes: np.ndarray | None) -> "Classification":
        return Classification(self)


@dataclass(frozen=True)
class Classification(Objective):
    """Classification loss. Metric: `accuracy`. The weight of a text is that of its class, regardless of its length."""

    config: ClassificationConfig
    has_eval_outputs = True

    def compute_loss(self, inputs: LossInputs) -> Losses:
        c, batch, output = self.config, inputs.batch, inputs.forward()
        logits_BLC = scores(output, batch, c.pooling)
        classes = logits_BLC.shape[-1]
        in_loss_BL = batch.loss_mask > 0
        class_BL = jnp.where(in_loss_BL, batch.targets, 0)  # elsewhere a target is a token
        target_BLC = jax.nn.one_hot(class_BL, classes) * (1 - c.label_smoothing) + c.label_smoothing / classes
        weights_C = jnp.asarray(c.class_weights or [1.0] * classes, jnp.float32)
        weight_BL = jnp.where(in_loss_BL, weights_C[class_BL], 0.0)
        auxiliary_BL, router = auxiliary_terms(output, in_loss_BL.shape)
        loss_BL = -jnp.sum(target_BLC * jax.nn.log_softmax(logits_BLC), axis=-1) + auxiliary_BL

        correct_BL = (logits_BLC.argmax(-1) == class_BL).astype(jnp.float32)
        return Mean.of(loss_BL, weight_BL), means_of({"accuracy": correct_BL, **router}, in_loss_BL)

    def predict(self, output: ModelOutput, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """Returns probabilities [B, L, C] f32 and classes [B, L] i32 at the last token of each text; -1 elsewhere."""
        probability_BLC = jax.nn.softmax(scores(output, batch, self.config.pooling))
        return probability_BLC, jnp.where(batch.loss_mask > 0, batch.targets, -1)

    def eval_report(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return class_report(predictions, labels)

    def score_texts(self, output: ModelOutput, batch: TokenBatch) -> jax.Array:
        """Returns class probabilities [B, C] f32 for rows of one text each."""
        scores_BLC = scores(output, batch, self.config.pooling)
        return jax.nn.softmax(at_end(scores_BLC, batch.segment_ids))

    def describe_output(self, values: list[float], classes: list[str]) -> dict[str, Any]:
        return {"class": classes[int(np.argmax(values))], "probabilities": dict(zip(classes, values, strict=True))}


def class_report(probability_NC: np.ndarray, class_N: np.ndarray) -> dict[str, float]:
    """Computes `precision`, `recall`, `f1` and `roc_auc` with scikit-learn.

    Two classes: metrics of the second. More classes: macro averages (`roc_auc`: one class against the rest). Omits
    `roc_auc` if the labels do not contain every class.
    """
    from sklearn import metrics

    classes = probability_NC.shape[1]
    predicted_N = probability_NC.argmax(1)
    average = "binary" if classes == 2 else "macro"
    labels = None if classes == 2 else list(range(classes))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        class_N, predicted_N, labels=labels, average=average, zero_division=0
    )
    found = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    if len(np.unique(class_N)) < classes:
        return found
    given = probability_NC[:, 1] if classes == 2 else probability_NC / probability_NC.sum(1, keepdims=True)
    return found | {"roc_auc": float(metrics.roc_auc_score(class_N, given, multi_class="ovr", labels=labels))}
