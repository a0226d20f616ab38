"""Learning rate schedules: linear warmup, then one of five shapes.

Update s (starting at 0) uses `schedule(s)`. The warmup factor is (s + 1) / (warmup_steps + 1), so the first update does
not have a zero learning rate, and update `warmup_steps` has the peak. All shapes end at `num_steps`, which includes the
warmup.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]


@dataclass
class ScheduleConfig:
    """Base of all schedules. Subclasses implement `fraction`."""

    kind: str = ""
    warmup_steps: int = 100  # optimizer steps of linear warmup; 0: none

    def build(self, peak: float, num_steps: int) -> Schedule:
        """Returns `schedule(step) -> learning rate`. Raises: ValueError if the parts do not fit into `num_steps`."""
        self.check(num_steps)

        def schedule(step: jax.Array | int) -> jax.Array:
            step = jnp.asarray(step, jnp.float32)
            warmup = jnp.minimum(1.0, (step + 1) / (self.warmup_steps + 1))
            return peak * jnp.where(step < self.warmup_steps, warmup, self.fraction(step, num_steps))

        return schedule

    def check(self, num_steps: int) -> None:
        if not 0 <= self.warmup_steps <= num_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps}: must be from 0 to task.num_steps={num_steps}, "
                f"it is part of the run; nearest valid: {min(max(self.warmup_steps, 0), num_steps)}"
            )

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        """Returns the fraction of the peak at `step >= warmup_steps`, f32."""
        raise TypeError(f"schedule.kind={self.kind}: choose one with schedule=NAME")

    def progress(self, step: jax.Array, num_steps: int) -> jax.Array:
        """Returns the linear progress: 0 at the end of the warmup, 1 from `num_steps` on."""
        return jnp.clip((step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1), 0.0, 1.0)


def _check_fraction(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        nearest = min(max(value, 0), 1)
        raise ValueError(f"schedule.{key}={value}: is a share, so from 0 to 1; nearest valid: {nearest}")


@dataclass
class ConstantConfig(ScheduleConfig):
    """Constant at the peak after warmup, for schedule-free optimizers and experiments."""

    kind: str = "constant"

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        return jnp.ones_like(step)


@dataclass
class CosineConfig(ScheduleConfig):
    """Cosine decay to `min_lr_ratio` of the peak (Loshchilov and Hutter 2017, without restarts)."""

    kind: str = "cosine"
    min_lr_ratio: float = 0.1  # final learning rate at num_steps, as a fraction of the peak

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        _check_fraction("final_fraction", self.min_lr_ratio)

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        wave = 0.5 * (1 + jnp.cos(jnp.pi * self.progress(step, num_steps)))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * wave


@dataclass
class LinearConfig(ScheduleConfig):
    """Linear decay to `min_lr_ratio` of the peak."""

    kind: str = "linear"
    min_lr_ratio: float = 0.0  # final learning rate at num_steps, as a fraction of the peak

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        _check_fraction("final_fraction", self.min_lr_ratio)

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        return 1 - (1 - self.min_lr_ratio) * self.progress(step, num_steps)


class Decay(enum.Enum):
    """Shape of the decay phase of `WsdConfig`."""

    linear = "linear"
    cosine = "cosine"
    one_minus_sqrt = "one_minus_sqrt"  # 1 - sqrt(progress) (Haegele et al. 2024)


@dataclass
class WsdConfig(ScheduleConfig):
    """Warmup-stable-decay (Hu et al. 2024, MiniCPM); a run can be extended from a checkpoint before its decay."""

    kind: str = "wsd"
    decay_fraction: float = 0.2  # length of the final decay, as a fraction of num_steps
    decay_steps: int | None = None  # length of the final decay in optimizer steps; overrides decay_fraction
    decay: Decay = Decay.linear  # shape of the decay
    min_lr_ratio: float = 0.0  # final learning rate at num_steps, as a fraction of the peak

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        _check_fraction("final_fraction", self.min_lr_ratio)
        _check_fraction("decay_fraction", self.decay_fraction)
        most = num_steps - self.warmup_steps
        if not 0 <= self._num_decay(num_steps) <= most:
            key = "decay_fraction" if self.decay_steps is None else "decay_steps"
            nearest = math.floor(1e4 * most / num_steps) / 1e4 if self.decay_steps is None else most
            raise ValueError(
                f"schedule.{key}={getattr(self, key)}: a decay of {self._num_decay(num_steps)} updates does "
                f"not fit after schedule.warmup_steps={self.warmup_steps} in task.num_steps={num_steps}; "
                f"nearest valid: {nearest}"
            )

    def _num_decay(self, num_steps: int) -> int:
        return round(self.decay_fraction * num_steps) if self.decay_steps is None else self.decay_steps

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        num_decay = self._num_decay(num_steps)
        progress = jnp.clip((step - (num_steps - num_decay)) / max(num_decay, 1), 0.0, 1.0)
        shape = {
            Decay.linear: 1 - progress,
            Decay.cosine: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            Decay.one_minus_sqrt: 1 - jnp.sqrt(progress),
        }[self.decay]
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape


@dataclass
class InverseSqrtConfig(ScheduleConfig):
    """Decay as 1 / sqrt(step) after warmup (Vaswani et al. 2017), independent of num_steps: runs can be extended."""

    kind: str = "inverse_sqrt"

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        first = max(self.warmup_steps, 1)
        return jnp.sqrt(first / jnp.maximum(step, first))
