"""The contracts on which every phase stands.

A phase is four choices: a loss, the frozen models that it reads, where its batches come from, and which
parameters train. The first three are described here; the last is an optimizer mask or a parameter transform.

Losses travel as a sum and a weight, never as a mean, so that they add up exactly over microbatches, devices, steps
and hosts: the step differentiates the sum and divides once by the global weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.batch import DTYPES, ColumnBatch, TokenBatch
from data.records.encoding import DataFormat
from models.config import ModelConfig
from models.transformer import Apply
from trainer.objective_params import ParamSpec

Params = Any  # a nested dict of arrays
TEACHER = "teacher"  # among the frozen models: a `FrozenModel` that is learnt from
REFERENCE = "reference"  # among the frozen models: the weights that a policy began with
Batch = TokenBatch | ColumnBatch  # any NamedTuple of arrays that share their leading batch dim


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrozenModel:
    """A model of its own that a loss only reads."""

    params: Params
    apply: Apply = field(metadata={"static": True})
    vocab_size: int = field(metadata={"static": True})  # tokens that there are; rows beyond them are padding


class Objective(Protocol):
    """What is minimised."""

    def loss(
        self, apply: Apply, params: Params, frozen: Mapping[str, Any], batch: Batch, rng: jax.Array | None
    ) -> tuple[Mean, dict[str, Mean]]:
        """Returns the loss to minimise and metrics beside it. `rng` is None in evaluation: no dropout."""
        ...

    def batch_spec(self, batch_size: int, seq_len: int) -> Batch:
        """The batch as `jax.ShapeDtypeStruct`s: for plans, tests and input checks."""
        ...


class PrecomputesColumns(Protocol):
    """An objective that reads a frozen model only through numbers that can be kept for each row."""

    def columns(self, apply: Apply, frozen: Mapping[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """These numbers, each [B, ...]: what the loss looks for in the columns of a batch."""
        ...

    def column_spec(self, seq_len: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape of each in one row, and dtype."""
        ...

    def column_settings(self) -> dict[str, Any]:
        """What of its config they depend on, JSON-able."""
        ...


@dataclass
class ObjectiveConfig:
    """Base of all objectives' configs."""

    kind: str = ""
    neftune_alpha: float = 0.0  # noise on embeddings in training [NEFTune, 2310.05914]: 5 to 15; 0: none

    @property
    def records(self) -> tuple[DataFormat, ...]:
        """What it can learn from."""
        return (DataFormat.text, DataFormat.chat)

    @property
    def is_token_level(self) -> bool:
        """Whether tokens are learnt; else a text is judged as a whole."""
        return True

    @property
    def is_token_wise(self) -> bool:
        """Whether each token is learnt by itself, so that the order in which those of a row lie is nothing to it."""
        return False

    @property
    def reads_margins(self) -> bool:
        """Whether pairs must say by how much the chosen answer is better."""
        return False

    @property
    def per_row(self) -> int:
        """Of pairs: how many one row may hold; 1: each is padded to a row of its own."""
        return 1

    @property
    def num_negatives(self) -> int:
        """Of matches: how many texts each record has beside the two that belong together."""
        return 0

    def outputs(self, num_classes: int) -> int:
        """Numbers that the model gives for a token; 0: logits. Raises: ValueError where the classes are not fit."""
        return 0

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the weights that the run began with, as the frozen model `REFERENCE`."""
        return False

    @property
    def teacher_name(self) -> str | None:
        """What the loss learns from, as the frozen model `TEACHER`: a run or a published checkpoint."""
        return None

    @property
    def moves_reference(self) -> bool:
        """Whether the frozen model `REFERENCE` is kept in the optimizer's state instead, see `trainer.reference_sync`."""
        return False

    def wrap_optimizer(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """The optimizer with what the loss keeps beside it."""
        return optimizer

    @property
    def precomputed_model(self) -> str | None:
        """Which frozen model is asked about each row once, before training, and is not needed thereafter."""
        return None

    def extra_params(self, model: ModelConfig) -> dict[str, ParamSpec]:
        """What the loss learns beside the parameters of `model`."""
        return {}

    def check_teacher(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Raises: ValueError where the one cannot learn from the other so."""

    def build(self, token_bytes: np.ndarray | None) -> Objective:
        """`token_bytes` [V] i32: how many bytes of text each token stands for, for bits per byte."""
        raise TypeError(f"objective.kind={self.kind}: choose one with objective=NAME")


def token_spec(*shape: int) -> TokenBatch:
    """Token batches whose fields have this shape, as `batch_spec` gives them."""
    return TokenBatch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in DTYPES))


def column_spec(spec: TokenBatch, columns: Mapping[str, tuple[tuple[int, ...], Any]]) -> ColumnBatch:
    """These token batches with columns beside them."""
    B = spec.tokens.shape[0]
    of = {name: jax.ShapeDtypeStruct((B, *shape), dtype) for name, (shape, dtype) in columns.items()}
    return ColumnBatch(*spec, of)


class BatchSource(Protocol):
    """Where batches come from. Offline data ignores the state; a rollout source samples with it."""

    def next_batch(self, state: Any) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """JSON-able position of the next batch."""
        ...

    def set_state(self, saved: dict[str, Any]) -> None: ...
