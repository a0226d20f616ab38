"""`meshwright sweep`: trains with other values of some keys, and says which are best.

    runs/sweeps/NAME/sweep.json     what varies and how; another is refused when the sweep goes on
                     journal.log    the record of the trials (Optuna's journal)
                     code/          the packages as they were at the newest start: all trials run the same
                     logs/          what each trial printed
                     results.jsonl  a line for each trial, with its command
                     sweep.png

Each trial is a run of its own, NAME-000, NAME-001, ..., in the folder of runs.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from configs.launchers import SkypilotConfig, TpuVmConfig
from configs.schema import RunConfig, to_typed
from configs.sweeps import Pruning
from configs.tasks import SweepConfig, TrainConfig
from launch import exit_codes
from launch.config_errors import explain, named_keys
from launch.launchers.base import say
from launch.launchers.job import freeze_code
from launch.launchers.supervisor import identity, is_alive
from launch.overrides import routes_of
from launch.plotting import draw_sweep
from launch.run_folder import write_whole
from launch.sweeps.progress_display import ProgressDisplay, as_row, print_table, spelt_command
from launch.sweeps.runner import SweepRunner
from launch.sweeps.space import Space, kinds, read_space
from launch.sweeps.study import WAITING, Study, Trial, best_of, chosen_method, imported, points_of
from launch.sweeps.trials import command, gpu_shares
from trainer.tracker import WandbConfig

DROPPED = ("task=", "task.sweep.", "run=", "sweep=", "launcher.follow=", "launcher.dry_run=")  # not a trial's
FREE = ("launcher", "tracker", "trackers.", "checkpoint.", "devices")  # may change while a sweep goes on


def run(config: RunConfig, overrides: list[str]) -> int:
    """Runs the trials that are wanted and not done yet, then shows all. Returns the exit code."""
    task = config.task
    assert isinstance(task, SweepConfig)
    search, folder = task.sweep, Path(config.output_dir) / "sweeps" / config.run
    route = routes_of("train").route  # a YAML file may have the keys as the command line does
    search.parameters = {route(key): text for key, text in search.parameters.items()}
    imported()
    if "://" in config.output_dir:
        raise ValueError(
            f"output_dir={config.output_dir}: a sweep reads the run folders; mount the bucket and name its folder"
        )
    arguments = [*(o for o in overrides if not o.lstrip("+~").startswith(DROPPED)), *grouped(config)]
    definition = defined(config, arguments)
    saved = read_definition(folder)
    if saved:
        refuse_drift(saved, definition, config.run)
        search.parameters = saved["over"]  # in the order of the first start, which the choices depend on
    space = checked_space(search.parameters, arguments, config.run)
    points_of(search, space)
    check_pruning(task)
    check_launcher(config, search.max_concurrent_trials)
    shares = gpu_shares(search, config.launcher.kind)
    if config.launcher.dry_run:
        return dry_run(config, task, arguments, space)
    if not saved:
        refuse_strangers(config)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, config.run):
        study = Study(folder, config.run, search, space, task.num_steps)
        write_whole(folder / "sweep.json", json.dumps(definition | {"over": search.parameters}, indent=2) + "\n")
        begun = sum(trial.ended for trial in study.trials())
        method = chosen_method(search, space).name
        ended = f", {begun} of them ended" if begun else ""
        print(f"sweep {config.run!r}: {study.wanted} trials{ended}, {method} over {', '.join(space)}", flush=True)
        conductor = SweepRunner(
            study,
            search,
            arguments,
            composed_trial,
            folder / "logs",
            freeze_code(folder),
            shares,
            on_end=lambda trial: write_results(folder, study, arguments),
            screen=ProgressDisplay(config.run, search),
        )
        code = conductor.conduct()
        write_results(folder, study, arguments)
    return conclude(config, folder, study, arguments, code)


def conclude(config: RunConfig, folder: Path, study: Study, arguments: Sequence[str], code: int) -> int:
    """The table, the picture, and what to do next."""
    trials, search = study.trials(), study.search
    if code in (exit_codes.PREEMPTED, exit_codes.INTERRUPTED):
        ended = sum(trial.ended for trial in trials)
        say(f"sweep {config.run!r} stopped with {ended} of {study.wanted} trials ended; the same command goes on")
    if any(trial.ended for trial in trials):
        print_table([trial for trial in trials if trial.state != WAITING], search)
        if draw_sweep(trials, study.space, search, folder / "sweep.png", title=config.run):
            print(f"\nall of it: {folder / 'results.jsonl'}, {folder / 'sweep.png'}")
    best = best_of(trials, search)
    if best is not None:
        words = command(arguments, best)[:-1]
        print(f"best: {best.run}, {search.metric} {best.value:.5g}; again, under a name of its own:")
        print(f"  {spelt_command([*words, f'run={config.run}-best'])}")
    return code


def write_results(folder: Path, study: Study, arguments: Sequence[str]) -> None:
    rows = [as_row(trial, command(arguments, trial)) for trial in study.trials() if trial.state != WAITING]
    write_whole(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def composed_trial(arguments: Sequence[str]) -> RunConfig:
    """Raises: ValueError, or Hydra's errors, where it is none."""
    config = to_typed(_node(arguments))
    assert isinstance(config.task, TrainConfig)
    return config


def _node(arguments: Sequence[str]) -> DictConfig:
    return compose("root", overrides=["task=train", *arguments])


def checked_space(over: dict[str, str], arguments: Sequence[str], name: str) -> Space:
    """The space, where each of its kinds of trials is a valid command line.

    Raises: ValueError naming the key, the value, the reason and the fix.
    """
    twice = sorted(set(over) & named_keys(list(arguments)))
    if twice:
        raise ValueError(f"{twice[0]}: has one value and varies in the sweep as well; leave one of the two out")
    named = [f"{key}={value}" for key, value in over.items()]
    try:
        base = _node(arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, [*arguments, *named])) from None
    space = read_space(over, base)
    for values in kinds(space):
        given = [*arguments, *(f"{key}={value}" for key, value in values.items())]
        try:
            composed_trial([*given, f"run={name}"])
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error, given)) from None
    return space


def check_launcher(config: RunConfig, parallel: int) -> None:
    """Raises: ValueError where trials cannot be told apart there, or would leave something that costs."""
    launcher = config.launcher
    if not launcher.follow:
        raise ValueError("launcher.follow=false: a sweep stays with its trials, and reads them; leave it out")
    if isinstance(launcher, TpuVmConfig) and launcher.name is None:
        raise ValueError(
            "launcher.name=null: each trial would ask for a TPU of its own, and all of them stay, and cost; give one "
            "name for all trials"
        )
    shared = {TpuVmConfig: "name", SkypilotConfig: "cluster"}.get(type(launcher))
    if parallel > 1 and shared is not None and getattr(launcher, shared):
        raise ValueError(
            f"sweep.max_concurrent_trials={parallel}: launcher.{shared}={getattr(launcher, shared)} has one trial at a time; leave "
            "sweep.max_concurrent_trials out"
        )


def check_pruning(task: SweepConfig) -> None:
    """Raises: ValueError where trials could not be compared before their end."""
    search = task.sweep
    if search.pruning is Pruning.none:
        return
    if search.metric.startswith("eval/") and not 0 < task.eval_every < task.num_steps:
        raise ValueError(
            f"sweep.pruning={search.pruning.name}: {search.metric} is measured at the end of a trial only; give "
            f"task.eval_every=N, fewer than task.num_steps={task.num_steps}"
        )


def grouped(config: RunConfig) -> list[str]:
    """Trials are one group in W&B, where no other is given."""
    return [
        f"trackers.{name}.group={config.run}"
        for name, tracker in config.trackers.items()
        if isinstance(tracker, WandbConfig) and tracker.group is None
    ]


def defined(config: RunConfig, arguments: Sequence[str]) -> dict[str, Any]:
    """What may not change while a sweep goes on."""
    task = config.task
    assert isinstance(task, SweepConfig)
    search = task.sweep
    return {
        "over": dict(search.parameters),
        "method": search.method.name,
        "seed": search.seed,
        "metric": search.metric,
        "goal": search.mode.name,
        "pruning": search.pruning.name,
        "prune_after": search.warmup_steps,
        "arguments": sorted(a for a in arguments if not a.lstrip("+~").startswith(FREE)),
    }


def read_definition(folder: Path) -> dict[str, Any]:
    file = folder / "sweep.json"
    return json.loads(file.read_text()) if file.exists() else {}


def refuse_drift(saved: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Raises: ValueError naming the first thing that differs from what the sweep was begun with."""

    def refuse(given: str, before: str) -> None:
        raise ValueError(
            f"{given}: the sweep {name!r} was begun {before}, and its trials would not compare; set it back, or begin "
            "another with run=NAME"
        )

    for key, before in saved.items():
        if key not in ("over", "arguments") and now[key] != before:
            refuse(f"sweep.{key}={now[key]}", f"with sweep.{key}={before}")
    for key in [*saved["over"], *now["over"]]:
        old, new = saved["over"].get(key), now["over"].get(key)
        if old != new:
            given = f"{key}={new}" if new is not None else f"{key} does not vary"
            refuse(given, f"with {key}={old}" if old is not None else "without it")
    old, new = (dict(a.partition("=")[::2] for a in part["arguments"]) for part in (saved, now))
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            given = f"{key}={new[key]}" if key in new else f"{key} is not given"
            refuse(given, f"with {key}={old[key]}" if key in old else "without it")


def refuse_strangers(config: RunConfig) -> None:
    """Raises: ValueError where the first trial would go on with a run that is no trial of this sweep."""
    there = sorted(Path(config.output_dir).glob(f"{config.run}-[0-9][0-9][0-9]"))
    if there:
        raise ValueError(f"run={config.run}: {there[0]} is there, of another sweep; choose another name with run=NAME")


@contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """Raises: ValueError where another process carries out this sweep."""
    file = folder / "process.json"
    if file.exists():
        other = json.loads(file.read_text())
        if is_alive(other):
            raise ValueError(f"run={name}: process {other['pid']} carries out this sweep; let it end, or end it first")
        if other["host"] != os.uname().nodename:
            raise ValueError(
                f"run={name}: this sweep was begun on {other['host']} and has not ended there; if it has, delete {file}"
            )
    write_whole(file, json.dumps(identity(os.getpid())) + "\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def dry_run(config: RunConfig, task: SweepConfig, arguments: Sequence[str], space: Space) -> int:
    """Prints the commands of the trials, as far as they do not depend on results. Writes nothing."""
    search = task.sweep
    study = Study(None, config.run, search, space, task.num_steps)
    method = chosen_method(search, space)
    print(f"# {study.wanted} trials, {method.name} over {', '.join(space)}, {search.max_concurrent_trials} at once")
    count = study.wanted if method.name != "bayes" else study.num_random
    shown: list[Trial] = []
    while len(shown) < count and (trial := study.next()) is not None:
        shown.append(trial)
        print(f"$ {spelt_command(command(arguments, trial))}")
    if len(shown) < study.wanted:
        print(f"# {study.wanted - len(shown)} more, which depend on the results")
    return 0
