"""`meshwright sweep`: hyperparameter search over runs of `train`.

    runs/sweeps/NAME/sweep.json     search space and settings; must not change when the sweep resumes
                     journal.log    state of the trials (Optuna's journal)
                     code/          copy of the packages at the last start, which all trials run
                     logs/          output of each trial
                     results.jsonl  one line per trial, with its command
                     sweep.png

Each trial is a separate run, NAME-000, NAME-001, ..., in `output_dir`.
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
from configs.sweeps import Method, Pruning
from configs.tasks import SweepConfig, TrainConfig
from launch import exit_codes
from launch.config_errors import explain, named_keys
from launch.launchers.job import freeze_code
from launch.launchers.launcher import say
from launch.launchers.supervisor import identity, is_alive
from launch.overrides import routes_of
from launch.plotting import draw_sweep
from launch.run_folder import write_whole
from launch.sweeps.progress_display import ProgressDisplay, as_row, format_command, print_table
from launch.sweeps.runner import SweepRunner
from launch.sweeps.space import Space, corner_points, read_space
from launch.sweeps.study import WAITING, Study, Trial, best_of, chosen_method, grid_points, imported
from launch.sweeps.trials import command, gpu_shares
from trainer.tracker import WandbConfig

DROPPED = ("task=", "task.sweep.", "run=", "sweep=", "launcher.follow=", "launcher.dry_run=")  # not passed to trials
FREE = ("launcher", "tracker", "trackers.", "checkpoint.", "fake_devices")  # may change when a sweep resumes


def run(config: RunConfig, overrides: list[str]) -> int:
    """Runs the missing trials, then prints all results. Returns the exit code."""
    task = config.task
    assert isinstance(task, SweepConfig)
    search, folder = task.sweep, Path(config.output_dir) / "sweeps" / config.run
    route = routes_of("train").route  # keys in a YAML file may omit `task.` as well
    search.parameters = {route(key): text for key, text in search.parameters.items()}
    imported()
    if "://" in config.output_dir:
        raise ValueError(
            f"output_dir={config.output_dir}: a sweep needs local run folders; mount the bucket and set "
            "output_dir to its folder"
        )
    arguments = [*(o for o in overrides if not o.lstrip("+~").startswith(DROPPED)), *wandb_groups(config)]
    definition = sweep_definition(config, arguments)
    saved = read_definition(folder)
    if saved:
        refuse_drift(saved, definition, config.run)
        search.parameters = saved["parameters"]  # in the order of the first start: proposals depend on it
    space = checked_space(search.parameters, arguments, config.run)
    grid_points(search, space)
    check_pruning(task)
    check_launcher(config, search.max_concurrent_trials)
    shares = gpu_shares(search, config.launcher.kind)
    if config.launcher.dry_run:
        return dry_run(config, task, arguments, space)
    if not saved:
        check_unused_runs(config)
    folder.mkdir(parents=True, exist_ok=True)
    with sweep_lock(folder, config.run):
        study = Study(folder, config.run, search, space, task.num_steps)
        write_whole(folder / "sweep.json", json.dumps(definition | {"parameters": search.parameters}, indent=2) + "\n")
        num_ended = sum(trial.ended for trial in study.trials())
        method = chosen_method(search, space).name
        ended = f", {num_ended} ended" if num_ended else ""
        print(f"sweep {config.run!r}: {study.wanted} trials{ended}, {method} over {', '.join(space)}", flush=True)
        runner = SweepRunner(
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
        code = runner.run()
        write_results(folder, study, arguments)
    return conclude(config, folder, study, arguments, code)


def conclude(config: RunConfig, folder: Path, study: Study, arguments: Sequence[str], code: int) -> int:
    """Prints the results table, writes the plot, and prints the best command."""
    trials, search = study.trials(), study.search
    if code in (exit_codes.PREEMPTED, exit_codes.INTERRUPTED):
        ended = sum(trial.ended for trial in trials)
        say(f"sweep {config.run!r} stopped with {ended} of {study.wanted} trials ended; run the same command to resume")
    if any(trial.ended for trial in trials):
        print_table([trial for trial in trials if trial.state != WAITING], search)
        if draw_sweep(trials, study.space, search, folder / "sweep.png", title=config.run):
            print(f"\nresults: {folder / 'results.jsonl'}, {folder / 'sweep.png'}")
    best = best_of(trials, search)
    if best is not None:
        words = command(arguments, best)[:-1]
        print(f"best: {best.run}, {search.metric} {best.value:.5g}; to repeat it as a separate run:")
        print(f"  {format_command([*words, f'run={config.run}-best'])}")
    return code


def write_results(folder: Path, study: Study, arguments: Sequence[str]) -> None:
    rows = [as_row(trial, command(arguments, trial)) for trial in study.trials() if trial.state != WAITING]
    write_whole(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def composed_trial(arguments: Sequence[str]) -> RunConfig:
    """Composes the config of a trial. Raises: ValueError or Hydra's errors for invalid arguments."""
    config = to_typed(_node(arguments))
    assert isinstance(config.task, TrainConfig)
    return config


def _node(arguments: Sequence[str]) -> DictConfig:
    return compose("root", overrides=["task=train", *arguments])


def checked_space(parameters: dict[str, str], arguments: Sequence[str], name: str) -> Space:
    """Returns the search space after validating a command line of each kind of trial.

    Raises: ValueError naming the key, the value, the reason and the fix.
    """
    duplicates = sorted(set(parameters) & named_keys(list(arguments)))
    if duplicates:
        raise ValueError(f"{duplicates[0]}: set to one value and also varied by the sweep; remove one of the two")
    named = [f"{key}={value}" for key, value in parameters.items()]
    try:
        base = _node(arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, [*arguments, *named])) from None
    space = read_space(parameters, base)
    for values in corner_points(space):
        given = [*arguments, *(f"{key}={value}" for key, value in values.items())]
        try:
            composed_trial([*given, f"run={name}"])
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error, given)) from None
    return space


def check_launcher(config: RunConfig, parallel: int) -> None:
    """Raises: ValueError if the launcher cannot separate trials, or would leave paid resources running."""
    launcher = config.launcher
    if not launcher.follow:
        raise ValueError(
            "launcher.follow=false: not supported for sweeps, which read the results of their trials; remove the key"
        )
    if isinstance(launcher, TpuVmConfig) and launcher.name is None:
        raise ValueError(
            "launcher.name=null: each trial would create a separate TPU, and all would keep running at a cost; set one "
            "name for all trials"
        )
    shared = {TpuVmConfig: "name", SkypilotConfig: "cluster"}.get(type(launcher))
    if parallel > 1 and shared is not None and getattr(launcher, shared):
        raise ValueError(
            f"sweep.max_concurrent_trials={parallel}: launcher.{shared}={getattr(launcher, shared)} "
            "runs one trial at a time; remove sweep.max_concurrent_trials"
        )


def check_pruning(task: SweepConfig) -> None:
    """Raises: ValueError if pruning is on but the metric is not measured during trials."""
    search = task.sweep
    if search.pruning is Pruning.none:
        return
    if search.metric.startswith("eval/") and not 0 < task.eval_every < task.num_steps:
        raise ValueError(
            f"sweep.pruning={search.pruning.name}: {search.metric} is measured only at the end of a trial; set "
            f"task.eval_every=N below task.num_steps={task.num_steps}"
        )


def wandb_groups(config: RunConfig) -> list[str]:
    """Returns overrides that group the trials in W&B, unless a group is configured."""
    return [
        f"trackers.{name}.group={config.run}"
        for name, tracker in config.trackers.items()
        if isinstance(tracker, WandbConfig) and tracker.group is None
    ]


def sweep_definition(config: RunConfig, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that must not change when a sweep resumes."""
    task = config.task
    assert isinstance(task, SweepConfig)
    search = task.sweep
    return {
        "parameters": dict(search.parameters),
        "method": search.method.name,
        "seed": search.seed,
        "metric": search.metric,
        "mode": search.mode.name,
        "pruning": search.pruning.name,
        "warmup_steps": search.warmup_steps,
        "arguments": sorted(a for a in arguments if not a.lstrip("+~").startswith(FREE)),
    }


def read_definition(folder: Path) -> dict[str, Any]:
    """Returns the saved settings of a sweep, or {}. Raises: ValueError if they have keys of an older version."""
    file = folder / "sweep.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if "over" in found:
        raise ValueError(
            f"run={folder.name}: {file} was written by an older version with other key names; start another sweep "
            "with run=NAME, or delete the folder"
        )
    return found


def refuse_drift(saved: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Raises: ValueError naming the first setting that differs from the saved sweep."""

    def refuse(given: str, before: str) -> None:
        raise ValueError(
            f"{given}: the sweep {name!r} was started {before}, and its trials would not be comparable; restore that "
            "value, or start another sweep with run=NAME"
        )

    for key, before in saved.items():
        if key not in ("parameters", "arguments") and now[key] != before:
            refuse(f"sweep.{key}={now[key]}", f"with sweep.{key}={before}")
    for key in [*saved["parameters"], *now["parameters"]]:
        old, new = saved["parameters"].get(key), now["parameters"].get(key)
        if old != new:
            given = f"{key}={new}" if new is not None else f"{key} does not vary"
            refuse(given, f"with {key}={old}" if old is not None else "without it")
    old, new = (dict(a.partition("=")[::2] for a in part["arguments"]) for part in (saved, now))
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            given = f"{key}={new[key]}" if key in new else f"{key} is not given"
            refuse(given, f"with {key}={old[key]}" if key in old else "without it")


def check_unused_runs(config: RunConfig) -> None:
    """Raises: ValueError if a run with the name of a trial exists that does not belong to this sweep."""
    existing = sorted(Path(config.output_dir).glob(f"{config.run}-[0-9][0-9][0-9]"))
    if existing:
        raise ValueError(
            f"run={config.run}: {existing[0]} exists and belongs to another sweep; choose another name with run=NAME"
        )


@contextmanager
def sweep_lock(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock of the sweep. Raises: ValueError if another process runs this sweep."""
    file = folder / "process.json"
    if file.exists():
        other = json.loads(file.read_text())
        if is_alive(other):
            raise ValueError(
                f"run={name}: process {other['pid']} already runs this sweep; wait for it or stop it first"
            )
        if other["host"] != os.uname().nodename:
            raise ValueError(
                f"run={name}: this sweep was started on {other['host']} and has not ended there; if that "
                f"process is gone, delete {file}"
            )
    write_whole(file, json.dumps(identity(os.getpid())) + "\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def dry_run(config: RunConfig, task: SweepConfig, arguments: Sequence[str], space: Space) -> int:
    """Prints the trial commands that do not depend on results. Writes nothing."""
    search = task.sweep
    study = Study(None, config.run, search, space, task.num_steps)
    method = chosen_method(search, space)
    print(f"# {study.wanted} trials, {method.name} over {', '.join(space)}, {search.max_concurrent_trials} at once")
    count = study.wanted if method is not Method.tpe else study.num_random
    shown: list[Trial] = []
    while len(shown) < count and (trial := study.next()) is not None:
        shown.append(trial)
        print(f"$ {format_command(command(arguments, trial))}")
    if len(shown) < study.wanted:
        print(f"# {study.wanted - len(shown)} more trials, which depend on results")
    return 0
