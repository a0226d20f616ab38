"""Notices that a run stands still, says in what, and writes down where every thread is."""

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

ABORTED = 75  # as preempted: what another start may cure


class WatchdogAction(enum.Enum):
    warn = "warn"  # it is told
    abort = "abort"  # and the process leaves with 75, to be started again from the newest checkpoint


# Functions on the main thread's stack, the innermost first to be found, and what being in them means.
MEANINGS = {
    "next_batch": "waits for data: a slow or stuck source",
    "flush": "waits for its devices: a collective that not all processes have joined, or a slow or broken device",
    "guarded": "waits to hand the devices their next step",
    "save": "waits for a checkpoint to be written: slow or full storage",
    "wait": "waits for a checkpoint to be written: slow or full storage",
}


class Watchdog(AbstractContextManager["Watchdog"]):
    """A thread that looks from time to time whether there was a `beat`."""

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
        """`seconds` without a beat are a hang; 0: never. `current_phase`: the phase of the run. `stacks`: the file to write.

        `others`: where the other processes are, in words.
        """
        self.seconds, self._on_hang, self._doing, self._say, self._stacks = seconds, on_hang, doing, say, stacks
        self._others, self._clock, self._leave = others, clock, leave
        self._watched = threading.get_ident()
        self._last, self._step, self._told = clock(), 0, False
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
        """The run has come to this step."""
        if self._told:
            self._say(f"step {step}: goes on after {self._clock() - self._last:,.0f} s")
        self._last, self._step, self._told = self._clock(), step, False

    def progress(self) -> tuple[int, str]:
        """The last step, and what the run does now, in words."""
        return self._step, self.waits_for()

    def waits_for(self) -> str:
        return meaning(self._doing(), sys._current_frames().get(self._watched))

    def _watch(self) -> None:
        while not self._end.wait(min(5.0, self.seconds / 4)):
            self.look()

    def look(self) -> None:
        """Tells, once, if there was no beat for too long."""
        still = self._clock() - self._last
        if still < self.seconds or self._told:
            return
        self._told = True
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with open(self._stacks, "a") as file:
            print(f"after step {self._step}, {still:,.0f} s without progress, {time.strftime('%F %T')}", file=file)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        others = self._others()
        self._say(
            f"no progress for {still:,.0f} s after step {self._step}: the run {self.waits_for()}; "
            + (f"{others}; " if others else "")
            + f"stacks: {self._stacks}"
            + (
                "; leaving with 75"
                if self._on_hang is WatchdogAction.abort
                else "; task.watchdog_action=abort would leave with 75"
            )
        )
        if self._on_hang is WatchdogAction.abort:
            sys.stdout.flush()
            sys.stderr.flush()
            self._leave(ABORTED)


def meaning(phase: str, frame: FrameType | None) -> str:
    """What a thread that is there in this phase is waiting for."""
    while frame is not None:
        found = MEANINGS.get(frame.f_code.co_name)
        if found is not None and phase == "step":
            return found
        frame = frame.f_back
    return f"is in its phase {phase!r}"
