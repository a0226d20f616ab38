"""Updates that would spoil a run: where loss or gradient are not finite, or stand far above those before.

The step itself drops an update above the limits that it is given, on all devices alike. Limits follow from the values
of the updates before, which every process has, and which are read one step late as all metrics are: those for update n
know the values up to n - 2, in a run that goes on from a checkpoint as in the unbroken one.

Dropping what stands out: OLMo 2 (2501.00656), section 3. Going back and leaving out the data: PaLM (2204.02311),
section 5.1.
"""

import enum
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from trainer.objective import Batch
from trainer.state import TrainState
from trainer.step import Metrics, TrainStep

WATCHED = ("loss", "grad_norm")
NO_LIMITS = np.full(len(WATCHED), np.inf, np.float32)  # but what is not finite is dropped


class SpikePolicy(enum.Enum):
    """What is done about a spike. An update with a loss or a gradient that is not finite is dropped in any case."""

    warn = "warn"  # it is told
    skip = "skip"  # the update is dropped
    rollback = "rollback"  # the run goes back to the checkpoint before, and leaves out the data up to the spike


@dataclass
class LossSpikeConfig:
    """What counts as a spike of loss or gradient norm, and what is done then."""

    policy: SpikePolicy = SpikePolicy.warn  # Action on a loss spike
    # Standard deviations above the mean of the last `window` values
    num_std: float = field(default=6.0, metadata={"above": 0, "hint": "loss_spikes.policy=warn drops none"})
    # Number of optimizer steps in the moving window; detection starts once half of it is filled
    window: int = field(default=128, metadata={"min": 2})
    # Consecutive skipped steps, or rollbacks, after which the run stops
    max_rollbacks: int = field(default=10, metadata={"min": 1})


class Rollback(Exception):
    """The run is to go back to the checkpoint of step `to`; `step` is the update that was dropped, `values` say why."""

    def __init__(self, step: int, to: int, values: dict[str, float]) -> None:
        super().__init__(f"spike at step {step}")
        self.step, self.to, self.values = step, to, values


class TooManyRollbacks(Exception):
    """The run ends, for its updates are dropped again and again."""


class SpikeWatch:
    """Keeps the values of updates that were taken, makes limits of them, and acts when one is passed."""

    def __init__(self, config: LossSpikeConfig, *, say: Callable[[str], None], before: Callable[[int], int | None]):
        """`before(step)`: the newest checkpoint before this update, where there is one."""
        self.config, self._say, self._before = config, say, before
        self._taken: deque[tuple[int, list[float]]] = deque(maxlen=config.window + 2)
        self._in_a_row = 0
        self._seen = 0  # the last update whose values were read
        self._flying: tuple[int, Metrics] | None = None  # the one whose were not

    def limits(self, step: int) -> np.ndarray:
        """Of loss and gradient norm [2] f32, for the update that makes step `step`."""
        window = self.config.window
        known = [values for at, values in self._taken if at <= step - 2][-window:]
        if len(known) < max(2, window // 2):
            return NO_LIMITS
        values = np.asarray(known, np.float64)
        return (values.mean(0) + self.config.num_std * values.std(0)).astype(np.float32)

    def guard(self, train_step: Callable[..., tuple[TrainState, Metrics]], first_step: int) -> TrainStep:
        """`train_step` under the limits of each update; `first_step`: updates done before."""
        step = first_step
        drops = self.config.policy is not SpikePolicy.warn

        def guarded(state: TrainState, frozen: Mapping[str, Any], batch: Batch) -> tuple[TrainState, Metrics]:
            nonlocal step
            step += 1
            state, metrics = train_step(state, frozen, batch, self.limits(step) if drops else NO_LIMITS)
            self._flying = step, metrics
            return state, metrics

        return guarded

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the values of an update into account.

        Raises: Rollback where that is the policy and there is a checkpoint before it; Spoiled where no update is taken
        any more.
        """
        limits, values = self.limits(step), [metrics[name] for name in WATCHED]
        dropped, self._seen = metrics["dropped"] > 0, step
        if not dropped:
            self._taken.append((step, values))
            self._in_a_row = 0
        if not dropped and all(value <= limit for value, limit in zip(values, limits, strict=True)):
            return
        what = ", ".join(_told(*each) for each in zip(WATCHED, values, limits, strict=True))
        if not dropped:
            self._say(f"step {step}: spike: {what}; loss_spikes.policy=skip would drop it, rollback go back before it")
            return
        self._in_a_row += 1
        self._say(f"step {step}: update dropped: {what}")
        to = self._before(step) if self.config.policy is SpikePolicy.rollback else None
        if to is not None:
            raise Rollback(step, to, dict(zip(WATCHED, values, strict=True)))
        if self._in_a_row >= self.config.max_rollbacks:
            raise TooManyRollbacks(
                f"loss_spikes.max_rollbacks={self.config.max_rollbacks}: so many updates in a row were dropped, the last at step {step} "
                f"({what}); begin again from an earlier checkpoint with a smaller optimizer.learning_rate, a smaller "
                "optimizer.max_grad_norm or other data"
            )

    def get_state(self, step: int) -> dict[str, Any]:
        taken, in_a_row = [*self._taken], self._in_a_row
        if self._flying is not None and self._seen < step == self._flying[0]:
            names = (*WATCHED, "dropped")
            *values, dropped = (float(v) for v in jax.device_get([self._flying[1][name] for name in names]))
            taken, in_a_row = ([*taken, (step, values)], 0) if not dropped else (taken, in_a_row + 1)
        return {"taken": taken, "in_a_row": in_a_row}

    def set_state(self, saved: Mapping[str, Any]) -> None:
        self._taken.clear()
        self._taken.extend((int(step), [float(value) for value in values]) for step, values in saved["taken"])
        self._in_a_row = int(saved["in_a_row"])


def _told(name: str, value: float, limit: float) -> str:
    if not math.isfinite(value):
        return f"{name} {value}"
    return f"{name} {value:.4g}" + (f" above {limit:.4g}" if value > limit else "")
