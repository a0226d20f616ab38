"""The learning rate as a function of the step: warm-up, then one of five shapes.

Update s (the first is 0) uses `schedule(s)`. The warm-up rises as (s + 1) / (warmup_steps + 1), so that no
update is wasted on a rate of zero, and update `warmup_steps` has the peak. All shapes end at `num_steps`, the
warm-up included. A warm-up and a decay that are longer than the run are shortened to fit: see `ScheduleConfig.fitted`.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]


@dataclass
class ScheduleConfig:
    """Base of all schedules: `fraction` is what a subclass gives."""

    kind: str = ""
    # Optimizer steps of linear warm-up; 0: none
    warmup_steps: int = field(default=100, metadata={"min": 0})

    def build(self, peak: float, num_steps: int) -> Schedule:
        """`schedule(step) -> learning rate`, of the fitted schedule."""
        fitted = self.fitted(num_steps)

        def schedule(step: jax.Array | int) -> jax.Array:
            step = jnp.asarray(step, jnp.float32)
            warmup = jnp.minimum(1.0, (step + 1) / (fitted.warmup_steps + 1))
            return peak * jnp.where(step < fitted.warmup_steps, warmup, fitted.fraction(step, num_steps))

        return schedule

    def fitted(self, num_steps: int) -> Self:
        """This schedule for a run of `num_steps`, however short.

        A warm-up and a decay that together are longer than the run are scaled down by one factor, so that they keep
        their proportion and fill it. Only the config counts, so that a resumed run has the same rates.
        """
        decay = self.num_decay(num_steps)
        total = self.warmup_steps + decay
        if total <= num_steps:
            return self
        return self.with_parts(self.warmup_steps * num_steps // total, decay * num_steps // total)

    def shortened(self, num_steps: int) -> str | None:
        """What `fitted` shortens, in words; None where everything fits."""
        fitted = self.fitted(num_steps)
        before, now = ((s.warmup_steps, s.num_decay(num_steps)) for s in (self, fitted))
        parts = [
            f"{name} {a} to {b} steps" for name, a, b in zip(("warm-up", "decay"), before, now, strict=True) if a != b
        ]
        return f"schedule: {', '.join(parts)}, to fit num_steps={num_steps}" if parts else None

    def num_decay(self, num_steps: int) -> int:
        """Steps of a decay that has a length of its own."""
        return 0

    def with_parts(self, warmup_steps: int, decay_steps: int) -> Self:
        return replace(self, warmup_steps=warmup_steps)

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        """Share of the peak at `step >= warmup_steps`, f32."""
        raise TypeError(f"schedule.kind={self.kind}: choose one with schedule=NAME")

    def progress(self, step: jax.Array, num_steps: int) -> jax.Array:
        """0 at the end of the warm-up, 1 at `num_steps` and after."""
        return jnp.clip((step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1), 0.0, 1.0)


@dataclass
class ConstantConfig(ScheduleConfig):
    """The peak, all along: for schedule-free optimizers and for trying things."""

    kind: str = "constant"

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        return jnp.ones_like(step)


@dataclass
class CosineConfig(ScheduleConfig):
    """Half a cosine wave down to `final_fraction` (Loshchilov and Hutter 2017, without restarts)."""

    kind: str = "cosine"
    min_lr_ratio: float = field(default=0.1, metadata={"min": 0, "max": 1})  # of the peak, at num_steps

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        wave = 0.5 * (1 + jnp.cos(jnp.pi * self.progress(step, num_steps)))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * wave


@dataclass
class LinearConfig(ScheduleConfig):
    """A straight line down to `final_fraction`."""

    kind: str = "linear"
    min_lr_ratio: float = field(default=0.0, metadata={"min": 0, "max": 1})  # of the peak, at num_steps

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        return 1 - (1 - self.min_lr_ratio) * self.progress(step, num_steps)


class Decay(enum.Enum):
    linear = "linear"
    cosine = "cosine"
    one_minus_sqrt = "one_minus_sqrt"  # 1 - sqrt(progress) (Haegele et al. 2024)


@dataclass
class WsdConfig(ScheduleConfig):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): a run can be prolonged from before its decay."""

    kind: str = "wsd"
    decay_fraction: float = field(default=0.2, metadata={"min": 0, "max": 1})  # of num_steps, at the end
    # Optimizer steps of the decay; null: decay_fraction
    decay_steps: int | None = field(default=None, metadata={"min": 0})
    decay: Decay = Decay.linear  # shape of the decay
    min_lr_ratio: float = field(default=0.0, metadata={"min": 0, "max": 1})  # of the peak, at num_steps

    def num_decay(self, num_steps: int) -> int:
        return round(self.decay_fraction * num_steps) if self.decay_steps is None else self.decay_steps

    def with_parts(self, warmup_steps: int, decay_steps: int) -> Self:
        return replace(self, warmup_steps=warmup_steps, decay_steps=decay_steps)

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        num_decay = self.num_decay(num_steps)
        progress = jnp.clip((step - (num_steps - num_decay)) / max(num_decay, 1), 0.0, 1.0)
        shape = {
            Decay.linear: 1 - progress,
            Decay.cosine: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            Decay.one_minus_sqrt: 1 - jnp.sqrt(progress),
        }[self.decay]
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape


@dataclass
class InverseSqrtConfig(ScheduleConfig):
    """Falls as 1 / sqrt(step) after the warm-up (Vaswani et al. 2017); it knows no end, so a run can be
    prolonged.
    """

    kind: str = "inverse_sqrt"

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        first = max(self.warmup_steps, 1)
        return jnp.sqrt(first / jnp.maximum(step, first))
