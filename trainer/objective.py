"""Interfaces of training objectives: configs, requirements, losses and batch sources.

A training phase combines a loss, optional frozen models, a source of batches and a set of trainable parameters. This
module defines the first three; trainable parameters are selected by an optimizer mask or a parameter transform.

An objective declares its requirements as plain values: `DataNeeds` (records and rows), `ModelNeeds` (the model) and
`FrozenNeeds` (frozen models by role). All other code reads these values and never checks an objective's type.

Losses are (sum, weight) pairs, not means, so that they add up exactly over microbatches, devices, steps and hosts: the
training step differentiates the sum and divides once by the global weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import DTYPES, ColumnBatch, TokenBatch, columns_of, tokens_of
from data.records.encoding import NO_NEEDS, DataNeeds
from models.config import AttentionMask, ModelConfig
from models.transformer import Apply, ModelOutput
from trainer.objective_params import ParamSpec

Params = Any  # a nested dict of arrays
TEACHER = "teacher"  # role of a frozen model: the teacher in distillation
REFERENCE = "reference"  # role of a frozen model: the initial weights of the policy
Batch = TokenBatch | ColumnBatch  # any NamedTuple of arrays with a common leading batch dim
Columns = Mapping[str, tuple[tuple[int, ...], Any]]  # column name -> (shape per row, dtype)


class Mean(NamedTuple):
    """Numerator and denominator of a weighted mean."""

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> "Mean":
        """Sums values with weights of the same shape; values of weight 0 are ignored, including NaN and infinity."""
        weights = weights.astype(jnp.float32)
        return cls(jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), jnp.sum(weights))

    def value(self) -> jax.Array:
        """Returns `total / weight`, or 0 if the total weight is 0."""
        return self.total / jnp.maximum(self.weight, 1e-9)


Losses = tuple[Mean, dict[str, Mean]]  # (loss to minimize, metrics by name)


def means_of(values: Mapping[str, jax.Array], weights: jax.Array) -> dict[str, Mean]:
    """Applies `Mean.of` to each value."""
    return {name: Mean.of(each, weights) for name, each in values.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrozenModel:
    """A separate model that the loss reads but does not train."""

    params: Params
    apply: Apply = field(metadata={"static": True})
    vocab_size: int = field(metadata={"static": True})  # without padding of the embedding and the head


# Requirements


def no_extra_params(model: ModelConfig) -> dict[str, ParamSpec]:
    return {}


@dataclass(frozen=True)
class ModelNeeds:
    """Requirements of an objective for the model."""

    num_labels: int | None = 0  # outputs per token instead of logits; 0: logits; None: the number of data.classes
    is_token_level: bool = True  # predicts tokens; False: scores a text at its last token
    is_token_wise: bool = False  # the loss is independent per token, so tokens of a row may be permuted
    masks: tuple[AttentionMask, ...] = tuple(AttentionMask)  # valid model.attention.mask
    multi_token: bool = False  # trains the multi-token prediction modules of model.mtp_num_layers
    extra_params: Callable[[ModelConfig], dict[str, ParamSpec]] = no_extra_params  # trained with the model's parameters


class Sync(NamedTuple):
    """Schedule of a frozen copy that follows the policy: copy <- (1 - share) copy + share policy."""

    every: int  # updates
    share: float


@dataclass(frozen=True)
class FrozenModelSpec:
    """A frozen model that a loss reads."""

    source: str | None = None  # run or checkpoint of any architecture; None: init_from, with the policy's architecture
    key: str = "init_from"  # config key that names the source
    precompute: bool = False  # compute its outputs once per row before training and store them
    # keep the weights in the optimizer state and update them from the policy; see `trainer.reference_sync`
    sync: Sync | None = None


@dataclass(frozen=True)
class FrozenNeeds:
    """Frozen models of an objective, by role."""

    models: Mapping[str, FrozenModelSpec] = field(default_factory=dict)

    @property
    def precomputed(self) -> str | None:
        """Role whose outputs are stored before training; at most one."""
        return next((role for role, spec in self.models.items() if spec.precompute), None)

    @property
    def synced(self) -> dict[str, Sync]:
        """Roles whose weights are part of the optimizer state."""
        return {role: spec.sync for role, spec in self.models.items() if spec.sync is not None}

    @property
    def loaded(self) -> dict[str, FrozenModelSpec]:
        """Roles whose weights are loaded from their source at start-up."""
        return {role: spec for role, spec in self.models.items() if spec.sync is None}


@dataclass
class ObjectiveConfig:
    """Base of all objective configs."""

    kind: str = ""
    # scale of NEFTune embedding noise during training [2310.05914], usually 5 to 15; 0 disables it
    neftune_alpha: float = field(default=0.0, metadata={"min": 0})

    @property
    def data_needs(self) -> DataNeeds:
        return NO_NEEDS

    @property
    def model_needs(self) -> ModelNeeds:
        return ModelNeeds()

    @property
    def frozen_needs(self) -> FrozenNeeds:
        return FrozenNeeds()

    def check_classes(self, num_classes: int) -> None:
        """Raises: ValueError if the number of `data.classes` does not fit the objective."""

    def check_frozen_model(self, role: str, model: ModelConfig, frozen: ModelConfig) -> None:
        """Raises: ValueError if the loss cannot compare `model` with the frozen model of this role."""

    def build(self, token_bytes: np.ndarray | None) -> "Objective":
        """Builds the objective. `token_bytes` [V] i32: bytes of text per token, for bits per byte.

        Raises: ValueError naming key, value and reason if keys are incompatible.
        """
        raise TypeError(f"objective.kind={self.kind}: choose an objective with objective=NAME")


# Losses


def run_model(
    apply: Apply, params: Params, batch: TokenBatch, rng: jax.Array | None = None, **options: Any
) -> ModelOutput:
    """Runs the forward pass over rows [B, L]. `rng` None: no dropout."""
    return apply(
        params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids, rng=rng, **options
    )


class LossInputs(NamedTuple):
    """Inputs of a loss."""

    apply: Apply
    params: Params
    frozen: Mapping[str, Any]  # role -> a `FrozenModel`, or parameters for `apply`
    batch: TokenBatch
    columns: Mapping[str, jax.Array]
    rng: jax.Array | None  # None in evaluation: no dropout

    def forward(self, batch: TokenBatch | None = None, **options: Any) -> ModelOutput:
        """Runs the policy's forward pass over `batch` (default: the batch of the loss)."""
        return run_model(self.apply, self.params, self.batch if batch is None else batch, self.rng, **options)

    def with_frozen(self, role: str) -> "LossInputs":
        """Returns inputs with the same batch and the frozen model of this role, without dropout."""
        model = self.frozen[role]
        own = isinstance(model, FrozenModel)
        apply, params = (model.apply, model.params) if own else (self.apply, model)
        return self._replace(apply=apply, params=params, rng=None)


class Objective:
    """Base class of objectives: a subclass has a `config` and implements `compute_loss`."""

    config: Any  # ObjectiveConfig
    has_eval_outputs = False  # True if `predict` and `eval_report` are implemented

    def compute_loss(self, inputs: LossInputs) -> Losses:
        raise NotImplementedError

    def loss(
        self, apply: Apply, params: Params, frozen: Mapping[str, Any], batch: Batch, rng: jax.Array | None
    ) -> Losses:
        """Returns (loss to minimize, metrics). `rng` None, as in evaluation: no dropout."""
        return self.compute_loss(LossInputs(apply, params, frozen, tokens_of(batch), columns_of(batch), rng))

    def batch_spec(self, batch_size: int, seq_len: int) -> Batch:
        """Returns the batch as `jax.ShapeDtypeStruct`s, for memory estimates, tests and input checks."""
        needs: DataNeeds = self.config.data_needs
        sides = (needs.texts,) if needs.texts > 1 else ()
        columns: Columns = {name: (shape, np.float32) for name, shape in needs.columns.items()}
        if self.config.frozen_needs.precomputed:
            columns = {**columns, **self.column_spec(seq_len)}
        spec = token_spec(batch_size, *sides, seq_len)
        return column_spec(spec, columns) if columns else spec

    # Objectives that support precomputed outputs of a frozen model (`FrozenModelSpec.precompute`).

    def columns(self, apply: Apply, frozen: Mapping[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """Computes these outputs, each [B, ...]: batch columns that the loss reads instead of running the model."""
        return self.compute_columns(LossInputs(apply, None, frozen, tokens_of(batch), {}, None))

    def compute_columns(self, inputs: LossInputs) -> dict[str, jax.Array]:
        raise NotImplementedError

    def column_spec(self, seq_len: int) -> Columns:
        raise NotImplementedError

    def column_settings(self) -> dict[str, Any]:
        """Returns the JSON-able settings that the columns depend on."""
        return {}

    # Objectives whose metrics are not means over batches.

    def eval_outputs(
        self, apply: Apply, params: Params, frozen: Mapping[str, Any], batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Returns predictions [B, L, ...] and labels [B, L] i32; -1: no label."""
        tokens = tokens_of(batch)
        return self.predict(run_model(apply, params, tokens), tokens)

    def predict(self, output: ModelOutput, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError

    def eval_report(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns metrics by name from all predictions [N, ...] and labels [N] of an evaluation."""
        raise NotImplementedError

    # Objectives whose model scores texts (`ModelNeeds.is_token_level` is False).

    def read(self, apply: Apply, params: Params, batch: TokenBatch) -> jax.Array:
        """Returns the outputs [B, O] f32 for rows of one text each."""
        return self.score_texts(run_model(apply, params, batch), batch)

    def score_texts(self, output: ModelOutput, batch: TokenBatch) -> jax.Array:
        raise NotImplementedError

    def describe_output(self, values: list[float], classes: list[str]) -> dict[str, Any]:
        """Returns the O outputs of `read` for one text by name, JSON-able."""
        raise NotImplementedError


@dataclass(frozen=True)
class WrappedObjective(Objective):
    """Applies `wrap` to the model before calling the inner objective; delegates everything else."""

    objective: Objective

    def wrap(
        self, apply: Apply, params: Params, frozen: Mapping[str, Any], batch: Batch, rng: jax.Array | None
    ) -> tuple[Apply, Params]:
        """Returns the (apply, params) that the inner objective receives."""
        raise NotImplementedError

    @property
    def config(self) -> Any:  # type: ignore[override]
        return self.objective.config

    @property
    def has_eval_outputs(self) -> bool:  # type: ignore[override]
        return self.objective.has_eval_outputs

    def loss(self, apply, params, frozen, batch, rng) -> Losses:
        return self.objective.loss(*self.wrap(apply, params, frozen, batch, rng), frozen, batch, rng)

    def eval_outputs(self, apply, params, frozen, batch) -> tuple[jax.Array, jax.Array]:
        return self.objective.eval_outputs(*self.wrap(apply, params, frozen, batch, None), frozen, batch)

    def eval_report(self, predictions, labels) -> dict[str, float]:
        return self.objective.eval_report(predictions, labels)

    def columns(self, apply, frozen, batch) -> dict[str, jax.Array]:
        return self.objective.columns(apply, frozen, batch)

    def column_spec(self, seq_len: int) -> Columns:
        return self.objective.column_spec(seq_len)

    def column_settings(self) -> dict[str, Any]:
        return self.objective.column_settings()


def token_spec(*shape: int) -> TokenBatch:
    """Returns the `batch_spec` of a token batch with fields of this shape."""
    return TokenBatch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in DTYPES))


def column_spec(spec: TokenBatch | ColumnBatch, columns: Columns) -> ColumnBatch:
    """Returns the batch spec with columns added."""
    B = spec.tokens.shape[0]
    added = {name: jax.ShapeDtypeStruct((B, *shape), dtype) for name, (shape, dtype) in columns.items()}
    return ColumnBatch(*tokens_of(spec), {**columns_of(spec), **added})


class BatchSource(Protocol):
    """Source of training batches. Offline data ignores the train state; a rollout source samples with it.

    Batches follow one global order of rows, so the position in it is all that a resumed run needs.
    """

    batch_size: int  # rows of the global batch

    def next_batch(self, state: Any) -> Batch:
        """Returns the next global batch, placed on the mesh. `state`: `TrainState` before the update."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns the JSON-able position of the next batch; `next_index` is its first row."""
        ...

    def set_state(self, saved: dict[str, Any]) -> None:
        """Restores a saved position. Raises: ValueError if it was saved with other data."""
        ...

    def skip_to(self, row: int) -> None:
        """Moves to a row of the global order, for example to skip rows after a rollback."""
        ...

    def global_batch(self) -> Batch:
        """Returns the next batch of all processes on the host without advancing, to record a rollback."""
        ...

    def close(self) -> None:
        """Stops background work. Keeps the position; `next_batch` restarts the work."""
        ...
