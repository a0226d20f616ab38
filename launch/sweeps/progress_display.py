"""Sweep output: a progress bar on terminals, one line per trial event, and the final table."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from configs.sweeps import SweepSearchConfig
from launch.sweeps.study import DONE, FAILED, PRUNED, Trial, best_of, ranked
from launch.sweeps.trials import RunningTrial, num_steps
from trainer.reliability.goodput import duration

SHOWN, FAILURES = 40, 5  # maximum number of trials in the table, and of failure messages below it


class ProgressDisplay:
    """Shows progress while a sweep runs. Used as a context manager."""

    def __init__(self, name: str, search: SweepSearchConfig, console: Console | None = None):
        self._name, self._search = name, search
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def __enter__(self) -> "ProgressDisplay":
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", style="cyan", table_column=Column(no_wrap=True)),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(self._name, total=None, status="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, trials: Sequence[Trial], wanted: int, running: Sequence[RunningTrial]) -> None:
        """Updates the progress bar, if the output is a terminal."""
        if self._bar is None:
            return
        best = best_of(trials, self._search)
        parts = [] if best is None else [f"best {best.value:.4g}"]
        parts += [f"{one.trial.run} {one.measured.step}/{num_steps(one.config)}" for one in running]
        ended = sum(trial.ended for trial in trials)
        self._bar.update(self._task, completed=ended, total=wanted, status="  ".join(parts))

    def announce(self, trial: Trial, event: str) -> None:
        self._print(f"{trial.run} {event}: {' '.join(trial.arguments)}")

    def ended(self, trial: Trial, trials: Sequence[Trial], log: Path) -> None:
        metric = self._search.metric
        if trial.state == DONE:
            best = best_of(trials, self._search)
            outcome = f"done: {metric} {trial.value:.5g}" + (", new best" if best and best.run == trial.run else "")
        elif trial.state == PRUNED:
            latest = "" if trial.latest is None else f": {metric} {trial.latest:.5g}"
            outcome = f"pruned at step {max(trial.reports, default=0)}{latest}"
        else:
            outcome = f"failed: {trial.message}; log: {log}"
        self._print(
            f"{trial.run} {outcome}, {duration(trial.seconds)}" if trial.state != FAILED else f"{trial.run} {outcome}"
        )

    def _print(self, line: str) -> None:
        self._console.print(Text(line))
        if not self._console.is_terminal:
            self._console.file.flush()


def print_table(trials: Sequence[Trial], search: SweepSearchConfig, console: Console | None = None) -> None:
    """Prints all trials, best first."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=200, highlight=False)
    table = Table(box=None, header_style="bold")
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    for name in ("trial", *(short(key, keys) for key in keys), search.metric, "", "time"):
        table.add_column(name, justify="left" if name in ("trial", "") else "right", no_wrap=True)
    found = ranked(trials, search)
    for trial in found[:SHOWN]:
        latest = "" if trial.latest is None else f"{trial.latest:.5g}"
        state = {PRUNED: f"pruned at step {max(trial.reports, default=0)}", DONE: ""}.get(trial.state, trial.state)
        cells = [Text(trial.params.get(key, "")) for key in keys]
        table.add_row(trial.run, *cells, latest, state, duration(trial.seconds) if trial.seconds else "")
    console.print(table)
    if len(found) > SHOWN:
        console.print(f"and {len(found) - SHOWN} more, in results.jsonl")
    failed = [trial for trial in found if trial.state == FAILED]
    for trial in failed[:FAILURES]:
        console.print(Text(f"{trial.run} failed: {trial.message}"), soft_wrap=True)


def short(key: str, keys: Sequence[str]) -> str:
    """Returns the last component of a key, or the full key if another one ends the same."""
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in keys) == 1 else key


def format_command(words: Sequence[str]) -> str:
    return shlex.join(["meshwright", *words])


def as_row(trial: Trial, words: Sequence[str]) -> dict[str, Any]:
    """Returns the record of a trial for results.jsonl."""
    return {
        "trial": trial.number,
        "run": trial.run,
        "state": trial.state,
        "value": trial.value,
        "last": trial.latest,
        "step": max(trial.reports, default=None),
        "params": trial.params,
        "seconds": round(trial.seconds, 1),
        "message": trial.message,
        "command": format_command(words),
    }
