"""Watchdog: detects hangs, reports what the run is waiting for, and dumps the stacks of all threads."""

import enum
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, TracebackType

ABORTED = 75  # exit code, as for preemption: a restart may help


class WatchdogAction(enum.Enum):
    """Reaction to a hang."""

    warn = "warn"  # log a warning
    abort = "abort"  # log a warning and exit with code 75, to be restarted from the newest checkpoint


# Functions on the main thread's stack, searched from the innermost frame, and what they wait for.
MEANINGS = {
    "next_batch": "waiting for data: slow or stuck data source",
    "flush": "waiting for devices: a collective that not all processes have joined, or a slow or broken device",
    "guarded": "waiting to dispatch the next step to the devices",
    "save": "waiting for a checkpoint to be written: slow or full storage",
    "wait": "waiting for a checkpoint to be written: slow or full storage",
}


class Watchdog(AbstractContextManager["Watchdog"]):
    """A thread that periodically checks for a recent `beat`."""

    def __init__(
        self,
        seconds: float,
        *,
        on_hang: WatchdogAction,
        doing: Callable[[], str],
        say: Callable[[str], None],
        stacks: Path,
        others: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
    ):
        """`seconds`: time without a beat that counts as a hang; 0 disables the watchdog. `doing`: returns the phase.

        `stacks`: file for stack dumps. `others`: returns a description of the progress of all other processes. `leave`:
        exits the process.
        """
        self.seconds, self._on_hang, self._doing, self._say, self._stacks = seconds, on_hang, doing, say, stacks
        self._others, self._clock, self._leave = others, clock, leave
        self._watched = threading.get_ident()
        self._last, self._step, self._reported = clock(), 0, False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        self._last = self._clock()
        if self.seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, step: int) -> None:
        """Reports progress: the run has reached this step."""
        if self._reported:
            self._say(f"step {step}: progress resumed after {self._clock() - self._last:,.0f} s")
        self._last, self._step, self._reported = self._clock(), step, False

    def progress(self) -> tuple[int, str]:
        """Describes the last step and the current phase."""
        return self._step, self.waits_for()

    def waits_for(self) -> str:
        """Describes what the run is waiting for."""
        return meaning(self._doing(), sys._current_frames().get(self._watched))

    def _watch(self) -> None:
        while not self._end.wait(min(5.0, self.seconds / 4)):
            self.check()

    def check(self) -> None:
        """Reports a hang once and takes the configured action if the last beat is too long ago."""
        idle = self._clock() - self._last
        if idle < self.seconds or self._reported:
            return
        self._reported = True
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with open(self._stacks, "a") as file:
            print(f"after step {self._step}, {idle:,.0f} s without progress, {time.strftime('%F %T')}", file=file)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        others = self._others()
        self._say(
            f"no progress for {idle:,.0f} s after step {self._step}: {self.waits_for()}; "
            + (f"{others}; " if others else "")
            + f"stacks: {self._stacks}"
            + (
                f"; exiting with code {ABORTED}"
                if self._on_hang is WatchdogAction.abort
                else f"; task.watchdog_action=abort would exit with code {ABORTED}"
            )
        )
        if self._on_hang is WatchdogAction.abort:
            sys.stdout.flush()
            sys.stderr.flush()
            self._leave(ABORTED)


def meaning(phase: str, frame: FrameType | None) -> str:
    """Describes what a thread with this stack frame is waiting for in this phase of the run."""
    while frame is not None:
        found = MEANINGS.get(frame.f_code.co_name)
        if found is not None and phase == "step":
            return found
        frame = frame.f_back
    return f"in phase {phase!r}"
