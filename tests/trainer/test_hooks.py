"""Hooks run once when due, save before they stop the run, and persist across restarts."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.checkpoint.checkpointer import CheckpointConfig
from trainer.hooks import (
    INTERRUPTED,
    PREEMPTED,
    STOPPED_EARLY,
    EarlyStopping,
    EvaluateEvery,
    SampleEvery,
    SaveEvery,
    StopOnSignal,
    due,
    profile,
    restore_hook_states,
)
from trainer.loop import StopTraining
from trainer.reliability.goodput import GoodputRecorder

SOURCE: Any = SimpleNamespace(get_state=lambda: {"index": 5})
STATE: Any = SimpleNamespace(params=1.0)


class Saved:
    """A fake Checkpointer that records its calls."""

    def __init__(self, config: CheckpointConfig, latest: int | None = None):
        self.config, self.calls, self._latest = config, {}, latest

    def latest(self) -> int | None:
        return self._latest

    def save(self, step: int, state: Any, **items: Any) -> None:
        assert step not in self.calls
        self.calls[step] = json.loads(json.dumps(items))


def evaluation(losses: dict[int, float], *, every: int = 1, num_steps: int = 100) -> tuple[EvaluateEvery, list[int]]:
    done: list[int] = []
    hook = EvaluateEvery(
        every,
        num_steps=num_steps,
        evaluate=lambda state: {"eval/loss": losses[state]},
        on_metrics=lambda step, metrics: done.append(step),
        ledger=GoodputRecorder(),
    )
    return hook, done


def saver(checkpointer: Saved, **options: Any) -> SaveEvery:
    options = {"num_steps": 10, "config": {"seed": 1}, "tokenizer": {}, "ledger": GoodputRecorder(), **options}
    return SaveEvery(checkpointer, **options)  # type: ignore[arg-type]


def test_due_at_multiples_and_at_the_end_but_not_at_step_0():
    assert [s for s in range(11) if due(s, every=4, num_steps=10)] == [4, 8, 10]
    assert [s for s in range(11) if due(s, every=0, num_steps=10)] == [10]


def test_each_step_is_evaluated_once_even_after_a_resume():
    hook, done = evaluation({4: 2.0, 8: 3.0}, every=4, num_steps=8)
    for step in range(9):
        hook(step, step, SOURCE)  # type: ignore[arg-type]
    assert done == [4, 8] and (hook.best_step, hook.best_loss, hook.loss_at(8)) == (4, 2.0, 3.0)
    again, done = evaluation({8: 3.0}, every=4, num_steps=8)
    again.set_state(json.loads(json.dumps(hook.get_state(8))))
    again(8, 8, SOURCE)  # type: ignore[arg-type]
    assert done == [] and again.best_loss == 2.0
    fresh, done = evaluation({}, every=4)
    fresh.set_state(json.loads(json.dumps(evaluation({})[0].get_state(0))))  # no evaluation yet
    assert fresh.loss_at(0) is None and fresh.best_loss == float("inf")


def test_saves_when_due_at_the_end_and_at_the_best_loss():
    found, _ = evaluation({2: 5.0, 4: 3.0, 6: 4.0, 8: 2.0, 10: 9.0}, every=2, num_steps=10)
    checkpointer = Saved(CheckpointConfig(save_interval_steps=5, keep_best=True))
    saved_steps: list[int] = []
    hook = saver(
        checkpointer, evaluation=found, remembers={"evaluation": found}, on_saved=lambda s, t: saved_steps.append(s)
    )
    for step in range(11):
        found(step, step, SOURCE)  # type: ignore[arg-type]
        hook(step, STATE, SOURCE)
        hook(step, STATE, SOURCE)
    assert sorted(checkpointer.calls) == saved_steps == [2, 4, 5, 8, 10]
    assert checkpointer.calls[4]["metrics"] == {"loss": 3.0} and checkpointer.calls[5]["metrics"] is None
    assert checkpointer.calls[10]["source"] == {"index": 5}
    assert checkpointer.calls[10]["extra"]["evaluation"]["best_step"] == 8


def test_resumed_step_is_not_saved_again():
    checkpointer = Saved(CheckpointConfig(save_interval_steps=5), latest=5)
    hook = saver(checkpointer)
    hook(5, STATE, SOURCE)
    assert checkpointer.calls == {}


def test_early_stopping_saves_a_checkpoint_and_persists_across_restarts():
    losses = {1: 3.0, 2: 2.0, 3: 1.999, 4: float("nan"), 5: 1.998, 6: 0.0}

    def run(steps: range, memory: dict[str, Any] | None) -> tuple[dict[str, Any], int | None, list[int]]:
        found, _ = evaluation(losses)
        saved: list[int] = []
        stop = EarlyStopping(found, patience=3, min_delta=0.01, save=lambda step, state, source: saved.append(step))
        if memory is not None:
            restore_hook_states(memory, {"found": found, "stop": stop})
        for step in steps:
            found(step, step, SOURCE)  # type: ignore[arg-type]
            memory = json.loads(json.dumps({"found": found.get_state(step), "stop": stop.get_state(step)}))
            try:
                stop(step, STATE, SOURCE)
            except StopTraining as error:
                assert error.reason == STOPPED_EARLY
                return memory, step, saved
        assert memory is not None
        return memory, None, saved

    _, stopped, saved = run(range(1, 7), None)
    assert stopped == 5 and saved == [5]
    for cut in range(1, 5):  # the same with a restart at each step
        memory, stopped, _ = run(range(1, cut + 1), None)
        assert stopped is None
        assert run(range(cut, 7), memory)[1] == 5


def test_patience_0_never_stops():
    found, _ = evaluation(dict.fromkeys(range(1, 50), 1.0))
    saved: list[int] = []
    stop = EarlyStopping(found, patience=0, save=lambda step, *_: saved.append(step))
    for step in range(1, 50):
        found(step, step, SOURCE)  # type: ignore[arg-type]
        stop(step, STATE, SOURCE)
    assert found.step == 49 and not saved


def test_samples_are_generated_once_per_due_step():
    drawn: list[tuple[int, Any]] = []
    options: dict[str, Any] = dict(
        num_steps=5, params_of=lambda s: s.params, sample=lambda *a: drawn.append(a), ledger=GoodputRecorder()
    )
    hook = SampleEvery(2, **options)
    for step in range(6):
        hook(step, STATE, SOURCE)
    assert drawn == [(2, 1.0), (4, 1.0), (5, 1.0)]
    again = SampleEvery(2, **options)
    restore_hook_states({"samples": hook.get_state(5)}, {"samples": again})
    again(5, STATE, SOURCE)
    assert len(drawn) == 3


@pytest.mark.parametrize("number, reason", [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_signal_stops_the_run_before_the_next_step_with_a_checkpoint(number, reason):
    before = signal.getsignal(number)
    saved: list[int] = []
    with StopOnSignal(lambda step, state, source: saved.append(step)) as hook:
        hook(1, STATE, SOURCE)
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == before  # a second signal acts immediately
        with pytest.raises(StopTraining) as stopped:
            hook(2, STATE, SOURCE)
    assert stopped.value.reason == reason and saved == [2]
    assert signal.getsignal(number) == before


def test_previous_handlers_are_restored_without_a_signal():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopOnSignal(lambda *_: None):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_profile_traces_the_requested_steps(tmp_path, monkeypatch):
    calls: list[tuple[str, int]] = []
    now = 0
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append((Path(folder).name, now)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append(("stop", now)))
    hook = profile(3, 4, tmp_path / "profile")
    for now in range(8):
        hook(now, STATE, SOURCE)
    assert calls == [("profile", 2), ("stop", 4)]
    with pytest.raises(ValueError, match=r"task\.profile_steps=\[5, 4\]"):
        profile(5, 4, tmp_path)
