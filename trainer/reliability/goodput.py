"""How the wall-clock was spent: a ledger over all starts of a run, work lost to kills included."""

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
_WRITE_EVERY = 5.0  # seconds between writes of the ledger's file


class GoodputRecorder:
    """Every second of this process belongs to one category: that of the innermost open phase, else `other`.

    With a `path` (process 0), the seconds of earlier starts are read from it and this start is written to it
    every few seconds, so that a kill loses little of the account.
    """

    def __init__(self, path: Path | None = None, *, clock: Callable[[], float] = time.monotonic):
        self.path = path
        self._clock = clock
        self._seconds: dict[str, float] = {name: 0.0 for name in CATEGORIES}
        self._stack: list[str] = []
        self._begin = self._mark = clock()
        self._written = -float("inf")
        self._began_at = time.time()
        self._from_step: int | None = None
        self._step = 0
        self._earlier = _read(path)

    def _settle(self) -> None:
        """Gives the time since the last change to the phase that was open."""
        now = self._clock()
        self._seconds[self.current_phase] += now - self._mark
        self._mark = now

    @property
    def starts(self) -> int:
        """Of this run, with this one."""
        return len(self._earlier) + 1

    @property
    def current_phase(self) -> str:
        """The category that time goes to now."""
        return self._stack[-1] if self._stack else "other"

    @contextmanager
    def phase(self, category: str) -> Iterator[None]:
        """Counts the time inside as `category`, less that of phases opened within."""
        assert category in CATEGORIES, category
        self._settle()
        self._stack.append(category)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def reassign(self, source: str, target: str, seconds: float) -> None:
        """Recounts time that was already given to `source`, such as the wait for data inside the loop."""
        self._settle()
        seconds = min(max(seconds, 0.0), self._seconds[source])
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def resume(self, step: int) -> None:
        """Says that this start goes on from `step`: what an earlier one did beyond it was lost."""
        self._from_step = self._step = step
        for start in self._earlier:
            done, begun = int(start["step"]), int(start["from_step"])
            if done > step and done > begun:
                share = (done - max(step, begun)) / (done - begun)
                lost = start["seconds"].get("step", 0.0) * share
                start["seconds"]["step"] -= lost
                start["lost"] = start.get("lost", 0.0) + lost
                start["step"] = max(step, begun)

    def at_step(self, step: int) -> None:
        """Notes how far the run is; writes the file when it was not written for a while."""
        if self._from_step is None:
            self._from_step = step
        self._step = step
        if self.path is not None and self._clock() - self._written > _WRITE_EVERY:
            with suppress(OSError):  # a full disk takes the account later
                self.write()

    def write(self) -> None:
        if self.path is None:
            return
        self._settle()
        half = self.path.with_name(self.path.name + ".tmp")
        half.write_text(json.dumps({"starts": [*self._earlier, self._this_start()]}, indent=1))
        os.replace(half, self.path)
        self._written = self._clock()

    def _this_start(self) -> dict[str, Any]:
        return {
            "began_at": self._began_at,
            "seconds": dict(self._seconds),
            "lost": 0.0,
            "from_step": self._from_step or 0,
            "step": self._step,
        }

    def summary(self) -> dict[str, Any]:
        """Seconds by category over all starts, and their sum: the time between starts is not in it."""
        self._settle()
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
        """The summary for people, the largest first."""
        summary = self.summary()
        total, starts = summary["total"], summary["starts"]
        lines = [f"how the wall-clock was spent: {duration(total)}" + (f" in {starts} starts" if starts > 1 else "")]
        for name, seconds in sorted(summary["seconds"].items(), key=lambda item: -item[1]):
            share = seconds / total if total > 0 else 0.0
            if share >= 0.0005:
                word = _WORDS.get(name, name)
                bar = "█" * round(30 * share)
                lines.append(f"  {word:<17} {duration(seconds):>10} {share:7.1%}  {bar}".rstrip())
        return "\n".join(lines)


_WORDS = {
    "step": "training",
    "data_preparation": "data preparation",
    "data_wait": "waiting for data",
    "lost": "lost to kills",
}


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _read(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    try:
        return list(json.loads(path.read_text())["starts"])
    except (ValueError, KeyError, TypeError):  # an account is not worth a run
        return []
