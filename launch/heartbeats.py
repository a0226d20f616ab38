"""Signs of life of the processes of a run: how far each is, what it waits for, and who is gone.

Each process writes a sign every second into the key-value store of JAX's coordination service, which process 0 holds.
Process 0 looks through them and publishes who has given none for a while, or has left with an error; the others read
that with each sign of theirs. Nobody leaves for silence alone, only where JAX says that it cannot go on, by a failing
collective or an abort of its own. Then the line says who it was.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from launch.exit_codes import PREEMPTED

PAUSE = 1.0  # seconds between signs
SILENT = 3.0  # seconds without a new sign after which a process is named
PATIENCE = 8.0  # seconds in which somebody is named after a collective has failed
SIGNS, NEWS = "meshwright/signs", "meshwright/news"


class Store(Protocol):
    """What is used of JAX's distributed client."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_try_get(self, key: str) -> str: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclass
class Heartbeat:
    """What a process says of itself."""

    count: int = 0  # of signs: who lives counts on
    step: int = 0
    doing: str = "starts"
    host: str = field(default_factory=lambda: os.uname().nodename)
    pid: int = field(default_factory=os.getpid)
    left: int | None = None  # the exit code with which it goes


class PeerStatus:
    """What process 0 knows of all: since when each has given the same sign."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, tuple[int, float]] = {}

    def news(self, signs: dict[int, Heartbeat]) -> dict[int, str]:
        """Who is gone, and how; who has left because of another, or is done, is not."""
        now, found = self._clock(), {}
        for process, sign in signs.items():
            count, since = self._seen.get(process, (-1, now))
            if sign.count != count:
                self._seen[process] = sign.count, (since := now)
            if sign.left not in (None, 0, PREEMPTED):
                found[process] = f"left with {sign.left}, its own output says why"
            elif sign.left is None and now - since >= SILENT:
                found[process] = f"no sign of life for {now - since:.0f} s, the last after step {sign.step}"
        silent = {process: how for process, how in found.items() if how.startswith("no sign")}
        # Who was killed could say nothing, and those who say 1 may have missed it.
        return {process: f"({signs[process].host}) is gone: {how}" for process, how in (silent or found).items()}


class Peers:
    """This process among the others. Its two threads end with the process, or with `stop`."""

    def __init__(
        self,
        store: Store,
        index: int,
        count: int,
        coordinator: str | None,
        *,
        pause: float = PAUSE,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """`coordinator`: host:port of process 0's service, where it is known."""
        self.index, self.count = index, count
        self.progress: Callable[[], tuple[int, str]] = lambda: (0, "starts")  # the last step, and what is done now
        self._store, self._coordinator, self._pause, self._leave = store, coordinator, pause, leave
        self._sign, self._survey = Heartbeat(), PeerStatus()
        self._news: dict[str, str] = {}
        self._given = time.monotonic()
        self._end, self._told = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._live, self._watch)]

    def start(self) -> None:
        _delay_aborts()
        for thread in self._threads:
            thread.start()

    def stop(self, code: int = 0) -> None:
        """The others are told that this process goes."""
        self._end.set()
        if self._threads[0].is_alive():
            self._threads[0].join(2 * self._pause)
        self._sign.left = code
        with contextlib.suppress(Exception):
            self.publish()

    def publish(self) -> None:
        """One sign, and the news."""
        self._sign.count += 1
        self._sign.step, self._sign.doing = self.progress()
        self._store.key_value_set(f"{SIGNS}/{self.index}", json.dumps(vars(self._sign)), allow_overwrite=True)
        if self.index == 0:
            text = json.dumps(self._survey.news(self.signs()))
            self._store.key_value_set(NEWS, text, allow_overwrite=True)
        else:
            text = _or_nothing(self._store, NEWS)
        self._news = json.loads(text)
        self._given = time.monotonic()

    def signs(self) -> dict[int, Heartbeat]:
        """The newest of each process."""
        pairs = self._store.key_value_dir_get(SIGNS + "/")
        return {int(key.rpartition("/")[2]): Heartbeat(**json.loads(value)) for key, value in pairs}

    def _live(self) -> None:
        while not self._end.wait(self._pause):
            with contextlib.suppress(Exception):  # where it lasts, the other thread sees
                self.publish()

    def _watch(self) -> None:
        """Where the coordinator is gone the other thread's call does not come back; where JAX aborts, it goes on."""
        while not self._end.wait(self._pause):
            silent = time.monotonic() - self._given
            lost = silent > 2 * self._pause
            if lost and self.index and self._refused():
                self._news = {"0": f"is gone: nobody answers at {self._coordinator}"}
                self.exit_lost("the coordinator is lost", patience=0)
            elif (lost or self._failed_peers()) and _aborting():
                if lost and self.index:
                    self._news = {"0": f"is gone: no answer from it for {silent:.0f} s"}
                self.exit_lost("JAX cannot go on without it", patience=0)

    def _refused(self) -> bool:
        """Whether nobody takes calls where the coordinator was; asked twice."""
        if self._answers():
            return False
        time.sleep(self._pause / 2)
        return not self._answers()

    def _answers(self) -> bool:
        host, _, port = (self._coordinator or "").rpartition(":")
        if not host:
            return True
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return True

    def exit_lost(self, why: str, *, patience: float = PATIENCE) -> None:
        """Says who is gone, and leaves with 75. `why`: how this process learnt that it cannot go on."""
        deadline = time.monotonic() + patience
        while not self._failed_peers() and time.monotonic() < deadline and not self._end.is_set():
            time.sleep(self._pause / 4)
        with self._told:  # threads may learn it at the same time
            who = "; ".join(f"process {process} {how}" for process, how in self._failed_peers().items())
            print(
                f"meshwright: process {self.index} of {self.count}, {time.strftime('%F %T')}: "
                f"{who or 'another process is gone'} ({why}); leaving with {PREEMPTED}, to go on from the newest "
                "checkpoint",
                file=sys.stderr,
                flush=True,
            )
            self.go(PREEMPTED)

    def go(self, code: int) -> None:
        """Ends this process at once; process 0 when the others have had time to read the news."""
        self._end.set()
        self._sign.left = code
        if time.monotonic() - self._given < 2 * self._pause:  # else the store is gone
            last = threading.Thread(target=self._last_sign, daemon=True)  # which may not come back
            last.start()
            last.join(3 * self._pause)
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave(code)

    def _last_sign(self) -> None:
        with contextlib.suppress(Exception):
            self.publish()
            if self.index == 0:
                time.sleep(2 * self._pause)

    def _failed_peers(self) -> dict[str, str]:
        return {process: how for process, how in self._news.items() if process != str(self.index)}

    def compared(self) -> str:
        """Where all processes are, those that are behind first: `process 2 (node7) after step 41: waits for data`."""
        try:
            signs = self.signs()
        except Exception:
            return "the others cannot be asked"
        groups: dict[tuple[int, bool, str], list[int]] = defaultdict(list)
        for process, sign in sorted(signs.items()):
            groups[sign.step, "its devices" in sign.doing, sign.doing].append(process)
        told = [
            f"{_named(processes, signs, self.count)} after step {step}: {doing}"
            for (step, _, doing), processes in sorted(groups.items())
        ]
        return "; ".join(told)


def _named(processes: list[int], signs: dict[int, Heartbeat], count: int) -> str:
    if len(processes) == count:
        return f"all {count} processes"
    if len(processes) > 4:
        return f"{len(processes)} processes, {processes[0]} among them,"
    names = ", ".join(f"{process} ({signs[process].host})" for process in processes)
    return f"process {names}" if len(processes) == 1 else f"processes {names}"


def _or_nothing(store: Store, key: str) -> str:
    try:
        return store.key_value_try_get(key)
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return "{}"
        raise


def _aborting() -> bool:
    """Whether a thread of this process stands in the handler of `_delay_aborts`, where the system tells.

    It then blocks SIGABRT, and not what only a thread that is just being made blocks: everything.
    """
    for status in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):  # that thread has ended
            blocked = re.search(r"^SigBlk:\s*(\w+)", status.read_text(), re.M)
            mask = int(blocked[1], 16) if blocked else 0
            if mask >> (signal.SIGABRT - 1) & 1 and not mask >> (signal.SIGFPE - 1) & 1:
                return True
    return False


def _delay_aborts() -> None:
    """Time for last words: JAX's client ends a process by SIGABRT in the moment in which the coordinator is lost.

    The handler is C's `sleep`, which may be called by one, and whose argument is the number of the signal: the thread
    that aborts stands still for 6 seconds while the others go on, and then goes the way of all aborts.
    """
    try:
        c = ctypes.CDLL(None)
        c.signal.argtypes, c.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        c.signal(int(signal.SIGABRT), ctypes.cast(c.sleep, ctypes.c_void_p))
    except (OSError, AttributeError, TypeError):  # no such C library: it is without the line
        pass
