"""Initializes or restores a run: its checkpoint, initial weights (`init_from`) and frozen models."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from configs.schema import Resume, RunConfig
from data.tokenizers.kinds import from_files, load_tokenizer, save_tokenizer
from data.tokenizers.tokenizer import Tokenizer, first_difference
from launch.attention_kernel import build_checked_core
from launch.build import Core, build_source, model_config
from launch.corpora import Corpora
from launch.multihost import is_main_process, log, publish_files, sync_processes
from launch.planning.search import resolve_auto_mesh
from launch.precompute import NO_TABLES, Tables, fill_tables, open_tables
from launch.pruned_init import prune_source
from launch.rollbacks import next_row
from launch.run_folder import RunFolder, refuse_drift
from launch.weights_source import (
    AdapterBase,
    WeightsSource,
    load_base,
    load_frozen_model,
    recorded_base,
    resolve_weights,
    with_head,
)
from models.mtp import MTP
from models.transformer import init_params
from trainer.adapters import BASE
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.objective import BatchSource, FrozenModel, FrozenModelSpec, Params
from trainer.state import TrainState


def check_resume(config: RunConfig, folder: RunFolder, checkpointer: Checkpointer) -> None:
    """Raises: ValueError if `resume` forbids the start, or if a key that the checkpoints depend on has changed."""
    steps = checkpointer.steps()
    if not steps and config.resume is Resume.must:
        raise ValueError(f"resume=must: {checkpointer.location} has no checkpoint; resume=auto starts a new run")
    superseded = checkpointer.superseded() if not steps else []
    if superseded:
        raise ValueError(
            f"{checkpointer.location}: a reset was interrupted before its first save; rename {superseded[-1]} to "
            f"{superseded[-1].partition('.')[0]} to repeat it, or choose another run=NAME"
        )
    if steps and config.resume is Resume.never:
        raise ValueError(
            f"resume=never: the run {folder.name!r} has checkpoints up to step {steps[-1]}; choose another "
            "run=NAME, or resume=auto to continue it"
        )
    if steps and folder.config.exists():
        refuse_drift(folder.saved_config(), config, folder.name)


def restore_tokenizer(folder: RunFolder, checkpointer: Checkpointer) -> None:
    """Restores the tokenizer of the latest checkpoint if the run folder has none.

    Raises: ValueError if the folder holds a different one.
    """
    step = checkpointer.latest_valid_step()
    if step is None:
        return
    saved, there = from_files(checkpointer.read_tokenizer(step)), load_tokenizer(folder.tokenizer)
    difference = None if there is None else first_difference(saved, there)
    if difference is not None:
        raise ValueError(
            f"{folder.tokenizer}: its {difference} differs from that of the checkpoint of step {step}; delete this "
            "folder to restore the tokenizer of the checkpoint"
        )
    sync_processes("tokenizer compared")
    if there is None and is_main_process():
        save_tokenizer(saved, folder.tokenizer)
    publish_files(folder, "tokenizer restored")


@dataclass(frozen=True)
class InitialState:
    """The state that a run starts from."""

    state: TrainState
    hook_states: dict[str, Any]  # saved states by hook name
    reset: list[str]  # state that was discarded
    line: str  # log line


def load_adapter_base(config: RunConfig, core: Core, checkpointer: Checkpointer) -> AdapterBase | None:
    """Loads the frozen base of adapters: the one that the latest checkpoint names, otherwise `init_from`.

    Raises: ValueError if there is none, or if its weights have changed.
    """
    if core.adaptation is None:
        return None
    _refuse_pruning(config, "adapters train on their complete base")
    step = checkpointer.latest_valid_step()
    if step is not None:
        return recorded_base(core.adaptation, checkpointer, step, config.output_dir, log)
    if config.init_from is None:
        raise ValueError(
            f"adapter.method={config.adapter.method.name}: adapters need trained weights; set init_from=RUN or "
            "init_from=hf:FOLDER"
        )
    return load_base(core.adaptation, config.init_from, config.output_dir, log)


class Frozen(NamedTuple):
    """The frozen models of a run, their records in checkpoints, and precomputed outputs of one of them."""

    models: dict[str, Any]
    records: dict[str, dict[str, str]]
    tables: Tables = NO_TABLES


def load_frozen_models(
    config: RunConfig, core: Core, checkpointer: Checkpointer, corpora: Corpora, base: AdapterBase | None
) -> Frozen:
    """Loads the base of adapters and each frozen model that the objective needs.

    A precomputed one (`FrozenModelSpec.precompute`) is freed once its outputs are stored, and is not loaded at all if
    they are complete and a checkpoint records where they are from.

    Raises: ValueError if one is not given, or if its weights have changed.
    """
    models, records = frozen_models(base), {} if base is None else {BASE: base.record}
    step = checkpointer.latest_valid_step()
    known = {} if step is None else checkpointer.read_json(step, "config")
    needs, tokenizer = config.objective.frozen_needs, corpora.tokenizer
    cached = needs.precomputed
    if cached in known and (tables := open_tables(config, core, corpora, known[cached])).complete:
        return Frozen(
            models | _without_weights(needs.models[cached], cached, core, tokenizer),
            records | {cached: known[cached]},
            tables,
        )
    for role in needs.synced:
        if config.init_from is None and step is None:
            raise _no_source(config, role)
    for role, spec in needs.loaded.items():
        models[role], records[role] = _frozen_model(config, core, role, spec, known.get(role, {}), base, tokenizer)
    if cached is None:
        return Frozen(models, records)
    tables = fill_tables(config, core, corpora, models, records[cached], log)
    del models[cached]
    return Frozen(models | _without_weights(needs.models[cached], cached, core, tokenizer), records, tables)


def _without_weights(spec: FrozenModelSpec, role: str, core: Core, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns a placeholder for a precomputed model with its own architecture, which holds its vocabulary size."""
    return {} if spec.source is None else {role: FrozenModel({}, core.apply, tokenizer.vocab_size)}


def _frozen_model(
    config: RunConfig,
    core: Core,
    role: str,
    spec: FrozenModelSpec,
    known: dict[str, str],
    base: AdapterBase | None,
    tokenizer: Tokenizer,
) -> tuple[Any, dict[str, str]]:
    """Loads a frozen model; returns it and its record for checkpoints. `known`: the record in the latest one."""
    source = known.get("origin") or spec.source or config.init_from
    if source is None:
        raise _no_source(config, role)
    if spec.source is None:
        _refuse_pruning(config, f"the {role} of a policy is the complete model of init_from")
        is_base = base is not None and (known == base.record if known else base.start is None)
        if base is not None and is_base and config.adapter.quantize_base.name == "none":
            return base.params, base.record  # shared: only one copy in memory
    sha256 = known.get("sha256")
    return load_frozen_model(config.objective, role, source, tokenizer, core, config.output_dir, log, sha256=sha256)


def _no_source(config: RunConfig, role: str) -> ValueError:
    return ValueError(
        f"init_from=null: objective={config.objective.kind} needs a {role} model, which is a copy of the initial "
        "weights; set init_from=RUN or init_from=hf:FOLDER, or choose an objective or loss without one"
    )


def _refuse_pruning(config: RunConfig, why: str) -> None:
    if config.prune.layers:
        raise ValueError(f"prune.layers={config.prune.layers}: {why}; leave it out")
    if config.prune.width.active:
        raise ValueError(f"prune.width: {why}; leave it out")


class RunParts(NamedTuple):
    """The parts of a run, before it has a state."""

    config: RunConfig  # with `mesh=auto` resolved
    core: Core
    base: AdapterBase | None
    frozen: Frozen
    source: BatchSource  # the caller closes it


def build_run(config: RunConfig, corpora: Corpora, checkpointer: Checkpointer) -> RunParts:
    """Builds mesh, model, optimizer, frozen models and batch source. Raises: as the functions that it calls."""
    config = resolve_auto_mesh(config, model_config(config, corpora.tokenizer), log)
    core = build_checked_core(config, corpora.tokenizer)
    base = load_adapter_base(config, core, checkpointer)
    frozen = load_frozen_models(config, core, checkpointer, corpora, base)
    return RunParts(config, core, base, frozen, build_source(config, corpora, core, frozen.tables.train))


def init_or_resume(
    config: RunConfig, core: Core, source: BatchSource, checkpointer: Checkpointer, base: AdapterBase | None = None
) -> InitialState:
    """Restores the latest valid checkpoint and the data position, or initializes from `init_from` or randomly."""
    step, run = checkpointer.latest_valid_step(), f"run {config.run!r}"
    frozen = frozen_models(base)
    if step is None:
        if base is not None and core.adaptation is not None:
            given = None if base.start is None else base.start(core.adaptation)
            state = core.init_state(frozen, given)
            which = "new adapters" if base.start is None else f"the adapters of {config.init_from}"
            return InitialState(state, {}, [], f"{run}: starts with {which} on the weights of {base.name}")
        if config.init_from is None:
            return InitialState(core.init_state(), {}, [], f"{run}: starts")
        source_weights = prune_source(resolve_weights(config.init_from, config.output_dir, log), config)
        source_weights = with_head(source_weights, core.model.num_labels)
        # Weight averages and similar state are initialized from these weights, not from random ones.
        state = core.init_state(params=initial_params(core, source_weights, config.seed))
        return InitialState(state, {}, [], f"{run}: starts with the weights of {source_weights.name}")
    # A requeued job runs the same command: it must not reset again.
    done = checkpointer.read_json(step, "config")["run"]["reset"] == config.reset
    reset = [] if done else config.reset
    if "optimizer" in reset:
        fresh = core.init_state(params=checkpointer.restore_params(step, core.abstract.params))
        state = dataclasses.replace(fresh, step=fresh.step + step)
    else:
        state = checkpointer.restore(step, core.abstract).state
    if "data" not in reset:
        source.set_state(checkpointer.read_json(step, "source"))
        first_row = next_row(RunFolder(checkpointer.folder.parent), step)
        if first_row is not None:  # a rollback skipped rows
            source.skip_to(first_row)
    hook_states = checkpointer.read_json(step, "extra")
    if "step" in reset:
        # Later checkpoints would collide with the new steps: they are renamed.
        state, hook_states = dataclasses.replace(state, step=state.step * 0), {}
        checkpointer.discard_after(0)
    without = f", without its {' and '.join(reset)}" if reset else ""
    already = f" (reset=[{','.join(config.reset)}] was done before)" if config.reset and done else ""
    return InitialState(state, hook_states, reset, f"{run}: resumes at step {step}{without}{already}")


def initial_params(core: Core, weights: WeightsSource, seed: int) -> Params:
    """Returns the source's parameters; multi-token-prediction modules are new if it has none."""
    abstract = core.own
    if MTP not in abstract or weights.model.mtp_num_layers:
        return weights.params(abstract)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract[MTP])
    fresh = jax.jit(lambda key: init_params(core.model, key)[MTP], out_shardings=shardings)
    own = {name: leaf for name, leaf in abstract.items() if name != MTP}
    return {**weights.params(own), MTP: fresh(jax.random.key(seed))}


def frozen_models(base: AdapterBase | None) -> dict[str, Any]:
    """Returns the base of adapters as a frozen model, by role."""
    return {} if base is None else {BASE: base.params}
