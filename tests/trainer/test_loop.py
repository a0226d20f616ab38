"""Training loop: order of operations, metrics, timing and early stop."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from trainer.loop import StopTraining, fit
from trainer.state import TrainState


class Source:
    """A data source that counts batches; each batch is its count."""

    def __init__(self) -> None:
        self.taken = 0

    def next_batch(self, state: Any) -> Any:
        self.taken += 1
        return self.taken

    def get_state(self) -> dict:
        return {"taken": self.taken}

    def set_state(self, saved: dict) -> None:
        self.taken = saved["taken"]


def new_state(step: int = 0) -> TrainState:
    return TrainState(jnp.asarray(step, jnp.int32), {}, (), jax.random.key(0))


def add_step(state: TrainState, frozen: Any, batch: int) -> tuple[TrainState, dict]:
    state = TrainState(state.step + 1, state.params, state.opt_state, state.rng)
    return state, {"loss": jnp.asarray(float(batch))}


def test_iteration_runs_hooks_batch_step_then_reports_the_previous_step() -> None:
    events: list[str] = []
    source = Source()

    def hook(step: int, state: TrainState, source: Any) -> None:
        events.append(f"hook {step} {int(state.step)} {source.taken}")

    def step(state: TrainState, frozen: Any, batch: int) -> tuple[TrainState, dict]:
        events.append(f"step {batch}")
        return add_step(state, frozen, batch)

    def report(step: int, metrics: dict, timing: dict) -> None:
        events.append(f"report {step} {metrics['loss']}")

    state, reason = fit(new_state(), {}, source, step, num_steps=2, hooks=[hook], report=report)
    assert events == [
        "hook 0 0 0",
        "step 1",
        "hook 1 1 1",
        "step 2",
        "report 1 1.0",
        "report 2 2.0",  # before the last hooks, because no step is in flight
        "hook 2 2 2",
    ]
    assert (int(state.step), reason, source.taken) == (2, "done", 2)


def test_all_steps_before_a_save_are_reported_before_it() -> None:
    reports: list[int] = []
    reported_at_save: list[list[int]] = []

    def hook(step: int, state: TrainState, source: Any) -> None:
        if step == 2:
            reported_at_save.append([*reports])

    def step(state: TrainState, frozen: Any, batch: int) -> tuple[TrainState, dict]:
        if batch == 3:
            raise ConnectionError("a peer is gone")  # during this step
        return add_step(state, frozen, batch)

    report = lambda step, metrics, timing: reports.append(step)
    with pytest.raises(ConnectionError):
        fit(new_state(), {}, Source(), step, num_steps=5, hooks=[hook], report=report, may_save=lambda step: step == 2)
    assert reported_at_save == [[1, 2]] and reports == [1, 2]


def test_restored_state_continues_from_its_step() -> None:
    reports: list[int] = []
    fit(
        new_state(5),
        {},
        Source(),
        add_step,
        num_steps=7,
        hooks=[],
        report=lambda step, metrics, timing: reports.append(step),
    )
    assert reports == [6, 7]


def test_finished_run_runs_its_hooks_once_more_and_fetches_no_batch() -> None:
    seen: list[int] = []
    source = Source()
    hook = lambda step, state, source: seen.append(step)
    fit(new_state(3), {}, source, add_step, num_steps=3, hooks=[hook], report=lambda *_: None)
    assert (seen, source.taken) == ([3], 0)


def test_hook_stops_the_run_without_losing_metrics() -> None:
    reports: list[int] = []

    def stop(step: int, state: TrainState, source: Any) -> None:
        if step == 2:
            raise StopTraining("preempted")

    report = lambda step, metrics, timing: reports.append(step)
    state, reason = fit(new_state(), {}, Source(), add_step, num_steps=9, hooks=[stop], report=report)
    assert (int(state.step), reason, reports) == (2, "preempted", [1, 2])


def test_other_errors_propagate() -> None:
    def fail(step: int, state: TrainState, source: Any) -> None:
        raise RuntimeError("broken hook")

    with pytest.raises(RuntimeError, match="broken hook"):
        fit(new_state(), {}, Source(), add_step, num_steps=1, hooks=[fail], report=lambda *_: None)


def test_timing_is_split_into_categories() -> None:
    """Steps with long hooks have no step time, because the device overlaps with the hooks."""
    timings: list[dict[str, float]] = []

    class SlowSource(Source):
        def next_batch(self, state: Any) -> Any:
            time.sleep(0.03)
            return super().next_batch(state)

    fit(
        new_state(),
        {},
        SlowSource(),
        add_step,
        num_steps=3,
        hooks=[lambda step, *_: time.sleep(0.05 if step == 1 else 0)],
        report=lambda step, metrics, timing: timings.append(timing),
    )
    assert len(timings) == 3
    short, long = {"data_wait", "dispatch", "device_wait", "hooks", "step"}, timings[0]
    assert set(timings[1]) == set(timings[2]) == short
    assert set(long) == short - {"step"}
    assert long["hooks"] >= 0.05
    for timing in timings:
        assert timing["data_wait"] >= 0.03
        assert all(seconds >= 0 for seconds in timing.values())
    assert timings[2]["step"] >= timings[2]["data_wait"]


def test_metrics_are_fetched_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fetches: list[Any] = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetches.append(tree) or real(tree))
    fit(new_state(), {}, Source(), add_step, num_steps=4, hooks=[], report=lambda *_: None)
    assert len(fetches) == 4
