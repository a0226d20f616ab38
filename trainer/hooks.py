"""What happens between steps: evaluate, save, sample, profile, stop.

A hook is called with `(step, state, source)` after `step` updates, before the next batch is taken. The order
in which a run lists its hooks is its meaning: evaluate, sample, save, then the ones that stop, which save
first themselves, so that whatever ends a run leaves a checkpoint of its last step.

`get_state(step)` and `set_state(saved)` are what a hook remembers across a restart; `save_every` puts it into
the checkpoint. A hook that has done its work at a step does not do it again when a run resumes at that step.
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

PREEMPTED = "preempted"  # by the machine's owner, or a second process of the run: requeue it
INTERRUPTED = "interrupted"  # by Ctrl-C in a run of one process
STOPPED_EARLY = "stopped early"

Save = Callable[[int, TrainState, BatchSource], None]


class Stateful(Protocol):
    """What a hook, or anything else beside the state, remembers across a restart. JSON-able."""

    def get_state(self, step: int) -> dict[str, Any]: ...

    def set_state(self, saved: Mapping[str, Any]) -> None: ...


def due(step: int, *, every: int, num_steps: int) -> bool:
    """At each multiple of `every` but 0, and at the end. `every=0`: at the end only."""
    return step == num_steps or (every > 0 and step > 0 and step % every == 0)


class EvaluateEvery:
    """Evaluates at due steps and tells `on_metrics`; `latest` and `best` are what others may ask for."""

    def __init__(
        self,
        every: int,
        *,
        num_steps: int,
        evaluate: Callable[[TrainState], dict[str, float]],
        on_metrics: Callable[[int, dict[str, float]], None],
        ledger: GoodputRecorder,
    ):
        """`evaluate(state)` returns metrics with `eval/loss` among them."""
        self._every, self._num_steps = every, num_steps
        self._evaluate, self._on_metrics, self._ledger = evaluate, on_metrics, ledger
        self.step = -1  # of the latest evaluation
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
        """The loss of `step`, where it was evaluated."""
        return self.loss if step == self.step and math.isfinite(self.loss) else None

    def get_state(self, step: int) -> dict[str, Any]:
        # JSON knows no infinity and no nan.
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
    """Saves at due steps, at the end, and when the evaluation just made is the best yet."""

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
        """`config`: what is written beside the arrays. `remembers`: whose state goes with it, by name.

        `on_saved(step, seconds)` is told how long training stood still.
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
        """Whether this step is saved, if it is not by a signal."""
        return self.due(step) or (self._evaluation is not None and self._evaluation.due(step))

    def __call__(self, step: int, state: TrainState, source: BatchSource) -> None:
        found = self._evaluation
        improved = found is not None and found.step == found.best_step == step
        if self.due(step) or (improved and self._checkpointer.config.keep_best):
            self.save(step, state, source)

    def save(self, step: int, state: TrainState, source: BatchSource) -> None:
        """Saves now, unless this step is saved already."""
        if step == self._saved:
            return
        loss = self._evaluation.loss_at(step) if self._evaluation is not None else None
        begin = time.perf_counter()
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
            self._on_saved(step, time.perf_counter() - begin)


def restore_hook_states(saved: Mapping[str, Any], remembers: Mapping[str, Stateful]) -> None:
    """Gives `extra` of a checkpoint back to those who wrote it; one that is new keeps its fresh state."""
    for name, part in remembers.items():
        if name in saved:
            part.set_state(saved[name])


class SampleEvery:
    """Calls `sample(step, params)` at due steps, once for each step."""

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
    """Ends the run after `patience` evaluations in a row without a loss better by `min_delta`; 0: never."""

    def __init__(self, evaluation: EvaluateEvery, *, patience: int, min_delta: float = 0.0, save: Save):
        self._evaluation, self._patience, self._min_delta, self._save = evaluation, patience, min_delta, save
        self._best, self._bad, self._seen = math.inf, 0, evaluation.step

    def look(self) -> None:
        """Takes the latest evaluation into account, once."""
        if self._evaluation.step == self._seen:
            return
        self._seen = self._evaluation.step
        if self._evaluation.loss < self._best - self._min_delta:
            self._best, self._bad = self._evaluation.loss, 0
        else:  # nan is not better either
            self._bad += 1

    def __call__(self, step: int, state: TrainState, source: BatchSource) -> None:
        self.look()
        if 0 < self._patience <= self._bad:
            self._save(step, state, source)
            raise StopTraining(STOPPED_EARLY)

    def get_state(self, step: int) -> dict[str, Any]:
        self.look()  # a checkpoint knows the evaluation of its own step, though this hook comes later
        return {
            "best": self._best if math.isfinite(self._best) else None,
            "bad": self._bad,
            "seen": self._seen,
        }

    def set_state(self, saved: Mapping[str, Any]) -> None:
        self._best = math.inf if saved["best"] is None else float(saved["best"])
        self._bad, self._seen = int(saved["bad"]), int(saved["seen"])


class StopOnSignal(AbstractContextManager["StopOnSignal"]):
    """Turns SIGTERM and Ctrl-C into a checkpoint and a clean end; a second one ends the process at once.

    Among several processes, JAX's own service owns SIGTERM and makes all of them agree on the step; Ctrl-C is
    passed on to it. The handlers of before are put back on leaving the context.
    """

    def __init__(self, save: Save):
        self._save = save
        self._reason: str | None = None
        self._several = jax.process_count() > 1
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            # A handler of ours over the service's SIGTERM would switch the agreement off.
            for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._put_back()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._reason = INTERRUPTED if number == signal.SIGINT else PREEMPTED

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __call__(self, step: int, state: TrainState, source: BatchSource) -> None:
        if self._several:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self._reason = PREEMPTED
        if self._reason is not None:
            self._save(step, state, source)
            raise StopTraining(self._reason)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()


def profile(first: int, last: int, folder: Path) -> Hook:
    """A trace of the updates `first` to `last` (counted from 1), for xprof or Perfetto, under `folder`."""
    if not 1 <= first <= last:
        raise ValueError(f"task.profile_steps=[{first}, {last}]: give [first, last] with 1 <= first <= last")
    running = False

    def hook(step: int, state: TrainState, source: BatchSource) -> None:
        nonlocal running
        if running and step >= last:
            jax.block_until_ready(state)  # the last step is still under way
            jax.profiler.stop_trace()
            running = False
        elif not running and first - 1 <= step < last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(folder))
            running = True

    return hook
