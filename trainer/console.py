"""Console output: a live progress bar on a terminal, otherwise one line every `log_every` steps."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from trainer.reliability.goodput import duration
from trainer.tracker import NoopTracker

_REDRAW = 0.1  # minimum seconds between redraws: formatting takes longer than a step of a tiny model


def rate(per_second: float) -> str:
    """Formats a rate with three significant digits: `842`, `12.3k`, `1.25M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= size:
            scaled = per_second / size
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f}{letter}"
    return f"{per_second:.0f}"


def status(metrics: Mapping[str, float], *, short: bool = False) -> str:
    """Formats the metrics of a training step as one line; `short` leaves room for a bar in 80 columns."""
    parts = []
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.{3 if short else 4}f}")
    if "train/bits_per_byte" in metrics:
        parts.append(f"{metrics['train/bits_per_byte']:.{2 if short else 3}f} bits/byte")
    if "perf/tokens_per_second" in metrics:
        parts.append(f"{rate(metrics['perf/tokens_per_second'])} tok/s")
    if "perf/mfu" in metrics:
        parts.append(f"MFU {metrics['perf/mfu']:.{0 if short else 1}%}")
    return ("  " if not short else " ").join(parts)


def evaluation_lines(step: int, metrics: Mapping[str, float]) -> list[str]:
    """Formats evaluation metrics: one line per source, and one over all sources if there are several."""
    sources: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        kind, _, rest = name.partition("/")
        if kind == "eval":
            source, _, metric = rest.rpartition("/")
            sources.setdefault(source, {})[metric] = value
    if len(sources) == 2 and "" in sources:  # with one source, the line over all sources is redundant
        del sources[""]
    lines = []
    for source, values in sources.items():
        parts = [f"step {step}  validation" + (f" {source}:" if source else ":")]
        for metric, pattern in (
            ("loss", "loss {:.4f}"),
            ("perplexity", "perplexity {:.4g}"),
            ("bits_per_byte", "{:.3f} bits/byte"),
            ("accuracy", "accuracy {:.1%}"),
            ("f1", "F1 {:.3f}"),
            ("reward_accuracy", "reward accuracy {:.1%}"),
            ("reward_margin", "margin {:.3f}"),
        ):
            if metric in values:
                parts.append(pattern.format(values[metric]))
        lines.append("  ".join(parts))
    return lines


class _Clock:
    """Estimates the remaining time from recent steps; the first step, which compiles, is excluded."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps
        self._pace: float | None = None
        self._last: tuple[int, float] | None = None

    def left(self, step: int) -> float | None:
        now = time.monotonic()
        if self._last is not None and step > self._last[0]:
            latest = (now - self._last[1]) / (step - self._last[0])
            self._pace = latest if self._pace is None else 0.98 * self._pace + 0.02 * latest
        self._last = (step, now)
        return None if self._pace is None else self._pace * (self.num_steps - step)


class ConsoleTracker(NoopTracker):
    """Prints loss, bits per byte, tokens/s, MFU and time left. Colors only on a terminal without NO_COLOR."""

    def __init__(
        self,
        run_name: str,
        *,
        num_steps: int,
        start_step: int = 0,
        log_every: int = 10,
        console: Console | None = None,
    ):
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._num_steps, self._log_every = num_steps, log_every
        self._name = run_name
        self._start_step = start_step
        self._clock = _Clock(num_steps)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._drawn = 0.0

    def _start_bar(self) -> Progress:
        """Starts the bar at the first step, so that earlier output stays above it."""
        progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            # On narrow terminals the bar shrinks first, then the status is truncated; step count and time are kept.
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(self._num_steps)) + 1)),
            TextColumn("{task.fields[status]}", style="cyan", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", style="dim", table_column=Column(no_wrap=True, min_width=10)),
            console=self._console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = progress.add_task(
            self._name, total=self._num_steps, completed=self._start_step, status="", left=""
        )
        progress.start()
        self._progress = progress
        return progress

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if any(name.startswith("eval/") for name in metrics):
            for line in evaluation_lines(step, metrics):
                self._print(line)
        if "train/loss" not in metrics:
            return
        left = self._clock.left(step)
        if self._console.is_terminal:
            now = time.monotonic()
            if now - self._drawn < _REDRAW and step != self._num_steps:
                return
            self._drawn = now
            progress = self._progress or self._start_bar()
            assert self._task is not None
            progress.update(
                self._task,
                completed=step,
                status=status(metrics, short=True),
                left="" if left is None else f"{duration(left)} left",
            )
        elif step % self._log_every == 0 or step in (self._start_step + 1, self._num_steps):
            tail = "" if left is None or step == self._num_steps else f"  {duration(left)} left"
            self._print(f"step {step}/{self._num_steps}  {status(metrics)}{tail}")

    def log_text(self, step: int, name: str, text: str) -> None:
        self._print(f"step {step}  {name}:\n{text}")

    def log_image(self, step: int, name: str, path: Path) -> None:
        self._print(f"step {step}  {name}: {path}")

    def _print(self, line: str) -> None:
        self._console.print(Text(line))
        if not self._console.is_terminal:
            self._console.file.flush()

    def finish(self, exit_code: int = 0) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def progress_bar(what: str, total: int | None = None, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Shows a progress bar; call the yielded function with the number of items done and, if unknown, the total.

    Hidden without a terminal and on all processes but 0.
    """
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = quiet or not console.is_terminal or jax.process_index() != 0
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)
