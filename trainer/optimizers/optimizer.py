"""Optimizer configs. Each defines the update direction; `OptimizerConfig.build` adds the shared transformations:

    clip by global norm > direction > muP factor > weight decay > group multiplier > learning rate > EMA

The learning rate follows from the step passed to `update(..., step=)`, not from a counter in the optimizer state, so
`reset=[optimizer]` and `reset=[step]` are independent. Parameter groups (`trainer/optimizers/param_groups.py`) follow
from logical axes, so stacked layers are never treated as one matrix.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models.config import ModelConfig
from trainer.host_offload import on_device
from trainer.optimizers.factored_moments import scale_by_factored_rms
from trainer.optimizers.mup_rates import Rule, like_adam, like_muon, like_sgd, rate_factors
from trainer.optimizers.param_groups import MatrixDims, ParamGroup, matrix_dims, param_groups
from trainer.optimizers.soap import scale_by_soap
from trainer.schedule import Schedule
from trainer.state import TrainState

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


@dataclass
class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023). Use a tenth of AdamW's learning rate and ten times its weight decay."""

    kind: str = "lion"
    learning_rate: float = 1e-4  # peak learning rate, scaled by the schedule
    weight_decay: float = 1.0  # decoupled weight decay of matrices, embeddings and the head
    b1: float = 0.9  # weight of the momentum in the update
    b2: float = 0.99  # decay of the momentum

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        return optax.scale_by_lion(b1=self.b1, b2=self.b2)


@dataclass
class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    kind: str = "sgd"
    learning_rate: float = 0.1  # peak learning rate, scaled by the schedule
    weight_decay: float = 0.0  # decoupled weight decay of matrices, embeddings and the head
    momentum: float = 0.9  # decay of the momentum; 0: no momentum
    nesterov: bool = False  # use Nesterov momentum

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        if self.momentum == 0:
            return optax.identity()
        return optax.trace(decay=self.momentum, nesterov=self.nesterov)

    def mup_rule(self) -> Rule:
        return like_sgd


@dataclass
class AdafactorConfig(OptimizerConfig):
    """Adafactor (Shazeer and Stern 2018), with clipping and scaling per layer instead of per stack of layers."""

    kind: str = "adafactor"
    learning_rate: float = 0.01  # peak; relative to the RMS of the weights if multiply_by_parameter_scale
    weight_decay: float = 0.0  # decoupled weight decay of matrices, embeddings and the head
    decay_rate: float = 0.8  # second moments decay by 1 - t ** -decay_rate
    clipping_threshold: float = 1.0  # maximum RMS of the update of a layer
    multiply_by_parameter_scale: bool = True  # scale updates by the RMS of the weights of the layer
    min_dim_to_factor: int = 128  # matrices with a smaller side are not factored
    eps: float = 1e-30  # added to squared gradients

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        return scale_by_factored_rms(
            param_axes,
            decay_power=self.decay_rate,
            clip_update=self.clipping_threshold,
            scale_by_param=self.multiply_by_parameter_scale,
            min_dim_to_factor=self.min_dim_to_factor,
            eps=self.eps,
        )

    def mup_rule(self) -> Rule:
        if self.multiply_by_parameter_scale:
            raise ValueError(
                "optimizer.multiply_by_parameter_scale=true: scales updates by the RMS of the weights, which depends "
                "on the width under model.mup_base_width; set it to false, or model.mup_base_width=null"
            )
        return like_adam


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024): orthogonalized momentum for matrices of layers; AdamW for all other parameters."""

    kind: str = "muon"
    momentum: float = 0.95  # momentum decay of matrices
    ns_steps: int = 5  # Newton-Schulz iterations
    consistent_rms: float | None = 0.2  # RMS of updates, matching AdamW (Liu et al. 2025); null: as Jordan et al.
    b1: float = 0.9  # first moment decay of AdamW
    b2: float = 0.95  # second moment decay of AdamW
    eps: float = 1e-8  # epsilon of both Muon and AdamW

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        dims = matrices_only(param_axes, _muon_dims)
        muon = optax.chain(
            optax.contrib.scale_by_muon(
                ns_steps=self.ns_steps, beta=self.momentum, eps=self.eps, weight_dimension_numbers=dims
            ),
            scale_by_shape(matrices_only(param_axes, matrix_dims), self.consistent_rms),
        )
        return matrices_by(muon, scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps), param_axes)

    def mup_rule(self) -> Rule:
        return partial(like_muon, consistent=self.consistent_rms is not None)


@dataclass
class SoapConfig(OptimizerConfig):
    """SOAP (Vyas et al. 2024): Adam in Shampoo's eigenbasis for matrices of layers; AdamW for all other parameters."""

    kind: str = "soap"
    learning_rate: float = 3e-3  # peak learning rate, scaled by the schedule
    weight_decay: float = 0.01  # decoupled weight decay of matrices, embeddings and the head
    b1: float = 0.95  # decay of the first moment
    b2: float = 0.95  # decay of the second moment and the preconditioners
    eps: float = 1e-8  # added to the root of the second moment
    precondition_frequency: int = field(default=10, metadata={"min": 1})  # updates between eigenbasis refreshes
    max_precond_dim: int = field(default=10_000, metadata={"min": 1})  # longer sides are not preconditioned

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        soap = scale_by_soap(
            matrices_only(param_axes, matrix_dims),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            frequency=self.precondition_frequency,
            max_dim=self.max_precond_dim,
        )
        return matrices_by(soap, scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps), param_axes)

    def mup_rule(self) -> Rule:
        raise ValueError(
            "model.mup_base_width: no muP rule is implemented for optimizer=soap, whose updates are neither Adam's nor "
            "orthogonal; use optimizer=adamw or muon, or model.mup_base_width=null"
        )


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


def _muon_dims(axes: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers:
    dims = matrix_dims(axes)
    return optax.contrib.MuonDimensionNumbers(dims.row_axes(), dims.col_axes(len(axes)))


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


def _average_of(state: ScheduleFreeState, params: Params) -> Params:
    b1 = state.b1
    return jax.tree.map(lambda y, z: ((y - (1 - b1) * z) / b1).astype(y.dtype), params, state.z)


def eval_params(state: TrainState) -> Params:
    """Returns the parameters for evaluation, export and generation: the average, if the optimizer has one."""
    kinds = (AverageState, ScheduleFreeState)
    for found in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(found, AverageState):
            return jax.tree.map(lambda a, p: a.astype(p.dtype), on_device(found.average), state.params)
        if isinstance(found, ScheduleFreeState):
            return _average_of(on_device(found), state.params)
    return state.params
