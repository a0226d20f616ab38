"""Builds the parts of a run from its `RunConfig`: the only place that knows all of them.

`build_core` needs no data and no weights, so a plan or a test can build any run from shapes alone.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from configs.schema import RunConfig
from configs.tasks import TrainConfig
from data.batch import TokenBatch
from data.column_cache import ColumnCache
from data.loader import Mixture, Rows, TokenLoader, make_rows, validation_batches, with_columns
from data.tokenizers.tokenizer import Tokenizer
from launch.corpora import Corpora
from models.adapters.lora import AdapterConfig
from models.config import AttentionMask, Dispatch, ModelConfig
from models.logical_axes import ShardingConstraint
from models.transformer import Apply, abstract_params, init_params, make_apply, param_axes
from trainer.adapters import BASE, AdapterLayout, AdapterObjective, Shard
from trainer.eval_loop import collect_outputs, evaluate_sources, report_outputs
from trainer.mesh import make_mesh
from trainer.objective import Batch, BatchSource, Objective, Params
from trainer.objective_params import init_objective_params, model_params, objective_param_axes, with_objective_params
from trainer.objectives.prefix_lm import Prefixed
from trainer.reference_sync import with_reference_sync
from trainer.sharding import (
    ShardingRules,
    batch_sharding,
    check_batch,
    check_seq_len,
    field_shardings,
    make_constrain,
    param_shardings,
    place_batch,
    process_rows,
    replicated,
    with_pipeline,
    with_shardings,
)
from trainer.state import TrainState, abstract_state, init_sharded_state
from trainer.step import EvalStep, make_eval_step, make_train_step
from trainer.xla_options import compiler_options

# Data


# The core


@dataclass(frozen=True)
class Core:
    """Model, objective, optimizer and mesh, and the functions jitted from them; no weights yet."""

    model: ModelConfig
    mesh: Mesh | AbstractMesh
    rules: ShardingRules
    constrain: ShardingConstraint
    apply: Apply
    objective: Objective
    train_step: Any  # jitted, with the state donated: see `trainer.step.make_train_step`
    eval_step: EvalStep
    eval_outputs: Callable[..., Any] | None  # jitted `Objective.eval_outputs` of (params, frozen, batch), if it has any
    abstract: TrainState  # shapes and shardings
    init_state: Callable[..., TrainState]  # from `frozen` models if adapters train, or from given `params`
    adaptation: AdapterLayout | None  # None: the model parameters train
    batch_size: int
    sharding: NamedSharding  # of token fields [B, L]
    balanced: bool  # tokens of sharded rows are permuted by `trainer.sharding.balanced_token_order`

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows of the global batch that this process feeds."""
        return process_rows(self.sharding, self.batch_size)

    def place(self, batch: TokenBatch) -> TokenBatch:
        """Places this process's rows on its devices, as part of the global batch."""
        return place_batch(batch, self.sharding, self.batch_size, balanced=self.balanced)

    def batch_spec(self, seq_len: int) -> Batch:
        """Returns shapes and shardings of the global batch."""
        spec = self.objective.batch_spec(self.batch_size, seq_len)
        return with_shardings(spec, field_shardings(spec, self.sharding))

    @property
    def own(self) -> Params:
        """Shapes and shardings of the model parameters, if these train."""
        return model_params(self.abstract.params)

    def merged_params(self, params: Params, frozen: Mapping[str, Any]) -> Params:
        """Returns the model parameters, with adapters merged into their base, for generation."""
        return model_params(params) if self.adaptation is None else self.adaptation.merge(frozen[BASE], params)


def model_config(config: RunConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """Returns the model with its vocabulary size. Raises: ValueError if the tokenizer has more tokens."""
    model = config.model
    if tokenizer is None or model.vocab_size >= tokenizer.vocab_size:
        return model
    if model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; "
            "use at least as many, or 0 to take the tokenizer's"
        )
    return dataclasses.replace(model, vocab_size=tokenizer.vocab_size)


def build_core(
    config: RunConfig,
    tokenizer: Tokenizer | None,
    mesh: Mesh | AbstractMesh | None = None,
    constrain: ShardingConstraint | None = None,
) -> Core:
    """Builds the core on `mesh`, by default over all devices of the job; a plan passes its own mesh and `constrain`.

    Raises: ValueError if mesh, batch, model and optimizer are incompatible.
    """
    task = config.task if isinstance(config.task, TrainConfig) else TrainConfig()
    model = model_config(config, tokenizer)
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check_batch(config.data.batch_size, task.gradient_accumulation_steps, mesh, config.sharding)
    check_seq_len(config.data.seq_len, mesh, config.sharding)
    model = with_pipeline(model, config.data.batch_size // task.gradient_accumulation_steps, mesh, config.sharding)
    if model.position.name == "learned" and config.data.seq_len > model.max_seq_len:
        raise ValueError(
            f"data.seq_len={config.data.seq_len}: longer than model.max_seq_len={model.max_seq_len}, and positions "
            "are learned; shorten it, or raise model.max_seq_len"
        )
    model_needs, synced = config.objective.model_needs, config.objective.frozen_needs.synced
    extras = model_needs.extra_params(model)
    if extras and config.adapter.active:
        raise ValueError(
            f"adapter.method={config.adapter.method.name}: only adapters train, and objective={config.objective.kind} "
            f"also trains {', '.join(extras)}; compare models of the same width, or train without adapters"
        )
    axes, reads = {**param_axes(model), **objective_param_axes(extras)}, ()
    init = with_objective_params(extras, partial(init_params, model))
    shard = partial(param_shardings, mesh=mesh, rules=config.sharding)
    shardings = shard(axes, jax.eval_shape(init, jax.random.key(0)))
    adaptation = adapt(config.adapter, model, shardings, shard)
    if adaptation is not None:
        axes, init, reads = adaptation.axes, adaptation.init, (adaptation.stored,)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, adaptation.abstract)
    if synced and config.adapter.active:
        raise ValueError(
            f"adapter.method={config.adapter.method.name}: the {next(iter(synced))} of adapters is their base, which "
            "is frozen; set objective.ref_model_sync_steps=0, or train without adapters"
        )
    schedule = config.schedule.build(config.optimizer.learning_rate, task.num_steps)
    # Adapters have their own initialization, on trained weights.
    width = model if model.mup_base_width is not None and adaptation is None else None
    optimizer = with_reference_sync(config.optimizer.build(schedule, axes, width), synced)
    constrain = constrain or make_constrain(mesh, config.sharding)
    apply = make_apply(model, constrain, neftune_alpha=config.objective.neftune_alpha)
    objective = config.objective.build(_token_bytes(model, tokenizer))
    if model.attention.mask is AttentionMask.prefix:
        objective = Prefixed(objective)
    if adaptation is not None:
        objective = AdapterObjective(objective, adaptation.apply_adapters)
    step = make_train_step(
        objective, apply, optimizer, num_microbatches=task.gradient_accumulation_steps, schedule=schedule
    )
    sharding = batch_sharding(mesh, config.sharding)
    placement = {"param_shardings": shardings, "offload": config.optimizer.offload_state}
    abstract = abstract_state(init, optimizer, *reads, **placement)
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract)  # otherwise the partitioner chooses
    fresh = partial(init_sharded_state, **placement)

    def init_state(frozen: Mapping[str, Any] | None = None, params: Params | None = None) -> TrainState:
        key = jax.random.key(config.seed)
        if params is not None:
            return fresh(lambda key, params: {**init_objective_params(extras, key), **params}, optimizer, key, params)
        return fresh(init, optimizer, key, *((frozen or {})[BASE] for _ in reads))

    return Core(
        model=model,
        mesh=mesh,
        rules=config.sharding,
        constrain=constrain,
        apply=apply,
        objective=objective,
        train_step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(layout, None),
            compiler_options=compiler_options(constrain.platform, mesh.size),
        ),
        eval_step=jax.jit(make_eval_step(objective, apply)),
        eval_outputs=_eval_outputs(objective, apply, mesh) if objective.has_eval_outputs else None,
        abstract=abstract,
        init_state=init_state,
        adaptation=adaptation,
        batch_size=config.data.batch_size,
        sharding=sharding,
        balanced=_is_permutation_invariant(config, model),
    )


def _eval_outputs(objective: Objective, apply: Apply, mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """Outputs of a batch for evaluation, replicated to every process."""
    outputs = lambda params, frozen, batch: objective.eval_outputs(apply, params, frozen, batch)
    return jax.jit(outputs, out_shardings=(replicated(mesh), replicated(mesh)))


def _is_permutation_invariant(config: RunConfig, model: ModelConfig) -> bool:
    """Returns whether tokens of a row may be permuted: no expert capacity, and no random numbers by position."""
    a, objective = model.attention, config.objective
    capacity = model.moe.num_experts > 0 and model.moe.dispatch is Dispatch.capacity
    random = model.dropout or a.dropout or objective.neftune_alpha
    return objective.model_needs.is_token_wise and a.mask is not AttentionMask.prefix and not capacity and not random


def adapt(adapter: AdapterConfig, model: ModelConfig, shardings: Any, shard: Shard) -> AdapterLayout | None:
    """Returns the adapter layout of `model`; None without adapters. `shardings`: of the model parameters."""
    if not adapter.active:
        return None
    return AdapterLayout(adapter, param_axes(model), with_shardings(abstract_params(model), shardings), shard)


def _token_bytes(model: ModelConfig, tokenizer: Tokenizer | None) -> np.ndarray | None:
    if tokenizer is None:
        return None
    sizes = tokenizer.token_bytes()
    return np.pad(sizes, (0, model.vocab_size - len(sizes)))


def build_source(
    config: RunConfig, corpora: Corpora, core: Core, tables: Mapping[str, ColumnCache] | None = None
) -> BatchSource:
    """Builds the batch source of the mixture; `tables` hold precomputed columns of each source.

    Raises: ValueError if the run is longer than `data.max_epochs` allows.
    """
    sources = config.data.sources
    weights = {name: float(source.weight) for name, source in sources.items() if source.weight is not None}
    transform = config.data.transform.build(corpora.tokenizer, config.data.seq_len)
    mixture = Mixture(
        corpora.train,
        config.data,
        config.seed,
        weights or None,
        tables=tables,
        transform=transform,
        needs=config.objective.data_needs,
    )
    task = config.task
    if config.data.max_epochs is not None and isinstance(task, TrainConfig):
        rows = mixture.num_rows(config.data.max_epochs)
        if task.num_steps * core.batch_size > rows:
            raise ValueError(
                f"task.num_steps={task.num_steps}: {config.data.max_epochs:g} epochs hold only {rows:,} rows; "
                f"nearest valid: {rows // core.batch_size}"
            )
    return TokenLoader(
        mixture,
        batch_size=core.batch_size,
        slots=core.rows.tolist(),
        place=core.place,
        prefetch=config.data.prefetch,
    )


def build_evaluation(
    config: RunConfig,
    corpora: Corpora,
    core: Core,
    frozen: Mapping[str, Any] | None = None,
    tables: Mapping[str, ColumnCache] | None = None,
) -> Callable[..., dict[str, float]]:
    """Returns `evaluate(params, synced_models)`: `eval/SOURCE/loss` etc. on validation data; empty without any."""
    data = config.data
    transform = data.transform.build(corpora.tokenizer, data.seq_len)
    rows_of = lambda name, corpus: make_rows(corpus, data, config.seed, name, transform, config.objective.data_needs)
    rows = {name: rows_of(name, corpus) for name, corpus in corpora.validation.items()}
    rows = with_columns(rows, tables or {})

    def batches(packed: Rows) -> Iterator[TokenBatch]:
        return validation_batches(
            packed,
            batch_size=core.batch_size,
            slots=core.rows.tolist(),
            max_batches=data.max_eval_batches,
            place=core.place,
        )

    def evaluate(params: Params, moving: Mapping[str, Any] | None = None) -> dict[str, float]:
        sources = {name: batches(packed) for name, packed in rows.items()}
        models = {**(frozen or {}), **(moving or {})}
        found = evaluate_sources(core.eval_step, params, models, sources)
        if (outputs := core.eval_outputs) is not None:
            each = {name: collect_outputs(outputs, params, models, batches(p)) for name, p in rows.items()}
            found |= report_outputs(core.objective, each)
        return found

    return evaluate
