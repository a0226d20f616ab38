"""Watchdog: hangs are reported once, with their cause and the stacks of all threads."""

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
        messages, exits, time = [], [], Time()
        watchdog = Watchdog(
            60, on_hang=on_hang, doing=lambda: phase, say=messages.append, stacks=tmp_path / "stacks" / "0.txt",
            clock=time, leave=exits.append,
        )  # fmt: skip
        return watchdog, messages, exits, time

    return make


def test_hang_and_its_end_are_reported_once_with_stacks(made, tmp_path):
    watchdog, messages, exits, time = made()
    watchdog.beat(3)
    time.now = 59
    watchdog.check()
    assert not messages

    def next_batch():
        time.now = 61
        watchdog.check()
        watchdog.check()

    next_batch()
    assert len(messages) == 1 and not exits
    assert (
        messages[0].startswith("no progress for 61 s after step 3: waiting for data: ")
        and "task.watchdog_action=abort" in messages[0]
    )
    assert "next_batch" in (tmp_path / "stacks" / "0.txt").read_text()
    time.now = 75
    watchdog.beat(4)
    assert messages[1] == "step 4: progress resumed after 75 s"


def test_abort_exits_with_75(made):
    watchdog, messages, exits, time = made(WatchdogAction.abort)
    time.now = 60
    watchdog.check()
    assert exits == [75] and "exiting with code 75" in messages[0]


def test_thread_checks_periodically(tmp_path):
    messages = []
    watchdog = Watchdog(
        0.05, on_hang=WatchdogAction.warn, doing=lambda: "step", say=messages.append, stacks=tmp_path / "stacks.txt"
    )
    with watchdog:
        for _ in range(1000):
            if messages:
                break
            watchdog._end.wait(0.02)
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("where", "word"), [("next_batch", "data"), ("flush", "collective"), ("save", "storage"), ("wait", "storage")]
)
def test_cause_is_derived_from_the_stack(where, word):
    space = {"sys": sys}
    exec(f"def inner():\n return sys._getframe()\ndef {where}():\n return inner()", space)
    assert word in meaning("step", space[where]())
    assert meaning("evaluate", space[where]()) == "in phase 'evaluate'"
