"""Optimizer configs. Each defines the update direction; `OptimizerConfig.build` adds the shared transformations:

    clip by global norm > direction > muP factor > weight decay > group multiplier > learning rate > EMA

The learning rate follows from the step passed to `update(..., step=)`, not from a counter in the optimizer state, so
`reset=[optimizer]` and `reset=[step]` are independent. Parameter groups (`trainer/optimizers/param_groups.py`) follow
from logical axes, so stacked layers are never treated as one matrix.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models.config import ModelConfig
from trainer.optimizers.mup_rates import Rule, like_adam, rate_factors
from trainer.optimizers.param_groups import MatrixDims, ParamGroup, param_groups
from trainer.schedule import Schedule

Params = Any  # a nested dict of arrays
Tree = Any  # a tree in the shape of the parameters'

DECAYED = (ParamGroup.matrix, ParamGroup.embedding, ParamGroup.head)


@dataclass
class OptimizerConfig:
    """Base of all optimizers. Weight decay is decoupled, scaled by the learning rate; no decay of biases and norms."""

    kind: str = ""
    learning_rate: float = 1e-3  # peak learning rate, scaled by the schedule
    weight_decay: float = 0.1  # decoupled weight decay of matrices, embeddings and the head
    # clip gradients to this global norm; null disables clipping
    max_grad_norm: float | None = field(default=1.0, metadata={"above": 0, "hint": "null disables clipping"})
    # decay of a parameter EMA used for evaluation and export; null disables it
    ema_decay: float | None = field(
        default=None, metadata={"above": 0, "below": 1, "hint": "for example 0.999; null disables it"}
    )
    lr_multipliers: dict[str, float] = field(default_factory=dict)  # learning rate factor by parameter group; default 1
    offload_state: bool = False  # store optimizer state in host memory and load it for each update
    # step of router biases with model.moe.load_balancing=bias; no schedule
    router_bias_update_rate: float = field(default=1e-3, metadata={"min": 0})

    def build(
        self, schedule: Schedule, param_axes: Tree, width: ModelConfig | None = None
    ) -> optax.GradientTransformationExtraArgs:
        """Builds the gradient transformation; its `update` requires `step=`.

        `param_axes`: logical axes of each parameter. `width`: the model, if learning rates follow muP.
        Raises: ValueError naming the key of an invalid value.
        """
        self.check()
        factors = None if width is None else rate_factors(width, param_axes, self.mup_rule())
        parts = [self.chain_updates(schedule, param_axes, factors)]
        if self.max_grad_norm is not None:
            parts.insert(0, clip_by_global_norm(self.max_grad_norm))
        if self.ema_decay is not None:
            parts.append(average_params(self.ema_decay))
        return optax.with_extra_args_support(optax.chain(*parts))

    def check(self) -> None:
        roles = [role.name for role in ParamGroup]
        for role, factor in self.lr_multipliers.items():
            if role not in roles:
                raise ValueError(f"optimizer.lr_multipliers.{role}={factor}: no such role; valid: {', '.join(roles)}")

    def mup_rule(self) -> Rule:
        """Returns the muP learning rate rule of this optimizer. Raises: ValueError if none is known."""
        return like_adam

    def chain_updates(
        self, schedule: Schedule, param_axes: Tree, factors: Tree | None = None
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation from clipped gradients to parameter updates.

        `factors`: muP learning rate factors. They do not scale weight decay, whose speed is then independent of the
        width (Wang & Aitchison 2024 [2405.13698]).
        """
        roles = param_groups(param_axes)
        descent = optax.chain(
            self.scale_gradient(param_axes),
            *([] if factors is None else [scale_each(factors)]),
            optax.add_decayed_weights(self.weight_decay, mask=jax.tree.map(lambda role: role in DECAYED, roles)),
            scale_by_learning_rates(
                schedule, jax.tree.map(lambda role: self.lr_multipliers.get(role.name, 1.0), roles)
            ),
        )
        return (
            router_bias_update(descent, roles, self.router_bias_update_rate)
            if ParamGroup.balance in jax.tree.leaves(roles)
            else descent
        )

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        """Returns the update direction before weight decay and learning rate, with the sign of the gradient."""
        raise TypeError(f"optimizer.kind={self.kind}: choose one with optimizer=NAME")


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """As optax's, with one scalar factor `min(1, limit / norm)`: XLA materializes optax's quotient of each array.

    `grad_norm`: global norm of the gradients, if already computed.
    """

    def update(grads: Tree, state: Any, params: Params = None, *, grad_norm: jax.Array | None = None, **_: Any):
        norm = optax.global_norm(grads) if grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def matrices_only(param_axes: Tree, value: Any) -> Tree:
    """Returns a tree with `value(axes)` at each matrix and `optax.MaskedNode()` at all other parameters."""
    return jax.tree.map(
        lambda role, axes: value(axes) if role is ParamGroup.matrix else optax.MaskedNode(),
        param_groups(param_axes),
        param_axes,
    )


def matrices_by(
    matrices: optax.GradientTransformation, others: optax.GradientTransformation, param_axes: Tree
) -> optax.GradientTransformation:
    """Applies one transformation to the matrices of layers and another to all other parameters."""
    labels = jax.tree.map(lambda role: "matrix" if role is ParamGroup.matrix else "other", param_groups(param_axes))
    return optax.partition({"matrix": matrices, "other": others}, labels)


def scale_by_shape(dims: Tree, consistent_rms: float | None) -> optax.GradientTransformation:
    """Scales orthogonal [R, C] updates by sqrt(max(R, C)) * consistent_rms; if None, by sqrt(max(1, C / R))."""

    def scale(update: jax.Array, matrix: MatrixDims) -> jax.Array:
        _, rows, cols = matrix.matrix_shape(update.shape)
        size = max(1.0, cols / rows) if consistent_rms is None else max(rows, cols) * consistent_rms**2
        return update * size**0.5

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, dims))


def scale_each(factors: Tree) -> optax.GradientTransformation:
    """Multiplies updates by a factor per parameter (a tree of floats)."""
    scale = lambda updates: jax.tree.map(lambda u, factor: u * jnp.asarray(factor, u.dtype), updates, factors)
    return optax.stateless(lambda updates, params: scale(updates))


def scale_by_learning_rates(schedule: Schedule, factors: Tree) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the negative learning rate at `step` and a factor per parameter (a tree of floats)."""

    def update(updates: Tree, state: Any, params: Params = None, *, step: jax.Array, **_: Any) -> tuple[Tree, Any]:
        rate = schedule(step)
        return jax.tree.map(lambda u, factor: u * (-rate * factor).astype(u.dtype), updates, factors), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def router_bias_update(
    descent: optax.GradientTransformationExtraArgs, roles: Tree, rate: float
) -> optax.GradientTransformationExtraArgs:
    """Applies `descent` to all parameters except router biases, which move by `rate` against the expert load.

    A bias decreases if the load of its expert is above the mean and increases if it is below (DeepSeek-V3, section
    2.1.2); the sign of its gradient indicates which.
    """

    def update(updates: Tree, state: Any, params: Params = None, **extra: Any) -> tuple[Tree, Any]:
        others = jax.tree.map(lambda role, g: jnp.zeros_like(g) if role is ParamGroup.balance else g, roles, updates)
        new, state = descent.update(others, state, params, **extra)
        step = lambda role, u, g: -rate * jnp.sign(g).astype(u.dtype) if role is ParamGroup.balance else u
        return jax.tree.map(step, roles, new, updates), state

    return optax.GradientTransformationExtraArgs(descent.init, update)


class AverageState(NamedTuple):
    count: jax.Array  # [] i32
    average: Params  # f32


def average_params(decay: float) -> optax.GradientTransformationExtraArgs:
    """Maintains the EMA `average = d * average + (1 - d) * params` of the updated parameters; updates are unchanged.

    d = min(decay, (1 + count) / (10 + count)), as in TensorFlow's ExponentialMovingAverage: with a constant 0.9999, the
    initial weights would dominate for ten thousand updates.
    """

    def init(params: Params) -> AverageState:
        # A copy: the state and the parameters are donated together, and must not share a buffer.
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.array(p, jnp.float32), params))

    def update(
        updates: Tree, state: AverageState, params: Params = None, *, update_applied: jax.Array | bool = True, **_: Any
    ) -> tuple[Tree, AverageState]:
        d = jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        new = optax.tree.where(update_applied, optax.apply_updates(params, updates), params)  # see `scale_by_adam`
        average = jax.tree.map(lambda a, p: a + (1 - d) * (p.astype(jnp.float32) - a), state.average, new)
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformationExtraArgs(init, update)
