"""Classes of texts: cross entropy between a text's class and the scores at its last token.

A class stands in the batch where the next token would: as the target of the last token, which alone is learnt. So
texts are packed as conversations are.

Shape letters: B batch, L length, C classes, N texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch
from data.records.encoding import DataFormat
from models.transformer import Apply
from trainer.objective import Mean, ObjectiveConfig, Params, token_spec
from trainer.objectives.moe_losses import auxiliary_terms
from trainer.objectives.pooling import Pooling, at_end, scores


@dataclass
class ClassificationConfig(ObjectiveConfig):
    """Its build checks the values."""

    kind: str = "classification"
    pooling: Pooling = Pooling.last  # Hidden states that the score is computed from
    class_weights: list[float] = field(default_factory=list)  # of each of data.classes in the loss; []: all 1
    label_smoothing: float = 0.0  # share of a class's probability spread evenly over all classes

    @property
    def of_tokens(self) -> bool:
        return False

    @property
    def records(self) -> tuple[DataFormat, ...]:
        return (DataFormat.classification,)

    def outputs(self, num_classes: int) -> int:
        if num_classes < 2:
            raise ValueError(
                f"data.classes: names {num_classes} classes; name at least two, in the order of their numbers: "
                "data.classes=[ham,spam]"
            )
        if self.class_weights and len(self.class_weights) != num_classes:
            raise ValueError(
                f"objective.class_weights: {len(self.class_weights)} weights for {num_classes} classes of data.classes"
            )
        return num_classes

    def build(self, token_bytes: np.ndarray | None) -> "Classification":
        """Raises: ValueError naming the key of a value that cannot be."""
        if any(weight <= 0 for weight in self.class_weights):
            raise ValueError(f"objective.class_weights={self.class_weights}: must be above 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"objective.label_smoothing={self.label_smoothing}: must be at least 0 and below 1")
        return Classification(self)


@dataclass(frozen=True)
class Classification:
    """Metrics beside the loss: `accuracy`. A text weighs as much as its class, whatever its length."""

    config: ClassificationConfig

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: TokenBatch,
        rng: jax.Array | None,
    ) -> tuple[Mean, dict[str, Mean]]:
        c = self.config
        output = apply(params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids, rng=rng)
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
        metrics = {name: Mean.of(values, learnt_BL) for name, values in {"accuracy": right_BL, **router}.items()}
        return Mean.of(loss_BL, weight_BL), metrics

    def batch_spec(self, batch_size: int, seq_len: int) -> TokenBatch:
        return token_spec(batch_size, seq_len)

    def told(self, apply: Apply, params: Params, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """Probabilities [B, L, C] f32, and the class [B, L] i32 of the texts that end there; -1 elsewhere."""
        output = apply(params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids)
        probability_BLC = jax.nn.softmax(scores(output, batch, self.config.pooling))
        return probability_BLC, jnp.where(batch.loss_mask > 0, batch.targets, -1)

    def read(self, apply: Apply, params: Params, batch: TokenBatch) -> jax.Array:
        """[B, C] f32: the probability of each class, of rows that hold one text each."""
        output = apply(params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids)
        return jax.nn.softmax(at_end(scores(output, batch, self.config.pooling), batch.segment_ids))


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
