"""What a run begins with: its newest checkpoint, other weights or none, and the models that it only reads."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from configs.schema import Resume, RunConfig
from data.pipeline import OfflineSource
from data.tokenizer import from_files, load_tokenizer, save_tokenizer
from data.tokenizer_contract import Tokenizer, first_difference
from launch.assemble import (
    Core,
    Corpora,
    build_core,
    build_source,
    is_chief,
    model_config,
    say,
    share,
    wait_for_all,
)
from launch.incidents import next_row
from launch.origins import (
    Base,
    Origin,
    as_student,
    find_origin,
    load_base,
    load_reference,
    load_teacher,
    recorded_base,
    with_outputs,
)
from launch.planning.search import settled
from launch.run_folder import RunFolder, refuse_drift
from launch.tables import NO_TABLES, Tables, fill_tables, open_tables
from models.further import FURTHER
from models.transformer import init_params
from trainer.adapters import BASE
from trainer.checkpoint import Checkpointer
from trainer.objective import REFERENCE, TEACHER, FrozenModel, Params
from trainer.state import TrainState


def check_resume(config: RunConfig, folder: RunFolder, checkpointer: Checkpointer) -> None:
    """Raises: ValueError where `resume` forbids what there is, or a key changed that the checkpoints depend on."""
    steps = checkpointer.steps()
    if not steps and config.resume is Resume.must:
        raise ValueError(f"resume=must: {checkpointer.where} holds no checkpoint; resume=auto begins afresh")
    aside = checkpointer.superseded() if not steps else []
    if aside:
        raise ValueError(
            f"{checkpointer.where}: a reset was cut off before its first save; rename {aside[-1]} to "
            f"{aside[-1].partition('.')[0]} to do it again, or give another run=NAME"
        )
    if steps and config.resume is Resume.never:
        raise ValueError(
            f"resume=never: the run {folder.name!r} has checkpoints up to step {steps[-1]}; give another run=NAME, "
            "or resume=auto to go on with it"
        )
    if steps and folder.config.exists():
        refuse_drift(folder.saved_config(), config, folder.name)


def recall_tokenizer(folder: RunFolder, checkpointer: Checkpointer) -> None:
    """The tokenizer of the checkpoint that the run goes on from, where its folder has none.

    Raises: ValueError where the folder holds another one.
    """
    step = checkpointer.latest_whole()
    if step is None:
        return
    saved, there = from_files(checkpointer.read_tokenizer(step)), load_tokenizer(folder.tokenizer)
    difference = None if there is None else first_difference(saved, there)
    if difference is not None:
        raise ValueError(
            f"{folder.tokenizer}: its {difference} is not that of the checkpoint of step {step}, which was trained "
            "with another; delete this folder to take the checkpoint's"
        )
    wait_for_all("tokenizer compared")
    if there is None and is_chief():
        save_tokenizer(saved, folder.tokenizer)
    share(folder, "tokenizer recalled")


@dataclass(frozen=True)
class Start:
    """Where a run goes on from."""

    state: TrainState
    remembered: dict[str, Any]  # by hooks
    forgotten: list[str]  # by `reset`
    line: str  # says what was done


def find_base(config: RunConfig, core: Core, checkpointer: Checkpointer) -> Base | None:
    """The frozen weights below adapters: those that the newest checkpoint names, else those of `init_from`.

    Raises: ValueError where there are none, or others than before.
    """
    if core.adaptation is None:
        return None
    _refuse_thinning(config, "adapters stand on all of their base")
    step = checkpointer.latest_whole()
    if step is not None:
        return recorded_base(core.adaptation, checkpointer, step, config.runs, say)
    if config.init_from is None:
        raise ValueError(
            f"adapter.method={config.adapter.method.name}: adapters stand on trained weights; name them with "
            "init_from=RUN or init_from=hf:FOLDER"
        )
    return load_base(core.adaptation, config.init_from, config.runs, say)


class Frozen(NamedTuple):
    """Models that a run only reads, what its checkpoints say of them, and what one of them was asked in advance."""

    models: dict[str, Any]
    records: dict[str, dict[str, str]]
    tables: Tables = NO_TABLES


def find_frozen(
    config: RunConfig, core: Core, checkpointer: Checkpointer, corpora: Corpora, base: Base | None
) -> Frozen:
    """The base of adapters, the reference of a loss that has one, which is what the run began with, and its teacher.

    One that is asked in advance (`ObjectiveConfig.cached`) is let go of thereafter, and is not even read where all
    answers are there and a checkpoint knows whose they are.

    Raises: ValueError where one of them is not known, or is another than before.
    """
    models, records = frozen_models(base), {} if base is None else {BASE: base.record}
    step = checkpointer.latest_whole()
    known = {} if step is None else checkpointer.read_json(step, "config")
    cached, tokenizer = config.objective.cached, corpora.tokenizer
    if cached in known and (tables := open_tables(config, core, corpora, known[cached])).complete:
        return Frozen(models | _let_go(cached, core, tokenizer), records | {cached: known[cached]}, tables)
    if config.objective.moves_reference and config.init_from is None and step is None:
        raise _no_reference(config)
    if config.objective.needs_reference:
        models[REFERENCE], records[REFERENCE] = _reference(config, core, known.get(REFERENCE, {}), base)
    if config.objective.teacher_name is not None:
        record = known.get(TEACHER, {})
        name = record.get("origin", config.objective.teacher_name)
        found = (config.objective, name, tokenizer, core, config.runs, say)
        taught = load_teacher(*found, sha256=record.get("sha256"))
        models[TEACHER], records[TEACHER] = taught
    if cached is None:
        return Frozen(models, records)
    tables = fill_tables(config, core, corpora, models, records[cached], say)
    del models[cached]
    return Frozen(models | _let_go(cached, core, tokenizer), records, tables)


def _let_go(name: str, core: Core, tokenizer: Tokenizer) -> dict[str, Any]:
    """What stands for a model that is not asked again: of a teacher, how many tokens it knows."""
    return {TEACHER: FrozenModel({}, core.apply, tokenizer.vocab_size)} if name == TEACHER else {}


def _reference(config: RunConfig, core: Core, known: dict[str, str], base: Base | None) -> tuple[Any, dict[str, str]]:
    origin = known.get("origin") or config.init_from
    if origin is None:
        raise _no_reference(config)
    _refuse_thinning(config, "the reference of a policy is all of init_from")
    begins_there = base is not None and (known == base.record if known else base.start is None)
    if base is not None and begins_there and config.adapter.base.name == "full":
        return base.params, base.record  # not twice in memory
    whole = core.own if core.adaptation is None else core.adaptation.whole
    return load_reference(origin, whole, config.runs, say, sha256=known.get("sha256"))


def _no_reference(config: RunConfig) -> ValueError:
    return ValueError(
        f"objective={config.objective.kind}: compares with the weights that the run begins with; name them with "
        "init_from=RUN or init_from=hf:FOLDER, or take a loss without a reference"
    )


def _refuse_thinning(config: RunConfig, why: str) -> None:
    if config.init_layers:
        raise ValueError(f"init_layers={config.init_layers}: {why}; leave it out")
    if config.init_width.active:
        raise ValueError(f"init_width: {why}; leave it out")


class Parts(NamedTuple):
    """What a run computes with, before it has a state."""

    config: RunConfig  # with what was left to be chosen
    core: Core
    base: Base | None
    frozen: Frozen
    source: OfflineSource  # to be closed


def find_parts(config: RunConfig, corpora: Corpora, checkpointer: Checkpointer) -> Parts:
    """Those of a start of this run. Raises: as `find_base` and `find_frozen`."""
    config = settled(config, model_config(config, corpora.tokenizer), say)
    core = build_core(config, corpora.tokenizer)
    base = find_base(config, core, checkpointer)
    frozen = find_frozen(config, core, checkpointer, corpora, base)
    return Parts(config, core, base, frozen, build_source(config, corpora, core, frozen.tables.train))


def begin(
    config: RunConfig, core: Core, source: OfflineSource, checkpointer: Checkpointer, base: Base | None = None
) -> Start:
    """Fresh, from the weights of `init_from`, or from the newest whole checkpoint; moves the source there."""
    step, run = checkpointer.latest_whole(), f"run {config.run!r}"
    frozen = frozen_models(base)
    if step is None:
        if base is not None and core.adaptation is not None:
            given = None if base.start is None else base.start(core.adaptation)
            state = core.init_state(frozen, given)
            which = "new adapters" if base.start is None else f"the adapters of {config.init_from}"
            return Start(state, {}, [], f"{run}: begins with {which} on the weights of {base.name}")
        if config.init_from is None:
            return Start(core.init_state(), {}, [], f"{run}: begins")
        origin = as_student(find_origin(config.init_from, config.runs, say), config)
        origin = with_outputs(origin, core.model.outputs)
        # Averages and the like begin at these weights, not at random ones.
        state = core.init_state(params=starting_params(core, origin, config.seed))
        return Start(state, {}, [], f"{run}: begins with the weights of {origin.name}")
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
        source.next_index = source.next_index if left_out is None else left_out
    remembered = checkpointer.read_json(step, "extra")
    if "step" in reset:
        # Later steps would stand in the way of those to come; they stay beside them under another name.
        state, remembered = dataclasses.replace(state, step=state.step * 0), {}
        checkpointer.set_aside_newer(0)
    without = f", without its {' and '.join(reset)}" if reset else ""
    already = f" (reset=[{','.join(config.reset)}] was done before)" if config.reset and done else ""
    return Start(state, remembered, reset, f"{run}: resumes at step {step}{without}{already}")


def starting_params(core: Core, origin: Origin, seed: int) -> Params:
    """The origin's own; modules for further tokens are new where it has none."""
    abstract = core.own
    if FURTHER not in abstract or origin.model.further_tokens:
        return origin.params(abstract)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract[FURTHER])
    fresh = jax.jit(lambda key: init_params(core.model, key)[FURTHER], out_shardings=shardings)
    own = {name: leaf for name, leaf in abstract.items() if name != FURTHER}
    return {**origin.params(own), FURTHER: fresh(jax.random.key(seed))}


def frozen_models(base: Base | None) -> dict[str, Any]:
    return {} if base is None else {BASE: base.params}
