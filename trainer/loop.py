"""Training loop of every phase.

Order of operations in one iteration:

1. hooks run with the state after `step` updates and the data source before it advances, so a save is consistent;
2. the next batch is fetched;
3. the step is dispatched asynchronously;
4. the metrics of the *previous* step are fetched, which the device has finished or is about to finish: the device
   never waits for Python;
5. these metrics are reported.

There is one more iteration than there are steps, so the final evaluation and save run as hooks, too. Before hooks that
may save, 4 and 5 come first: a run resumed from that checkpoint does not report the update again.
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
LONG_HOOKS = 0.005  # seconds in hooks above which the step time is not reported


class StopTraining(Exception):
    """Raised by a hook to end the run cleanly; `reason` is what `fit` returns."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Pending:
    """Metrics and timing of the step in flight, fetched in one call, one iteration later."""

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
        if self.in_hooks < LONG_HOOKS:  # otherwise the device overlapped with the hooks by an unknown time
            step = now - self.since - self.in_hooks
            # No batch is fetched after the last step: use the time of its own fetch and dispatch instead.
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
    """Trains until `num_steps` updates are done in total, or a hook raises `StopTraining`.

    `report(step, metrics, timing)` is called once per update, one iteration late; `step` includes that update.
    `timing`, in seconds: `data_wait` and `dispatch` of that update, `device_wait` for its metrics, `hooks`, and `step`
    since the previous metrics, without hooks (omitted after long hooks).
    `may_save(step)`: whether a hook may save a checkpoint at this step.
    Returns: the final state, and the reason for stopping: "done" or that of the hook.
    """
    pending = _Pending(report)
    reason = DONE
    for step in range(int(state.step), num_steps + 1):
        if step == num_steps or may_save(step):
            pending.flush(last=True)  # no further step is dispatched that could overlap with the fetch
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
