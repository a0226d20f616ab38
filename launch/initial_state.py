"""What a run begins with: its newest checkpoint, other weights or none, and the models that it only reads."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from configs.schema import Resume, RunConfig
from data.tokenizers.kinds import from_files, load_tokenizer, save_tokenizer
from data.tokenizers.tokenizer import Tokenizer, first_difference
from launch.attention_kernel import build_checked_core
from launch.build import (
    Core,
    Corpora,
    build_source,
    is_main_process,
    log,
    model_config,
    publish_files,
    sync_processes,
)
from launch.planning.search import resolve_auto_mesh
from launch.precompute import NO_TABLES, Tables, fill_tables, open_tables
from launch.rollbacks import next_row
from launch.run_folder import RunFolder, refuse_drift
from launch.weights_source import (
    AdapterBase,
    WeightsSource,
    load_base,
    load_frozen_model,
    prune_source,
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
    """Raises: ValueError where `resume` forbids what there is, or a key changed that the checkpoints depend on."""
    steps = checkpointer.steps()
    if not steps and config.resume is Resume.must:
        raise ValueError(f"resume=must: {checkpointer.location} holds no checkpoint; resume=auto begins afresh")
    aside = checkpointer.superseded() if not steps else []
    if aside:
        raise ValueError(
            f"{checkpointer.location}: a reset was cut off before its first save; rename {aside[-1]} to "
            f"{aside[-1].partition('.')[0]} to do it again, or give another run=NAME"
        )
    if steps and config.resume is Resume.never:
        raise ValueError(
            f"resume=never: the run {folder.name!r} has checkpoints up to step {steps[-1]}; give another run=NAME, "
            "or resume=auto to go on with it"
        )
    if steps and folder.config.exists():
        refuse_drift(folder.saved_config(), config, folder.name)


def restore_tokenizer(folder: RunFolder, checkpointer: Checkpointer) -> None:
    """The tokenizer of the checkpoint that the run goes on from, where its folder has none.

    Raises: ValueError where the folder holds another one.
    """
    step = checkpointer.latest_valid_step()
    if step is None:
        return
    saved, there = from_files(checkpointer.read_tokenizer(step)), load_tokenizer(folder.tokenizer)
    difference = None if there is None else first_difference(saved, there)
    if difference is not None:
        raise ValueError(
            f"{folder.tokenizer}: its {difference} is not that of the checkpoint of step {step}, which was trained "
            "with another; delete this folder to take the checkpoint's"
        )
    sync_processes("tokenizer compared")
    if there is None and is_main_process():
        save_tokenizer(saved, folder.tokenizer)
    publish_files(folder, "tokenizer recalled")


@dataclass(frozen=True)
class InitialState:
    """Where a run goes on from."""

    state: TrainState
    hook_states: dict[str, Any]  # by hooks
    reset: list[str]  # by `reset`
    line: str  # says what was done


def load_adapter_base(config: RunConfig, core: Core, checkpointer: Checkpointer) -> AdapterBase | None:
    """The frozen weights below adapters: those that the newest checkpoint names, else those of `init_from`.

    Raises: ValueError where there are none, or others than before.
    """
    if core.adaptation is None:
        return None
    _refuse_thinning(config, "adapters stand on all of their base")
    step = checkpointer.latest_valid_step()
    if step is not None:
        return recorded_base(core.adaptation, checkpointer, step, config.output_dir, log)
    if config.init_from is None:
        raise ValueError(
            f"adapter.method={config.adapter.method.name}: adapters stand on trained weights; name them with "
            "init_from=RUN or init_from=hf:FOLDER"
        )
    return load_base(core.adaptation, config.init_from, config.output_dir, log)


class Frozen(NamedTuple):
    """Models that a run only reads, what its checkpoints say of them, and what one of them was asked in advance."""

    models: dict[str, Any]
    records: dict[str, dict[str, str]]
    tables: Tables = NO_TABLES


def load_frozen_models(
    config: RunConfig, core: Core, checkpointer: Checkpointer, corpora: Corpora, base: AdapterBase | None
) -> Frozen:
    """Loads the base of adapters and each frozen model that the objective needs.

    A precomputed one (`FrozenModelSpec.precompute`) is dropped once its outputs are stored, and is not even read where
    all of them are stored and a checkpoint records whose they are.

    Raises: ValueError where one of them is not given, or is another than before.
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
    """The stand-in for a precomputed model: of one with its own architecture, the number of its tokens."""
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
    """The model and the record of it for checkpoints. `known`: the record in the newest one."""
    source = known.get("origin") or spec.source or config.init_from
    if source is None:
        raise _no_source(config, role)
    if spec.source is None:
        _refuse_thinning(config, f"the {role} of a policy is all of init_from")
        is_base = base is not None and (known == base.record if known else base.start is None)
        if base is not None and is_base and config.adapter.quantize_base.name == "none":
            return base.params, base.record  # not twice in memory
    found = (config.objective, role, source, tokenizer, core, config.output_dir, log)
    return load_frozen_model(*found, sha256=known.get("sha256"))


def _no_source(config: RunConfig, role: str) -> ValueError:
    return ValueError(
        f"init_from=null: objective={config.objective.kind} needs a {role} model, which is the weights that training "
        "starts from; set init_from=RUN or init_from=hf:FOLDER, or take an objective or loss without one"
    )


def _refuse_thinning(config: RunConfig, why: str) -> None:
    if config.prune.layers:
        raise ValueError(f"prune.layers={config.prune.layers}: {why}; leave it out")
    if config.prune.width.active:
        raise ValueError(f"prune.width: {why}; leave it out")


class RunParts(NamedTuple):
    """What a run computes with, before it has a state."""

    config: RunConfig  # with what was left to be chosen
    core: Core
    base: AdapterBase | None
    frozen: Frozen
    source: BatchSource  # to be closed


def build_run(config: RunConfig, corpora: Corpora, checkpointer: Checkpointer) -> RunParts:
    """Those of a start of this run. Raises: as `load_adapter_base` and `load_frozen_models`."""
    config = resolve_auto_mesh(config, model_config(config, corpora.tokenizer), log)
    core = build_checked_core(config, corpora.tokenizer)
    base = load_adapter_base(config, core, checkpointer)
    frozen = load_frozen_models(config, core, checkpointer, corpora, base)
    return RunParts(config, core, base, frozen, build_source(config, corpora, core, frozen.tables.train))


def init_or_resume(
    config: RunConfig, core: Core, source: BatchSource, checkpointer: Checkpointer, base: AdapterBase | None = None
) -> InitialState:
    """Fresh, from the weights of `init_from`, or from the newest whole checkpoint; moves the source there."""
    step, run = checkpointer.latest_valid_step(), f"run {config.run!r}"
    frozen = frozen_models(base)
    if step is None:
        if base is not None and core.adaptation is not None:
            given = None if base.start is None else base.start(core.adaptation)
            state = core.init_state(frozen, given)
            which = "new adapters" if base.start is None else f"the adapters of {config.init_from}"
            return InitialState(state, {}, [], f"{run}: begins with {which} on the weights of {base.name}")
        if config.init_from is None:
            return InitialState(core.init_state(), {}, [], f"{run}: begins")
        origin = prune_source(resolve_weights(config.init_from, config.output_dir, log), config)
        origin = with_head(origin, core.model.outputs)
        # Averages and the like begin at these weights, not at random ones.
        state = core.init_state(params=starting_params(core, origin, config.seed))
        return InitialState(state, {}, [], f"{run}: begins with the weights of {origin.name}")
    # A job that is started again with the same command must not forget again what it has learnt since.
    done = checkpointer.read_json(step, "config")["run"]["reset"] == config.reset
    reset = [] if done else config.reset
    if "optimizer" in reset:
        fresh = core.init_state(params=checkpointer.restore_params(step, core.abstract.params))
        state = dataclasses.replace(fresh, step=fresh.step + step)
    else:
        state = checkpointer.restore(step, core.abstract).state
    if "data" not in reset:
        source.set_state(checkpointer.read_json(step, "source"))
        left_out = next_row(RunFolder(checkpointer.folder.parent), step)
        if left_out is not None:
            source.skip_to(left_out)
    remembered = checkpointer.read_json(step, "extra")
    if "step" in reset:
        # Later steps would stand in the way of those to come; they stay beside them under another name.
        state, remembered = dataclasses.replace(state, step=state.step * 0), {}
        checkpointer.discard_after(0)
    without = f", without its {' and '.join(reset)}" if reset else ""
    already = f" (reset=[{','.join(config.reset)}] was done before)" if config.reset and done else ""
    return InitialState(state, remembered, reset, f"{run}: resumes at step {step}{without}{already}")


def starting_params(core: Core, origin: WeightsSource, seed: int) -> Params:
    """The origin's own; modules for further tokens are new where it has none."""
    abstract = core.own
    if MTP not in abstract or origin.model.mtp_num_layers:
        return origin.params(abstract)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract[MTP])
    fresh = jax.jit(lambda key: init_params(core.model, key)[MTP], out_shardings=shardings)
    own = {name: leaf for name, leaf in abstract.items() if name != MTP}
    return {**origin.params(own), MTP: fresh(jax.random.key(seed))}


def frozen_models(base: AdapterBase | None) -> dict[str, Any]:
    return {} if base is None else {BASE: base.params}
