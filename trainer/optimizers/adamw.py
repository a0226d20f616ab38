"""AdamW."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.optimizers.optimizer import OptimizerConfig, Params, Tree


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019)."""

    kind: str = "adamw"
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        return scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Matches optax's bit for bit. If `update_applied` is false, the (discarded) updates use the old moments.

    The train step selects state the same way, `where(update_applied, new, old)`. Only that select then reads the old
    moments, and XLA updates them in place instead of copying all of them (GPT-2 on CPUs: 4 % of a step, 0.5 GB).
    """

    def update(grads: Tree, state: Any, params: Params = None, *, update_applied: jax.Array | bool = True, **_: Any):
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        mean = optax.tree.bias_correction(optax.tree.where(update_applied, mu, state.mu), b1, count)
        square = optax.tree.bias_correction(optax.tree.where(update_applied, nu, state.nu), b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)
