"""Classes of texts: cross entropy between a text's class and the scores at its last token.

A class stands in the batch where the next token would: as the target of the last token, which alone is learnt. So
texts are packed as conversations are.

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
    pooling: Pooling = Pooling.last  # Hidden states that the score is computed from
    # of each of data.classes in the loss; []: all 1
    class_weights: list[float] = field(default_factory=list, metadata={"above": 0})
    # share of a class's probability spread evenly over all classes
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
                f"data.classes: names {num_classes} classes; name at least two, in the order of their numbers: "
                "data.classes=[ham,spam]"
            )
        if self.class_weights and len(self.class_weights) != num_classes:
            raise ValueError(
                f"objective.class_weights: {len(self.class_weights)} weights for {num_classes} classes of data.classes"
            )

    def build(self, token_bytes: np.ndarray | None) -> "Classification":
        return Classification(self)


@dataclass(frozen=True)
class Classification(Objective):
    """Metrics beside the loss: `accuracy`. A text weighs as much as its class, whatever its length."""

    config: ClassificationConfig
    has_eval_outputs = True

    def compute_loss(self, inputs: LossInputs) -> Losses:
        c, batch, output = self.config, inputs.batch, inputs.forward()
        logits_BLC = scores(output, batch, c.pooling)
        classes = logits_BLC.shape[-1]
        learnt_BL = batch.loss_mask > 0
        class_BL = jnp.where(learnt_BL, batch.targets, 0)  # elsewhere a target is a token
        target_BLC = jax.nn.one_hot(class_BL, classes) * (1 - c.label_smoothing) + c.label_smoothing / classes
        weights_C = jnp.asarray(c.class_weights or [1.0] * classes, jnp.float32)
        weight_BL = jnp.where(learnt_BL, weights_C[class_BL], 0.0)
        added_BL, router = auxiliary_terms(output, learnt_BL.shape)
        loss_BL = -jnp.sum(target_BLC * jax.nn.log_softmax(logits_BLC), axis=-1) + added_BL

        right_BL = (logits_BLC.argmax(-1) == class_BL).astype(jnp.float32)
        return Mean.of(loss_BL, weight_BL), means_of({"accuracy": right_BL, **router}, learnt_BL)

    def predict(self, output: ModelOutput, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """Probabilities [B, L, C] f32, and the class [B, L] i32 of the texts that end there; -1 elsewhere."""
        probability_BLC = jax.nn.softmax(scores(output, batch, self.config.pooling))
        return probability_BLC, jnp.where(batch.loss_mask > 0, batch.targets, -1)

    def eval_report(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return class_report(predictions, labels)

    def score_texts(self, output: ModelOutput, batch: TokenBatch) -> jax.Array:
        """[B, C] f32: the probability of each class, of rows that hold one text each."""
        found_BLC = scores(output, batch, self.config.pooling)
        return jax.nn.softmax(at_end(found_BLC, batch.segment_ids))

    def describe_output(self, values: list[float], classes: list[str]) -> dict[str, Any]:
        return {"class": classes[int(np.argmax(values))], "probabilities": dict(zip(classes, values, strict=True))}


def class_report(probability_NC: np.ndarray, class_N: np.ndarray) -> dict[str, float]:
    """`precision`, `restore_hook_states`, `f1` and `roc_auc` by scikit-learn: of two classes those of the second, of more their
    plain means over classes (the area: of each class against the rest). What is not defined is left out.
    """
    from sklearn import metrics

    classes = probability_NC.shape[1]
    told_N = probability_NC.argmax(1)
    average = "binary" if classes == 2 else "macro"
    labels = None if classes == 2 else list(range(classes))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        class_N, told_N, labels=labels, average=average, zero_division=0
    )
    found = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    if len(np.unique(class_N)) < classes:
        return found
    given = probability_NC[:, 1] if classes == 2 else probability_NC / probability_NC.sum(1, keepdims=True)
    return found | {"roc_auc": float(metrics.roc_auc_score(class_N, given, multi_class="ovr", labels=labels))}
