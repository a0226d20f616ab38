"""Hooks that run between steps: evaluate, save, sample, profile, stop.

A hook is called with `(step, state, source)` after `step` updates, before the next batch is fetched. Hooks run in the
order listed: evaluate, sample, save, then those that stop the run. The latter save first, so a stopped run always
leaves a checkpoint of its last step.

`get_state(step)` and `set_state(saved)` persist a hook across restarts; `SaveEvery` writes the state to the checkpoint.
A hook that has already run at a step does not run again when training resumes at that step.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import jax

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.loop import Hook, StopTraining
from trainer.objective import BatchSource, Params
from trainer.reliability.goodput import GoodputRecorder
from trainer.state import TrainState

PREEMPTED = "preempted"  # SIGTERM, or a signal to any process of a multi-process run: requeue the run
INTERRUPTED = "interrupted"  # Ctrl-C in a single-process run
STOPPED_EARLY = "stopped early"

Save = Callable[[int, TrainState, BatchSource], None]


class Stateful(Protocol):
    """An object with JSON-serializable state that is saved in checkpoints alongside the train state."""

    def get_state(self, step: int) -> dict[str, Any]: ...

    def set_state(self, saved: Mapping[str, Any]) -> None: ...


def due(step: int, *, every: int, num_steps: int) -> bool:
    """Returns whether `step` is a positive multiple of `every` or the last step. `every=0`: only the last step."""
    return step == num_steps or (every > 0 and step > 0 and step % every == 0)


class EvaluateEvery:
    """Evaluates at due steps, calls `on_metrics`, and tracks the latest and the best loss."""

    def __init__(
        self,
        every: int,
        *,
        num_steps: int,
        evaluate: Callable[[TrainState], dict[str, float]],
        on_metrics: Callable[[int, dict[str, float]], None],
        ledger: GoodputRecorder,
    ):
        """`evaluate(state)` returns metrics that include `eval/loss`."""
        self._every, self._num_steps = every, num_steps
        self._evaluate, self._on_metrics, self._ledger = evaluate, on_metrics, ledger
        self.step = -1  # step of the latest evaluation
        self.loss = math.nan
        self.best_step, self.best_loss = -1, math.inf

    def due(self, step: int) -> bool:
        return due(step, every=self._every, num_steps=self._num_steps)

    def __call__(self, step: int, state: TrainState, source: BatchSource) -> None:
        if step == self.step or not self.due(step):
            return
        with self._ledger.phase("evaluate"):
            metrics = self._evaluate(state)
        self.step, self.loss = step, metrics["eval/loss"]
        if self.loss < self.best_loss:
            self.best_step, self.best_loss = step, self.loss
        self._on_metrics(step, metrics)

    def loss_at(self, step: int) -> float | None:
        """Returns the loss at `step`; None if it was not evaluated there or is not finite."""
        return self.loss if step == self.step and math.isfinite(self.loss) else None

    def get_state(self, step: int) -> dict[str, Any]:
        # JSON has no infinity or NaN.
        return {
            "step": self.step,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "best_step": self.best_step,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
        }

    def set_state(self, saved: Mapping[str, Any]) -> None:
        self.step, self.best_step = int(saved["step"]), int(saved["best_step"])
        self.loss = math.nan if saved["loss"] is None else float(saved["loss"])
        self.best_loss = math.inf if saved["best_loss"] is None else float(saved["best_loss"])


class SaveEvery:
    """Saves at due steps, at the end, and when the current evaluation has the lowest loss yet."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        *,
        num_steps: int,
        config: Mapping[str, Any],
        tokenizer: Mapping[str, bytes],
        ledger: GoodputRecorder,
        remembers: Mapping[str, Stateful] | None = None,
        evaluation: EvaluateEvery | None = None,
        on_saved: Callable[[int, float], None] | None = None,
    ):
        """`config`: resolved config, saved with the arrays. `remembers`: stateful objects to save, by name.

        `on_saved(step, seconds)` receives the time that training was blocked.
        """
        self._checkpointer, self._num_steps, self._ledger = checkpointer, num_steps, ledger
        self._config, self._tokenizer = config, tokenizer
        self._remembers, self._evaluation = dict(remembers or {}), evaluation
        newest = checkpointer.latest()
        self._saved = -1 if newest is None else newest
        self._on_saved = on_saved

    def due(self, step: int) -> bool:
        return due(step, every=self._checkpointer.config.save_interval_steps, num_steps=self._num_steps)

    def may_save(self, step: int) -> bool:
        """Returns whether a checkpoint may be saved at this step, apart from signals."""
        return self.due(step) or (self._evaluation is not None and self._evaluation.due(step))

    def __call__(self, step: int, state: TrainState, source: BatchSource) -> None:
        found = self._evaluation
        improved = found is not None and found.step == found.best_step == step
        if self.due(step) or (improved and self._checkpointer.config.keep_best):
            self.save(step, state, source)

    def save(self, step: int, state: TrainState, source: BatchSource) -> None:
        """Saves immediately, unless this step is saved already."""
        if step == self._saved:
            return
        loss = self._evaluation.loss_at(step) if self._evaluation is not None else None
        start = time.perf_counter()
        with self._ledger.phase("checkpoint"):
            self._checkpointer.save(
                step,
                state,
                source=source.get_state(),
                config=self._config,
                tokenizer=self._tokenizer,
                extra={name: part.get_state(step) for name, part in self._remembers.items()},
                metrics=None if loss is None else {"loss": loss},
            )
        self._saved = step
        if self._on_saved is not None:
            self._on_saved(step, time.perf_counter() - start)


def restore_hook_states(saved: Mapping[str, Any], remembers: Mapping[str, Stateful]) -> None:
    """Restores hooks from `extra` of a checkpoint; hooks missing there keep their initial state."""
    for name, part in remembers.items():
        if name in saved:
            part.set_state(saved[name])


class SampleEvery:
    """Calls `sample(step, params)` once at each due step."""

    def __init__(
        self,
        every: int,
        *,
        num_steps: int,
        params_of: Callable[[TrainState], Params],
        sample: Callable[[int, Params], None],
        ledger: GoodputRecorder,
    ):
        self._every, self._num_steps = every, num_steps
        self._params_of, self._sample, self._ledger = params_of, sample, ledger
        self._done = -1

    def __call__(self, step: int, state: TrainState, source: BatchSource) -> None:
        if step == self._done or not due(step, every=self._every, num_steps=self._num_steps):
            return
        with self._ledger.phase("sample"):
            self._sample(step, self._params_of(state))
        self._done = step

    def get_state(self, step: int) -> dict[str, Any]:
        return {"done": self._done}

    def set_state(self, saved: Mapping[str, Any]) -> None:
        self._done = int(saved["done"])


class EarlyStopping:
    """Stops after `patience` consecutive evaluations that do not improve the loss by `min_delta`; 0 disables it."""

    def __init__(self, evaluation: EvaluateEvery, *, patience: int, min_delta: float = 0.0, save: Save):
        self._evaluation, self._patience, self._min_delta, self._save = evaluation, patience, min_delta, save
        self._best, self._bad, self._seen = math.inf, 0, evaluation.step

    def _update(self) -> None:
        """Accounts for the latest evaluation, once."""
        if self._evaluation.step == self._seen:
            return
        self._seen = self._evaluation.step
        if self._evaluation.loss < self._best - self._min_delta:
            self._best, self._bad = self._evaluation.loss, 0
        else:  # NaN is no improvement either
            self._bad += 1

    def __call__(self, step: int, state: TrainState, source: BatchSource) -> None:
        self._update()
        if 0 < self._patience <= self._bad:
            self._save(step, state, source)
            raise StopTraining(STOPPED_EARLY)

    def get_state(self, step: int) -> dict[str, Any]:
        self._update()  # the checkpoint must include the evaluation of its own step, though this hook runs later
        return {
            "best": self._best if math.isfinite(self._best) else None,
            "bad": self._bad,
            "seen": self._seen,
        }

    def set_state(self, saved: Mapping[str, Any]) -> None:
        self._best = math.inf if saved["best"] is None else float(saved["best"])
        self._bad, self._seen = int(saved["bad"]), int(saved["seen"])


class StopOnSignal(AbstractContextManager["StopOnSignal"]):
    """Saves a checkpoint and stops on SIGTERM or Ctrl-C; a second signal ends the process immediately.

    With several processes, JAX's preemption service handles SIGTERM and makes all of them agree on the step; Ctrl-C is
    forwarded to it as SIGTERM. Restores the previous handlers on exit.
    """

    def __init__(self, save: Save):
        self._save = save
        self._reason: str | None = None
        self._multi_process = jax.process_count() > 1
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # signal handlers require it
            # Overriding the service's SIGTERM handler would disable the agreement between processes.
            for number in (signal.SIGINT,) if self._multi_process else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore_handlers()
        if self._multi_process:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._reason = INTERRUPTED if number == signal.SIGINT else PREEMPTED

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __call__(self, step: int, state: TrainState, source: BatchSource) -> None:
        if self._multi_process:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self._reason = PREEMPTED
        if self._reason is not None:
            self._save(step, state, source)
            raise StopTraining(self._reason)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore_handlers()


def profile(first: int, last: int, folder: Path) -> Hook:
    """Returns a hook that traces updates `first` to `last` (counted from 1) into `folder`, for XProf or Perfetto."""
    if not 1 <= first <= last:
        raise ValueError(f"task.profile_steps=[{first}, {last}]: give [first, last] with 1 <= first <= last")
    running = False

    def hook(step: int, state: TrainState, source: BatchSource) -> None:
        nonlocal running
        if running and step >= last:
            jax.block_until_ready(state)  # the last step may still be running
            jax.profiler.stop_trace()
            running = False
        elif not running and first - 1 <= step < last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(folder))
            running = True

    return hook
