"""A run that stands still is noticed, once, with what it waits for and where every thread is."""

import sys

import pytest

from trainer.reliability.watchdog import Watchdog, WatchdogAction, meaning


class Time:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def made(tmp_path):
    def make(on_hang=WatchdogAction.warn, phase="step"):
        said, left, time = [], [], Time()
        watchdog = Watchdog(
            60, on_hang=on_hang, doing=lambda: phase, say=said.append, stacks=tmp_path / "stacks" / "0.txt",
            clock=time, leave=left.append,
        )  # fmt: skip
        return watchdog, said, left, time

    return make


def test_a_hang_is_told_once_with_stacks_and_so_is_its_end(made, tmp_path):
    watchdog, said, left, time = made()
    watchdog.beat(3)
    time.now = 59
    watchdog.look()
    assert not said

    def next_batch():
        time.now = 61
        watchdog.look()
        watchdog.look()

    next_batch()
    assert len(said) == 1 and not left
    assert (
        said[0].startswith("no progress for 61 s after step 3: the run waits for data") and "on_hang=abort" in said[0]
    )
    assert "next_batch" in (tmp_path / "stacks" / "0.txt").read_text()
    time.now = 75
    watchdog.beat(4)
    assert said[1] == "step 4: goes on after 75 s"


def test_abort_leaves_with_75(made):
    watchdog, said, left, time = made(WatchdogAction.abort)
    time.now = 60
    watchdog.look()
    assert left == [75] and "leaving with 75" in said[0]


def test_the_thread_looks_by_itself(tmp_path):
    said = []
    watchdog = Watchdog(
        0.05, on_hang=WatchdogAction.warn, doing=lambda: "step", say=said.append, stacks=tmp_path / "stacks.txt"
    )
    with watchdog:
        for _ in range(1000):
            if said:
                break
            watchdog._end.wait(0.02)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("where", "word"), [("next_batch", "data"), ("flush", "collective"), ("save", "storage"), ("wait", "storage")]
)
def test_what_it_waits_for_is_read_off_the_stack(where, word):
    space = {"sys": sys}
    exec(f"def inner():\n return sys._getframe()\ndef {where}():\n return inner()", space)
    assert word in meaning("step", space[where]())
    assert meaning("evaluate", space[where]()) == "is in its phase 'evaluate'"
