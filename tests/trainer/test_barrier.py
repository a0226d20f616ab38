"""Commit barrier: all processes commit a checkpoint or none does, and none waits for a failed process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from trainer.checkpoint import barrier as commit
from trainer.checkpoint.barrier import COMMITTED, MARKS, WRITTEN, CommitBarrier


class Store(dict):
    """Key-value store and barriers of the coordination service, for threads that simulate processes."""

    def __init__(self, count):
        self.meetings, self.count, self.lock = {}, count, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        self[key] = value

    def key_value_try_get(self, key):
        if key not in self:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self[key]

    def wait(self, *, key, timeout_ms):
        with self.lock:
            meeting = self.meetings.setdefault(key, threading.Barrier(self.count))
        meeting.wait(timeout=20)


@pytest.fixture
def saves(monkeypatch):
    """Saves in one thread per process, calling the barriers as Orbax does; returns the results of each."""

    def run(fails, rounds=1):
        store = Store(len(fails))
        made = []
        for _ in fails:
            monkeypatch.setattr(commit, "_number", iter([7]))  # the same manager on all processes
            made.append(CommitBarrier(store.wait, store))

        def one(barrier, fails):
            committed = []
            for step in range(rounds):
                failed = False
                barrier(key=f"{MARKS}{step}a", timeout_ms=1)
                try:
                    if fails == "writing" and step == 0:
                        raise OSError("no space")
                    barrier(key=f"{WRITTEN}.{step}", timeout_ms=1)
                    if fails == "committing" and step == 0:
                        raise OSError("no space")
                    barrier(key=f"{COMMITTED}.{step}", timeout_ms=1)
                except (OSError, RuntimeError):
                    failed = True
                barrier(key=f"{MARKS}{step}b", timeout_ms=1)
                committed.append((not failed, not barrier.agree(failed)))
            return committed

        with ThreadPoolExecutor(len(fails)) as pool:
            return list(pool.map(one, made, fails))

    return run


def test_all_processes_commit_without_a_failure(saves):
    assert saves([None, None, None], rounds=2) == [[(True, True)] * 2] * 3


@pytest.mark.parametrize("stage", ["writing", "committing"])
@pytest.mark.parametrize("who", [0, 2])
def test_one_failure_fails_all_processes_and_the_next_save_succeeds(saves, stage, who):
    fails = [stage if process == who else None for process in range(3)]
    assert saves(fails, rounds=2) == [[(False, False), (True, True)]] * 3
