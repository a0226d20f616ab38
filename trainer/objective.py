"""Contracts of every training phase.

A phase is four choices: a loss, the frozen models that it reads, the source of its batches, and the parameters that
train. The first three are described here; the last is an optimizer mask or a parameter transform.

An objective states its needs as three plain values: `DataNeeds` of records and rows, `ModelNeeds` of the model,
`FrozenNeeds` of frozen models by role. Everything else reads these values and never asks for an objective's type.

Losses travel as a sum and a weight, never as a mean, so that they add up exactly over microbatches, devices, steps
and hosts: the step differentiates the sum and divides once by the global weight.
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
TEACHER = "teacher"  # role of a frozen model: the model to learn from
REFERENCE = "reference"  # role of a frozen model: the weights from which a policy started
Batch = TokenBatch | ColumnBatch  # any NamedTuple of arrays that share their leading batch dim
Columns = Mapping[str, tuple[tuple[int, ...], Any]]  # shape in one row, and dtype, by name


class Mean(NamedTuple):
    """A weighted mean that has not been divided yet."""

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> "Mean":
        """Of values by weights of the same shape; what weighs nothing is left out, whatever it is."""
        weights = weights.astype(jnp.float32)
        return cls(jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), jnp.sum(weights))

    def value(self) -> jax.Array:
        """`total / weight`, and 0 where nothing was weighed."""
        return self.total / jnp.maximum(self.weight, 1e-9)


Losses = tuple[Mean, dict[str, Mean]]  # the loss to minimise, and metrics by name


def means_of(values: Mapping[str, jax.Array], weights: jax.Array) -> dict[str, Mean]:
    """`Mean.of` each."""
    return {name: Mean.of(each, weights) for name, each in values.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrozenModel:
    """A model of its own that a loss only reads."""

    params: Params
    apply: Apply = field(metadata={"static": True})
    vocab_size: int = field(metadata={"static": True})  # tokens that there are; rows beyond them are padding


# Needs


def no_extra_params(model: ModelConfig) -> dict[str, ParamSpec]:
    return {}


@dataclass(frozen=True)
class ModelNeeds:
    """What an objective needs of the model."""

    num_labels: int | None = 0  # numbers for each token in place of logits; 0: logits; None: one for each data.classes
    is_token_level: bool = True  # tokens are predicted; False: a text is scored at its end
    is_token_wise: bool = False  # each token's loss is independent of the others: tokens of a row may be permuted
    masks: tuple[AttentionMask, ...] = tuple(AttentionMask)  # valid model.attention.mask
    multi_token: bool = False  # trains the modules of model.mtp_num_layers
    extra_params: Callable[[ModelConfig], dict[str, ParamSpec]] = no_extra_params  # trained next to the model's own


class Sync(NamedTuple):
    """A copy that follows the policy: copy <- (1 - share) copy + share policy."""

    every: int  # updates
    share: float


@dataclass(frozen=True)
class FrozenModelSpec:
    """One frozen model that a loss reads."""

    source: str | None = None  # a run or checkpoint, of any architecture; None: init_from, of the policy's architecture
    key: str = "init_from"  # the config key that names the source
    precompute: bool = False  # its outputs are computed once per row before training, and stored
    # the weights live in the optimizer state and follow the policy, see `trainer.reference_sync`
    sync: Sync | None = None


@dataclass(frozen=True)
class FrozenNeeds:
    """Frozen models by role name."""

    models: Mapping[str, FrozenModelSpec] = field(default_factory=dict)

    @property
    def precomputed(self) -> str | None:
        """The role whose outputs are stored before training; at most one is."""
        return next((role for role, spec in self.models.items() if spec.precompute), None)

    @property
    def synced(self) -> dict[str, Sync]:
        """Roles that live in the optimizer state."""
        return {role: spec.sync for role, spec in self.models.items() if spec.sync is not None}

    @property
    def loaded(self) -> dict[str, FrozenModelSpec]:
        """Roles whose weights are read from their source at the start."""
        return {role: spec for role, spec in self.models.items() if spec.sync is None}


@dataclass
class ObjectiveConfig:
    """Base of all objectives' configs."""

    kind: str = ""
    # Noise on embeddings in training [NEFTune, 2310.05914]: 5 to 15; 0: none
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
        """Raises: ValueError where so many `data.classes` do not fit."""

    def check_frozen_model(self, role: str, model: ModelConfig, frozen: ModelConfig) -> None:
        """Raises: ValueError where the loss cannot compare `model` with the frozen model of this role."""

    def build(self, token_bytes: np.ndarray | None) -> "Objective":
        """`token_bytes` [V] i32: bytes of text in each token, for bits per byte.

        Raises: ValueError naming key, value and reason for keys that do not go together.
        """
        raise TypeError(f"objective.kind={self.kind}: choose one with objective=NAME")


# Losses


def run_model(
    apply: Apply, params: Params, batch: TokenBatch, rng: jax.Array | None = None, **options: Any
) -> ModelOutput:
    """Forward pass over rows [B, L]. `rng` None: no dropout."""
    return apply(
        params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids, rng=rng, **options
    )


class LossInputs(NamedTuple):
    """What a loss is computed from."""

    apply: Apply
    params: Params
    frozen: Mapping[str, Any]  # by role: a `FrozenModel`, or parameters for `apply`
    batch: TokenBatch
    columns: Mapping[str, jax.Array]
    rng: jax.Array | None  # None in evaluation: no dropout

    def forward(self, batch: TokenBatch | None = None, **options: Any) -> ModelOutput:
        """The policy's forward pass over its batch, or over another one."""
        return run_model(self.apply, self.params, self.batch if batch is None else batch, self.rng, **options)

    def of_frozen(self, role: str) -> "LossInputs":
        """The same batch under a frozen model, without dropout."""
        model = self.frozen[role]
        own = isinstance(model, FrozenModel)
        apply, params = (model.apply, model.params) if own else (self.apply, model)
        return self._replace(apply=apply, params=params, rng=None)


class Objective:
    """Base class of what is minimised: a subclass holds its `config` and implements `compute_loss`."""

    config: Any  # ObjectiveConfig
    has_eval_outputs = False  # `predict` and `eval_report` are implemented

    def compute_loss(self, inputs: LossInputs) -> Losses:
        raise NotImplementedError

    def loss(
        self, apply: Apply, params: Params, frozen: Mapping[str, Any], batch: Batch, rng: jax.Array | None
    ) -> Losses:
        """Returns the loss to minimise, and metrics. `rng` None, as in evaluation: no dropout."""
        return self.compute_loss(LossInputs(apply, params, frozen, tokens_of(batch), columns_of(batch), rng))

    def batch_spec(self, batch_size: int, seq_len: int) -> Batch:
        """The batch as `jax.ShapeDtypeStruct`s: for plans, tests and input checks."""
        needs: DataNeeds = self.config.data_needs
        sides = (needs.texts,) if needs.texts > 1 else ()
        columns: Columns = {name: (shape, np.float32) for name, shape in needs.columns.items()}
        if self.config.frozen_needs.precomputed:
            columns = {**columns, **self.column_spec(seq_len)}
        spec = token_spec(batch_size, *sides, seq_len)
        return column_spec(spec, columns) if columns else spec

    # Of an objective that can store the outputs of a frozen model for each row (`FrozenModelSpec.precompute`).

    def columns(self, apply: Apply, frozen: Mapping[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """These outputs, each [B, ...]: the columns of a batch that the loss reads in place of the model."""
        return self.compute_columns(LossInputs(apply, None, frozen, tokens_of(batch), {}, None))

    def compute_columns(self, inputs: LossInputs) -> dict[str, jax.Array]:
        raise NotImplementedError

    def column_spec(self, seq_len: int) -> Columns:
        raise NotImplementedError

    def column_settings(self) -> dict[str, Any]:
        """The part of the config on which the columns depend, JSON-able."""
        return {}

    # Of an objective with metrics that are no means over batches.

    def eval_outputs(
        self, apply: Apply, params: Params, frozen: Mapping[str, Any], batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Predictions [B, L, ...] and labels [B, L] i32, -1 where there is none."""
        tokens = tokens_of(batch)
        return self.predict(run_model(apply, params, tokens), tokens)

    def predict(self, output: ModelOutput, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError

    def eval_report(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Metrics by name of all predictions [N, ...] and labels [N] of an evaluation."""
        raise NotImplementedError

    # Of an objective whose model scores texts (`ModelNeeds.is_token_level` is False).

    def read(self, apply: Apply, params: Params, batch: TokenBatch) -> jax.Array:
        """[B, O] f32: the output for each row, which holds one text."""
        return self.score_texts(run_model(apply, params, batch), batch)

    def score_texts(self, output: ModelOutput, batch: TokenBatch) -> jax.Array:
        raise NotImplementedError

    def describe_output(self, values: list[float], classes: list[str]) -> dict[str, Any]:
        """JSON-able: the O numbers that `read` gives for one text, by name."""
        raise NotImplementedError


@dataclass(frozen=True)
class WrappedObjective(Objective):
    """An objective that sees its model through `wrap`, and is the same in all else."""

    objective: Objective

    def wrap(
        self, apply: Apply, params: Params, frozen: Mapping[str, Any], batch: Batch, rng: jax.Array | None
    ) -> tuple[Apply, Params]:
        """The model as the objective inside sees it."""
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
    """Token batches whose fields have this shape, as `batch_spec` gives them."""
    return TokenBatch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in DTYPES))


def column_spec(spec: TokenBatch | ColumnBatch, columns: Columns) -> ColumnBatch:
    """These token batches with columns added."""
    B = spec.tokens.shape[0]
    added = {name: jax.ShapeDtypeStruct((B, *shape), dtype) for name, (shape, dtype) in columns.items()}
    return ColumnBatch(*tokens_of(spec), {**columns_of(spec), **added})


class BatchSource(Protocol):
    """Where batches come from. Offline data ignores the state; a rollout source samples with it.

    Each batch has a place in one global order of rows, which is all that a resume needs to know.
    """

    batch_size: int  # rows of the global batch

    def next_batch(self, state: Any) -> Batch:
        """Returns the next global batch, placed on the mesh. `state`: the `TrainState` before the update."""
        ...

    def get_state(self) -> dict[str, Any]:
        """JSON-able position of the next batch; `next_index` is its first row."""
        ...

    def set_state(self, saved: dict[str, Any]) -> None:
        """Moves to a saved position. Raises: ValueError where it belongs to other data."""
        ...

    def skip_to(self, row: int) -> None:
        """Moves to a row of the global order, as after a rollback that leaves rows out."""
        ...

    def global_batch(self) -> Batch:
        """The next batch of all processes on the host, without moving on: for the record of a rollback."""
        ...

    def close(self) -> None:
        """Stops background work. The position stays, and `next_batch` starts it again."""
        ...
