"""Heartbeats between the processes of a run: progress, what each one waits for, and which are lost.

Each process writes a heartbeat every second to the key-value store of JAX's coordination service, which process 0
hosts. Process 0 checks them and publishes which processes are silent or have exited with an error; the others read
that with each of their heartbeats. A missing heartbeat alone ends no process: one exits only if JAX cannot continue,
after a failed collective or when JAX itself aborts, and then reports which process was lost.
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

HEARTBEAT_INTERVAL = 1.0  # seconds between heartbeats
HEARTBEAT_TIMEOUT = 3.0  # seconds without a new heartbeat after which a process counts as lost
NAMING_TIMEOUT = 8.0  # seconds to wait for the name of the lost process after a failed collective
SIGNS, FAILURES = "meshwright/signs", "meshwright/news"


class Store(Protocol):
    """The methods used of JAX's distributed client."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_try_get(self, key: str) -> str: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclass
class Heartbeat:
    """State that a process reports."""

    count: int = 0  # heartbeats so far; it increases while the process lives
    step: int = 0
    doing: str = "starts"
    host: str = field(default_factory=lambda: os.uname().nodename)
    pid: int = field(default_factory=os.getpid)
    left: int | None = None  # the exit code, once the process ends


class PeerStatus:
    """Tracks on process 0 since when each process has sent no new heartbeat."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, tuple[int, float]] = {}

    def failures(self, signs: dict[int, Heartbeat]) -> dict[int, str]:
        """Returns the lost processes and how they failed, without those that are done or left because of another."""
        now, found = self._clock(), {}
        for process, sign in signs.items():
            count, since = self._seen.get(process, (-1, now))
            if sign.count != count:
                self._seen[process] = sign.count, (since := now)
            if sign.left not in (None, 0, PREEMPTED):
                found[process] = f"exited with code {sign.left}, see its output"
            elif sign.left is None and now - since >= HEARTBEAT_TIMEOUT:
                found[process] = f"no heartbeat for {now - since:.0f} s, the last after step {sign.step}"
        silent = {process: how for process, how in found.items() if how.startswith("no heartbeat")}
        # A killed process sends no exit code; those that exit with code 1 may only have missed it.
        return {process: f"({signs[process].host}) is lost: {how}" for process, how in (silent or found).items()}


class Peers:
    """Heartbeats of this process. Its two daemon threads end with the process, or with `stop`."""

    def __init__(
        self,
        store: Store,
        index: int,
        count: int,
        coordinator: str | None,
        *,
        pause: float = HEARTBEAT_INTERVAL,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """`coordinator`: host:port of process 0's service, if known; `leave`: ends the process with an exit code."""
        self.index, self.count = index, count
        self.progress: Callable[[], tuple[int, str]] = lambda: (0, "starts")  # the last step, and the current activity
        self._store, self._coordinator, self._pause, self._leave = store, coordinator, pause, leave
        self._sign, self._status = Heartbeat(), PeerStatus()
        self._failures: dict[str, str] = {}
        self._published = time.monotonic()
        self._end, self._exit_lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._live, self._watch)]

    def start(self) -> None:
        _delay_aborts()
        for thread in self._threads:
            thread.start()

    def stop(self, code: int = 0) -> None:
        """Stops the heartbeats and publishes that this process ends."""
        self._end.set()
        if self._threads[0].is_alive():
            self._threads[0].join(2 * self._pause)
        self._sign.left = code
        with contextlib.suppress(Exception):
            self.publish()

    def publish(self) -> None:
        """Writes one heartbeat, and publishes or reads the lost processes."""
        self._sign.count += 1
        self._sign.step, self._sign.doing = self.progress()
        self._store.key_value_set(f"{SIGNS}/{self.index}", json.dumps(vars(self._sign)), allow_overwrite=True)
        if self.index == 0:
            text = json.dumps(self._status.failures(self.signs()))
            self._store.key_value_set(FAILURES, text, allow_overwrite=True)
        else:
            text = _get_or_empty(self._store, FAILURES)
        self._failures = json.loads(text)
        self._published = time.monotonic()

    def signs(self) -> dict[int, Heartbeat]:
        """Returns the newest heartbeat of each process."""
        pairs = self._store.key_value_dir_get(SIGNS + "/")
        return {int(key.rpartition("/")[2]): Heartbeat(**json.loads(value)) for key, value in pairs}

    def _live(self) -> None:
        while not self._end.wait(self._pause):
            with contextlib.suppress(Exception):  # the other thread handles lasting failures
                self.publish()

    def _watch(self) -> None:
        """Handles a lost coordinator, where the other thread's call never returns, and aborts of JAX."""
        while not self._end.wait(self._pause):
            silent = time.monotonic() - self._published
            lost = silent > 2 * self._pause
            if lost and self.index and self._refused():
                self._failures = {"0": f"is lost: no connection to {self._coordinator}"}
                self.exit_lost("the coordinator is lost", patience=0)
            elif (lost or self._failed_peers()) and _aborting():
                if lost and self.index:
                    self._failures = {"0": f"is lost: no answer for {silent:.0f} s"}
                self.exit_lost("JAX is aborting without it", patience=0)

    def _refused(self) -> bool:
        """Returns whether two connections to the coordinator were refused."""
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

    def exit_lost(self, why: str, *, patience: float = NAMING_TIMEOUT) -> None:
        """Reports the lost processes and exits with code 75. `why`: the error that shows it; `patience`: seconds."""
        deadline = time.monotonic() + patience
        while not self._failed_peers() and time.monotonic() < deadline and not self._end.is_set():
            time.sleep(self._pause / 4)
        with self._exit_lock:  # several threads may get here at the same time
            who = "; ".join(f"process {process} {how}" for process, how in self._failed_peers().items())
            print(
                f"meshwright: process {self.index} of {self.count}, {time.strftime('%F %T')}: "
                f"{who or 'another process is lost'} ({why}); exiting with code {PREEMPTED}, to resume from the "
                "newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
            self.go(PREEMPTED)

    def go(self, code: int) -> None:
        """Ends this process at once; process 0 after the others have had time to read the lost processes."""
        self._end.set()
        self._sign.left = code
        if time.monotonic() - self._published < 2 * self._pause:  # else the store is unreachable
            last = threading.Thread(target=self._last_sign, daemon=True)  # may never return
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
        return {process: how for process, how in self._failures.items() if process != str(self.index)}

    def compared(self) -> str:
        """Lists the progress of all processes, slowest first: `process 2 (n7) after step 41: waiting for data`."""
        try:
            signs = self.signs()
        except Exception:
            return "the heartbeats of the other processes cannot be read"
        groups: dict[tuple[int, bool, str], list[int]] = defaultdict(list)
        for process, sign in sorted(signs.items()):
            groups[sign.step, sign.doing.startswith("waiting for devices"), sign.doing].append(process)
        lines = [
            f"{_named(processes, signs, self.count)} after step {step}: {doing}"
            for (step, _, doing), processes in sorted(groups.items())
        ]
        return "; ".join(lines)


def _named(processes: list[int], signs: dict[int, Heartbeat], count: int) -> str:
    if len(processes) == count:
        return f"all {count} processes"
    if len(processes) > 4:
        return f"{len(processes)} processes, including {processes[0]},"
    names = ", ".join(f"{process} ({signs[process].host})" for process in processes)
    return f"process {names}" if len(processes) == 1 else f"processes {names}"


def _get_or_empty(store: Store, key: str) -> str:
    try:
        return store.key_value_try_get(key)
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return "{}"
        raise


def _aborting() -> bool:
    """Returns whether a thread of this process is in the handler of `_delay_aborts`, if /proc exists.

    Such a thread blocks SIGABRT, but not all signals, as a thread that is just being created does.
    """
    for status in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread has ended
            blocked = re.search(r"^SigBlk:\s*(\w+)", status.read_text(), re.M)
            mask = int(blocked[1], 16) if blocked else 0
            if mask >> (signal.SIGABRT - 1) & 1 and not mask >> (signal.SIGFPE - 1) & 1:
                return True
    return False


def _delay_aborts() -> None:
    """Delays aborts so that the lost process can be reported: JAX aborts as soon as the coordinator is lost.

    Installs C's async-signal-safe `sleep` as the handler of SIGABRT. Its argument is the signal number, so the aborting
    thread sleeps for 6 seconds while the other threads continue, and then aborts.
    """
    try:
        c = ctypes.CDLL(None)
        c.signal.argtypes, c.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        c.signal(int(signal.SIGABRT), ctypes.cast(c.sleep, ctypes.c_void_p))
    except (OSError, AttributeError, TypeError):  # no such C library: aborts are not delayed
        pass
