"""Learning rate schedules: linear warmup, then one of five shapes.

Three keys make the curve: `optimizer.learning_rate` is its peak, the group `schedule` its shape, and `num_steps` its
length. `optimizer.lr_multipliers` and muP (`model.mup_base_width`) scale it by parameter group.

Update s (starting at 0) uses `schedule(s)`. The warmup factor is (s + 1) / (warmup_steps + 1), so the first update does
not have a zero learning rate, and update `warmup_steps` has the peak. All shapes end at `num_steps`, which includes the
warmup. A warmup and a decay that are longer than the run are shortened to fit: see `ScheduleConfig.fitted`.
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
    """Base of all schedules. Subclasses implement `fraction`."""

    kind: str = ""
    # optimizer steps of linear warmup; 0: none
    warmup_steps: int = field(default=100, metadata={"min": 0})

    def build(self, peak: float, num_steps: int) -> Schedule:
        """Returns `schedule(step) -> learning rate`, fitted to `num_steps`."""
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
        """Returns a log line of what `fitted` shortens; None if everything fits."""
        fitted = self.fitted(num_steps)
        before, now = ((s.warmup_steps, s.num_decay(num_steps)) for s in (self, fitted))
        parts = [
            f"{name} {a} to {b} steps" for name, a, b in zip(("warm-up", "decay"), before, now, strict=True) if a != b
        ]
        return f"schedule: {', '.join(parts)}, to fit num_steps={num_steps}" if parts else None

    def num_decay(self, num_steps: int) -> int:
        """Returns the steps of a decay with a fixed length."""
        return 0

    def with_parts(self, warmup_steps: int, decay_steps: int) -> Self:
        return replace(self, warmup_steps=warmup_steps)

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        """Returns the fraction of the peak at `step >= warmup_steps`, f32."""
        raise TypeError(f"schedule.kind={self.kind}: choose one with schedule=NAME")

    def progress(self, step: jax.Array, num_steps: int) -> jax.Array:
        """Returns the linear progress: 0 at the end of the warmup, 1 from `num_steps` on."""
        return jnp.clip((step - self.warmup_steps) / max(num_steps - self.warmup_steps, 1), 0.0, 1.0)


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
    # final learning rate at num_steps, as a fraction of the peak
    min_lr_ratio: float = field(default=0.1, metadata={"min": 0, "max": 1})

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        wave = 0.5 * (1 + jnp.cos(jnp.pi * self.progress(step, num_steps)))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * wave


@dataclass
class LinearConfig(ScheduleConfig):
    """Linear decay to `min_lr_ratio` of the peak."""

    kind: str = "linear"
    # final learning rate at num_steps, as a fraction of the peak
    min_lr_ratio: float = field(default=0.0, metadata={"min": 0, "max": 1})

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
    # length of the final decay, as a fraction of num_steps
    decay_fraction: float = field(default=0.2, metadata={"min": 0, "max": 1})
    # length of the final decay in optimizer steps; overrides decay_fraction
    decay_steps: int | None = field(default=None, metadata={"min": 0})
    decay: Decay = Decay.linear  # shape of the decay
    # final learning rate at num_steps, as a fraction of the peak
    min_lr_ratio: float = field(default=0.0, metadata={"min": 0, "max": 1})

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
    """Decay as 1 / sqrt(step) after warmup (Vaswani et al. 2017), independent of num_steps: runs can be extended."""

    kind: str = "inverse_sqrt"

    def fraction(self, step: jax.Array, num_steps: int) -> jax.Array:
        first = max(self.warmup_steps, 1)
        return jnp.sqrt(first / jnp.maximum(step, first))
