"""Interleaved benchmarks: contestants run in separate processes and alternate, so that machine speed drifts cancel out.

Waiting processes hold their memory but use no core. A benchmark defines the contestants and gets the seconds per turn.
"""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Turn = Callable[[], Any]  # runs the work once; its result is returned to the parent process


@dataclass(frozen=True)
class Contestant:
    """A benchmarked implementation: `make(**args)` returns the turn; `env` is added to the process environment."""

    make: Callable[..., Turn]
    args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Seat:
    """Handle of a contestant's process."""

    pipe: Any
    process: Any
    ready: float  # seconds until the first turn could start
    bytes: int = 0  # peak memory so far

    def turns(self, count: int) -> tuple[list[float], list[Any]]:
        """Runs `count` turns; returns their seconds and results."""
        self.pipe.send(count)
        seconds, results, self.bytes = _received(self.pipe)
        return seconds, results


class Failed(Exception):
    """A contestant's process ended or raised; the message contains its error."""


def _received(pipe: Any) -> Any:
    try:
        kind, content = pipe.recv()
    except EOFError:
        raise Failed("its process ended") from None
    if kind == "error":
        raise Failed(content)
    return content


def _serve(pipe: Any, contestant: Contestant) -> None:
    try:
        start = time.perf_counter()
        turn = contestant.make(**contestant.args)
        pipe.send(("ready", time.perf_counter() - start))
        while count := pipe.recv():
            seconds, results = [], []
            for _ in range(count):
                start = time.perf_counter()
                results.append(turn())
                seconds.append(time.perf_counter() - start)
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            pipe.send(("turns", (seconds, results, held)))
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def seat(stack: ExitStack, contestant: Contestant) -> Seat:
    """Starts it, and returns when it can take turns. Raises: Failed."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    before = {name: os.environ.get(name) for name in contestant.env}
    os.environ.update(contestant.env)
    try:
        process = context.Process(target=_serve, args=(there, contestant), daemon=True)
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    there.close()
    stack.callback(process.join)
    stack.callback(process.terminate)
    return Seat(here, process, _received(here))


def take_turns(
    seats: Mapping[str, Seat], rounds: int, turns: int = 1
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """(seconds of a turn, result of the last one) for each in each round: of several turns in a row the mean.

    Each first takes a turn that does not count: while others worked, caches and freed memory went to them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in seats}
    results: dict[str, list[Any]] = {name: [] for name in seats}
    for index in range(rounds):
        # Each round begins with another, so that none always follows the same one.
        names = list(seats)[index % len(seats) :] + list(seats)[: index % len(seats)]
        for name in names:
            taken, found = seats[name].turns(1 + turns)
            seconds[name].append(statistics.mean(taken[1:]))
            results[name].append(found[-1])
        print(
            f"round {index + 1} of {rounds}: " + ", ".join(f"{name} {seconds[name][-1]:.3g} s" for name in seats),
            flush=True,
        )
    return seconds, results


@dataclass(frozen=True)
class Spread:
    """Of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str = ".3g") -> str:
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def ratios(others: Sequence[float], ours: Sequence[float]) -> Spread:
    """How often ours goes into theirs, round by round."""
    return Spread.of([a / b for a, b in zip(others, ours, strict=True)])


def machine() -> dict[str, Any]:
    """Where and with what it ran."""
    packages = {}
    for name in ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "torch", "transformers", "xllamacpp"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": _processor(), "cores": cores, "python": platform.python_version(), "packages": packages,
        "commit": commit, "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def in_words(found: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    return f"{found['processor']}, {found['cores']} cores, Python {found['python']}, {packages}"


def keep(folder: str, name: str, result: Mapping[str, Any]) -> Path:
    """Writes FOLDER/NAME.json."""
    path = Path(folder, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def draw_bars(path: Path, title: str, groups: Mapping[str, Mapping[str, Spread]], unit: str) -> None:
    """A panel for each group, a bar for each of its members, with the range of its rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.2), squeeze=False, layout="constrained")
    for axis, (group, bars) in zip(axes[0], groups.items(), strict=True):
        names = list(bars)[::-1]
        middle = [bars[name].median for name in names]
        errors = [[m - bars[n].low for n, m in zip(names, middle, strict=True)],
                  [bars[n].high - m for n, m in zip(names, middle, strict=True)]]  # fmt: skip
        colors = ["C0" if name.startswith("meshwright") else "0.7" for name in names]
        axis.barh(names, middle, xerr=errors, color=colors, ecolor="0.3", capsize=3)
        axis.set_title(group, fontsize=10)
        axis.set_xlabel(unit)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
