"""The loop of every phase.

Order of operations in a turn, which nothing else may change:

1. hooks see the state after `step` updates and the source before it moves, so what they save fits together;
2. the batch is taken;
3. the step is dispatched; the device works on it from here on;
4. the metrics of the *previous* step are read, which the device has finished or is about to: Python never
   makes the device wait, and waits itself only for a device that is slower than it;
5. they are reported.

There is one turn more than there are steps, so that the last evaluation and save stand in the same place as
all others. Before hooks that may save, 4 and 5 come first: who goes on from there never hears of that update again.
"""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import jax

from trainer.objective import BatchSource
from trainer.state import TrainState
from trainer.step import Metrics, TrainStep

Hook = Callable[[int, TrainState, BatchSource], None]
Report = Callable[[int, dict[str, float], dict[str, float]], None]

DONE = "done"
LONG_HOOKS = 0.005  # seconds of hooks beyond which a step is not timed


class StopTraining(Exception):
    """Raised by a hook to end the run cleanly; `reason` is what `fit` returns."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Pending:
    """Metrics of the step in flight: fetched in one call, one turn later, with where the time went."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.metrics: Metrics | None = None
        self.step = 0
        self.timing: dict[str, float] = {}
        self.since = perf_counter()
        self.in_hooks = 0.0

    def flush(self, *, last: bool = False) -> None:
        if self.metrics is None:
            return
        start = perf_counter()
        values = jax.device_get(self.metrics)
        now = perf_counter()
        self.timing |= {"device_wait": now - start, "hooks": self.in_hooks}
        if self.in_hooks < LONG_HOOKS:  # else the device worked while they did, and nobody can tell for how long
            step = now - self.since - self.in_hooks
            # The last step was not followed by getting the next batch: its own stands in for that.
            own = self.timing["data_wait"] + self.timing["dispatch"]
            self.timing["step"] = max(step, own) if last else step
        self.since, self.in_hooks, self.metrics = now, 0.0, None
        self.report(self.step, {name: float(value) for name, value in values.items()}, self.timing)

    def replace(self, step: int, metrics: Metrics, timing: dict[str, float]) -> None:
        self.flush()
        self.step, self.metrics, self.timing = step, metrics, timing


def fit(
    state: TrainState,
    frozen: Mapping[str, Any],
    source: BatchSource,
    train_step: TrainStep,
    *,
    num_steps: int,
    hooks: Sequence[Hook],
    report: Report,
    may_save: Callable[[int], bool] = lambda step: False,
) -> tuple[TrainState, str]:
    """Trains until `num_steps` updates have been done in all, or a hook raises `StopTraining`.

    `report(step, metrics, timing)` is called once for each update, one turn late; `step` counts updates, that
    one included. Seconds in `timing`: `data_wait` and `dispatch` of that update, `device_wait` for its
    metrics, `step` since the metrics before it, without the `hooks` in between, unless those took long.
    `may_save(step)`: whether one of the hooks may keep this state for a later start.
    Returns: the state, and the reason for the end: "done" or the hook's.
    """
    pending = _Pending(report)
    reason = DONE
    for step in range(int(state.step), num_steps + 1):
        if step == num_steps or may_save(step):
            pending.flush(last=True)  # nothing is dispatched after it that its metrics could wait for
        start = perf_counter()
        try:
            for hook in hooks:
                hook(step, state, source)
        except StopTraining as stop:
            reason = stop.reason
            break
        finally:
            after_hooks = perf_counter()
            pending.in_hooks += after_hooks - start
        if step == num_steps:
            break
        batch = source.next_batch(state)
        after_data = perf_counter()
        state, metrics = train_step(state, frozen, batch)
        timing = {"data_wait": after_data - after_hooks, "dispatch": perf_counter() - after_data}
        pending.replace(step + 1, metrics, timing)
    pending.flush(last=True)
    return state, reason
