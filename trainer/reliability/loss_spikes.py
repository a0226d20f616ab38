"""Loss spike detection: drops updates with a non-finite or outlying loss or gradient norm, or rolls back.

The train step drops an update above its limits, identically on all devices. Limits follow from the values of earlier
updates, which every process has. Like all metrics, these are read one step late: the limits of update n depend on
values up to n - 2, also after a resume.

Skipping outliers: OLMo 2 (2501.00656), section 3. Rolling back and skipping data: PaLM (2204.02311), section 5.1.
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

WATCHED = ("loss", "grad_norm")  # monitored metrics, in the order of limits
NO_LIMITS = np.full(len(WATCHED), np.inf, np.float32)  # non-finite updates are still dropped


class SpikePolicy(enum.Enum):
    """Reaction to a spike. Updates with a non-finite loss or gradient norm are always dropped."""

    warn = "warn"  # log a warning
    skip = "skip"  # drop the update
    rollback = "rollback"  # restore the previous checkpoint and skip the data up to the spike


@dataclass
class LossSpikeConfig:
    """Detection of spikes in loss and gradient norm, and the reaction to them."""

    policy: SpikePolicy = SpikePolicy.warn  # warn, skip the update, or roll back to the previous checkpoint
    # spike threshold: standard deviations above the mean of the last `window` values
    num_std: float = field(default=6.0, metadata={"above": 0, "hint": "loss_spikes.policy=warn drops none"})
    # updates in the running statistics; detection starts at half of them
    window: int = field(default=128, metadata={"min": 2})
    # maximum consecutive dropped updates, or rollbacks, before the run stops
    max_rollbacks: int = field(default=10, metadata={"min": 1})


class Rollback(Exception):
    """Requests a rollback to the checkpoint of step `to`. `step`: the dropped update; `values`: its loss and norm."""

    def __init__(self, step: int, to: int, values: dict[str, float]) -> None:
        super().__init__(f"spike at step {step}")
        self.step, self.to, self.values = step, to, values


class TooManyRollbacks(Exception):
    """Stops the run after too many consecutive dropped updates or rollbacks."""


class LossSpikeDetector:
    """Derives limits from recent applied updates and applies the policy when one is exceeded."""

    def __init__(self, config: LossSpikeConfig, *, say: Callable[[str], None], before: Callable[[int], int | None]):
        """`say`: logs a line. `before(step)`: step of the newest checkpoint before this update; None if none."""
        self.config, self._say, self._before = config, say, before
        self._applied: deque[tuple[int, list[float]]] = deque(maxlen=config.window + 2)
        self._consecutive = 0  # dropped updates in a row
        self._seen = 0  # last update whose values were read
        self._in_flight: tuple[int, Metrics] | None = None  # the update whose values were not read yet

    def limits(self, step: int) -> np.ndarray:
        """Returns the limits of loss and gradient norm [2] f32 for update number `step`."""
        window = self.config.window
        known = [values for at, values in self._applied if at <= step - 2][-window:]
        if len(known) < max(2, window // 2):
            return NO_LIMITS
        values = np.asarray(known, np.float64)
        return (values.mean(0) + self.config.num_std * values.std(0)).astype(np.float32)

    def guard(self, train_step: Callable[..., tuple[TrainState, Metrics]], first_step: int) -> TrainStep:
        """Wraps `train_step` with the limits of each update. `first_step`: number of updates already done."""
        step = first_step
        drops = self.config.policy is not SpikePolicy.warn

        def guarded(state: TrainState, frozen: Mapping[str, Any], batch: Batch) -> tuple[TrainState, Metrics]:
            nonlocal step
            step += 1
            state, metrics = train_step(state, frozen, batch, self.limits(step) if drops else NO_LIMITS)
            self._in_flight = step, metrics
            return state, metrics

        return guarded

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the values of an update and applies the policy.

        Raises: Rollback if that is the policy and an earlier checkpoint exists; TooManyRollbacks after
        `max_rollbacks` consecutive dropped updates.
        """
        limits, values = self.limits(step), [metrics[name] for name in WATCHED]
        dropped, self._seen = metrics["dropped"] > 0, step
        if not dropped:
            self._applied.append((step, values))
            self._consecutive = 0
        if not dropped and all(value <= limit for value, limit in zip(values, limits, strict=True)):
            return
        summary = ", ".join(_describe(*each) for each in zip(WATCHED, values, limits, strict=True))
        if not dropped:
            self._say(
                f"step {step}: spike: {summary}; loss_spikes.policy=skip would drop this update, rollback would "
                "restore the previous checkpoint"
            )
            return
        self._consecutive += 1
        self._say(f"step {step}: update dropped: {summary}")
        to = self._before(step) if self.config.policy is SpikePolicy.rollback else None
        if to is not None:
            raise Rollback(step, to, dict(zip(WATCHED, values, strict=True)))
        if self._consecutive >= self.config.max_rollbacks:
            raise TooManyRollbacks(
                f"loss_spikes.max_rollbacks={self.config.max_rollbacks}: stopping after {self._consecutive} "
                f"consecutive dropped updates, the last at step {step} ({summary}); restart from an earlier checkpoint "
                "with a smaller optimizer.learning_rate, a smaller optimizer.max_grad_norm or other data"
            )

    def get_state(self, step: int) -> dict[str, Any]:
        applied, consecutive = [*self._applied], self._consecutive
        if self._in_flight is not None and self._seen < step == self._in_flight[0]:
            names = (*WATCHED, "dropped")
            *values, dropped = (float(v) for v in jax.device_get([self._in_flight[1][name] for name in names]))
            applied, consecutive = ([*applied, (step, values)], 0) if not dropped else (applied, consecutive + 1)
        return {"taken": applied, "in_a_row": consecutive}

    def set_state(self, saved: Mapping[str, Any]) -> None:
        self._applied.clear()
        self._applied.extend((int(step), [float(value) for value in values]) for step, values in saved["taken"])
        self._consecutive = int(saved["in_a_row"])


def _describe(name: str, value: float, limit: float) -> str:
    if not math.isfinite(value):
        return f"{name} {value}"
    return f"{name} {value:.4g}" + (f" above {limit:.4g}" if value > limit else "")
