"""Schedule-free AdamW."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.optimizers.optimizer import OptimizerConfig, Params, Tree
from trainer.schedule import Schedule


@dataclass
class ScheduleFreeConfig(OptimizerConfig):
    """Schedule-free AdamW (Defazio et al. 2024): averaging replaces learning rate decay. Use schedule=constant."""

    kind: str = "schedule_free"
    learning_rate: float = 2.5e-3  # peak learning rate, scaled by the schedule
    # interpolation weight of the average in the point of gradient evaluation
    b1: float = field(default=0.9, metadata={"above": 0, "below": 1})
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment

    def check(self) -> None:
        super().check()
        if self.ema_decay is not None:
            raise ValueError(
                f"optimizer.ema_decay={self.ema_decay}: optimizer=schedule_free already maintains an average; "
                "set optimizer.ema_decay=null"
            )

    def chain_updates(
        self, schedule: Schedule, param_axes: Tree, factors: Tree | None = None
    ) -> optax.GradientTransformationExtraArgs:
        return schedule_free(super().chain_updates(schedule, param_axes, factors), schedule, b1=self.b1)

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        return optax.scale_by_rms(decay=self.b2, eps=self.eps, eps_in_sqrt=False, bias_correction=True)


class ScheduleFreeState(NamedTuple):
    inner: Any
    z: Params  # iterate of the base optimizer
    weight_sum: jax.Array  # [] f32
    max_rate: jax.Array  # [] f32
    b1: jax.Array  # [] f32: part of the state, because the average is computed from it


def schedule_free(
    descent: optax.GradientTransformation, schedule: Schedule, *, b1: float
) -> optax.GradientTransformationExtraArgs:
    """Evaluates gradients at y = (1 - b1) z + b1 x; x is the average of z, weighted by squared learning rates.

    The parameters are y, and x = (y - (1 - b1) z) / b1, so the state needs only one extra copy. `optax.contrib` has the
    same method, but with its own step counter.
    """
    inner_update = optax.with_extra_args_support(descent).update

    def init(params: Params) -> ScheduleFreeState:
        zero = jnp.zeros((), jnp.float32)
        return ScheduleFreeState(
            descent.init(params), jax.tree.map(jnp.array, params), zero, zero, jnp.asarray(b1, jnp.float32)
        )

    def update(
        updates: Tree, state: ScheduleFreeState, params: Params = None, *, step: jax.Array, **extra: Any
    ) -> tuple[Tree, ScheduleFreeState]:
        deltas, inner = inner_update(updates, state.inner, params, step=step, **extra)
        max_rate = jnp.maximum(state.max_rate, schedule(step))
        weight_sum = state.weight_sum + max_rate**2
        share = max_rate**2 / jnp.maximum(weight_sum, 1e-30)
        z = optax.apply_updates(state.z, deltas)

        def move(y: jax.Array, z_old: jax.Array, z_new: jax.Array) -> jax.Array:
            x_old = (y - (1 - b1) * z_old) / b1
            x_new = (1 - share) * x_old + share * z_new
            return b1 * x_new + (1 - b1) * z_new - y

        moved = jax.tree.map(move, params, state.z, z)
        return moved, ScheduleFreeState(inner, z, weight_sum, max_rate, jnp.asarray(b1, jnp.float32))

    return optax.GradientTransformationExtraArgs(init, update)
