"""Goodput: wall-clock time by category over all starts of a run, including work lost to kills."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CATEGORIES = (
    "start",
    "data_preparation",
    "compile",
    "data_wait",
    "step",
    "evaluate",
    "checkpoint",
    "sample",
    "other",
)
_WRITE_EVERY = 5.0  # minimum seconds between writes of the file


class GoodputRecorder:
    """Assigns every second of this process to the category of the innermost open phase, or to `other`.

    With a `path` (process 0), it reads the times of earlier starts from that file and writes those of this start every
    few seconds, so a kill loses little of the record.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.monotonic):
        self.path = path
        self._clock = clock
        self._seconds: dict[str, float] = {name: 0.0 for name in CATEGORIES}
        self._stack: list[str] = []
        self._mark = clock()
        self._written = -float("inf")
        self._start_time = time.time()
        self._from_step: int | None = None
        self._step = 0
        self._earlier = _read(path)

    def _update(self) -> None:
        """Adds the time since the last update to the current phase."""
        now = self._clock()
        self._seconds[self.current_phase] += now - self._mark
        self._mark = now

    @property
    def starts(self) -> int:
        """Number of starts of this run, including this one."""
        return len(self._earlier) + 1

    @property
    def current_phase(self) -> str:
        """Category of the innermost open phase."""
        return self._stack[-1] if self._stack else "other"

    @contextmanager
    def phase(self, category: str) -> Iterator[None]:
        """Counts the time in this context as `category`, except nested phases."""
        assert category in CATEGORIES, category
        self._update()
        self._stack.append(category)
        try:
            yield
        finally:
            self._update()
            self._stack.pop()

    def reassign(self, source: str, target: str, seconds: float) -> None:
        """Moves up to `seconds` from one category to another, such as waiting for data inside the loop."""
        self._update()
        seconds = min(max(seconds, 0.0), self._seconds[source])
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def resume(self, step: int) -> None:
        """Marks this start as resumed from `step`; counts training of earlier starts beyond it as lost."""
        self._from_step = self._step = step
        for start in self._earlier:
            last, first = int(start["step"]), int(start["from_step"])
            if last > step and last > first:
                fraction = (last - max(step, first)) / (last - first)
                lost = start["seconds"].get("step", 0.0) * fraction
                start["seconds"]["step"] -= lost
                start["lost"] = start.get("lost", 0.0) + lost
                start["step"] = max(step, first)

    def at_step(self, step: int) -> None:
        """Records the current step; writes the file if the last write was more than a few seconds ago."""
        if self._from_step is None:
            self._from_step = step
        self._step = step
        if self.path is not None and self._clock() - self._written > _WRITE_EVERY:
            with suppress(OSError):  # disk full: retried at a later step
                self.write()

    def write(self) -> None:
        """Writes the file atomically. Does nothing without a `path`."""
        if self.path is None:
            return
        self._update()
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps({"starts": [*self._earlier, self._this_start()]}, indent=1))
        os.replace(temporary, self.path)
        self._written = self._clock()

    def _this_start(self) -> dict[str, Any]:
        return {
            "began_at": self._start_time,
            "seconds": dict(self._seconds),
            "lost": 0.0,
            "from_step": self._from_step or 0,
            "step": self._step,
        }

    def summary(self) -> dict[str, Any]:
        """Returns seconds by category over all starts, their total (without time between starts) and goodput."""
        self._update()
        starts = [*self._earlier, self._this_start()]
        seconds = {name: sum(s["seconds"].get(name, 0.0) for s in starts) for name in CATEGORIES}
        lost = sum(s.get("lost", 0.0) for s in starts)
        total = sum(seconds.values()) + lost
        return {
            "seconds": {**seconds, "lost": lost},
            "total": total,
            "starts": len(starts),
            "goodput": seconds["step"] / total if total > 0 else 0.0,
        }

    def table(self) -> str:
        """Formats the summary as a table, largest category first."""
        summary = self.summary()
        total, starts = summary["total"], summary["starts"]
        lines = [f"wall-clock time by category: {duration(total)}" + (f" in {starts} starts" if starts > 1 else "")]
        for name, seconds in sorted(summary["seconds"].items(), key=lambda item: -item[1]):
            share = seconds / total if total > 0 else 0.0
            if share >= 0.0005:
                label = _LABELS.get(name, name)
                bar = "█" * round(30 * share)
                lines.append(f"  {label:<17} {duration(seconds):>10} {share:7.1%}  {bar}".rstrip())
        return "\n".join(lines)


_LABELS = {
    "step": "training",
    "data_preparation": "data preparation",
    "data_wait": "waiting for data",
    "lost": "lost to kills",
}


def duration(seconds: float) -> str:
    """Formats seconds as `0.8 s`, `42 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def _read(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    try:
        return list(json.loads(path.read_text())["starts"])
    except (ValueError, KeyError, TypeError):  # a corrupt file must not stop the run
        return []
