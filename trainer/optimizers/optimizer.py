"""The optimizers: a dataclass each, which gives the direction of an update; what they share is in `build`.

    clip by global norm > direction > rate by width > weight decay > rate of the role > learning rate > average

The learning rate is read from the step given to `update(..., step=)`, never from a counter hidden in the
optimizer's state, so `reset=[optimizer]` and `reset=[step]` do what they say. Roles (`trainer/optimizers/param_groups.py`) come
from logical axes, so stacked layers are never taken for one matrix.
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
    """Base of all optimizers. Weight decay is decoupled, times the learning rate, and spares biases and norm
    scales.
    """

    kind: str = ""
    learning_rate: float = 1e-3  # peak; the schedule scales it
    weight_decay: float = 0.1  # of matrices, embeddings and the head
    # Global norm above which gradients are scaled down; null: off
    max_grad_norm: float | None = field(default=1.0, metadata={"above": 0, "hint": "null turns clipping off"})
    # Keep an average of the parameters, used in evaluation; null: off
    ema_decay: float | None = field(
        default=None, metadata={"above": 0, "below": 1, "hint": "as 0.999; null turns it off"}
    )
    lr_multipliers: dict[str, float] = field(default_factory=dict)  # by role; each 1 if not given
    # what the optimizer keeps lies in the host's memory, and comes to the devices for the update
    offload_state: bool = False
    # Of model.moe.load_balancing=bias: what a bias moves in a step; no schedule scales it
    router_bias_update_rate: float = field(default=1e-3, metadata={"min": 0})

    def build(
        self, schedule: Schedule, param_axes: Tree, width: ModelConfig | None = None
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation; its `update` needs `step=`. `param_axes`: the logical axes of each parameter. `width`:
        the model, where rates follow from its width.

        Raises: ValueError naming the key of a value that cannot be.
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
        """How rates follow from a model's width. Raises: ValueError where no rule is known."""
        return like_adam

    def chain_updates(
        self, schedule: Schedule, param_axes: Tree, factors: Tree | None = None
    ) -> optax.GradientTransformationExtraArgs:
        """From clipped gradients to what is added to the parameters. `factors`: on the rate of each, but not on its
        decay, which then works at the same speed at every width (Wang & Aitchison 2024 [2405.13698]).
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
        """The update before weight decay and learning rate, pointing uphill."""
        raise TypeError(f"optimizer.kind={self.kind}: choose one with optimizer=NAME")


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """As optax's, by one factor, `limit / norm` or 1: its quotient of each array is written to memory and read.

    `grad_norm`: of the gradients, where it is known already.
    """

    def update(grads: Tree, state: Any, params: Params = None, *, grad_norm: jax.Array | None = None, **_: Any):
        norm = optax.global_norm(grads) if grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@dataclass
class AdamWConfig(OptimizerConfig):
    """Loshchilov and Hutter 2019."""

    kind: str = "adamw"
    b1: float = 0.9  # decay of the mean of gradients
    b2: float = 0.95  # decay of the mean of their squares
    eps: float = 1e-8  # added to the root of the latter

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        return scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax's, to the bit. Where `taken` is false, and its result with it, updates are made from the old moments.

    The step keeps the same choice, `location(taken, new, old)`: so that the old moments are read by it alone, and XLA
    puts the new in their place. It copied all of them first (GPT-2 on CPUs: 4 % of a step, 0.5 GB).
    """

    def update(grads: Tree, state: Any, params: Params = None, *, taken: jax.Array | bool = True, **_: Any):
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        mean = optax.tree.bias_correction(optax.tree.where(taken, mu, state.mu), b1, count)
        square = optax.tree.bias_correction(optax.tree.where(taken, nu, state.nu), b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


@dataclass
class LionConfig(OptimizerConfig):
    """Chen et al. 2023: the sign of a momentum. Wants a tenth of AdamW's rate and ten times its decay."""

    kind: str = "lion"
    learning_rate: float = 1e-4  # peak
    weight_decay: float = 1.0  # of matrices, embeddings and the head
    b1: float = 0.9  # weight of the momentum in the update
    b2: float = 0.99  # decay of the momentum

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        return optax.scale_by_lion(b1=self.b1, b2=self.b2)


@dataclass
class SgdConfig(OptimizerConfig):
    """Gradient descent with momentum."""

    kind: str = "sgd"
    learning_rate: float = 0.1  # peak
    weight_decay: float = 0.0  # of matrices, embeddings and the head
    momentum: float = 0.9  # decay of the summed gradients; 0: none
    nesterov: bool = False  # look one step ahead

    def scale_gradient(self, param_axes: Tree) -> optax.GradientTransformation:
        if self.momentum == 0:
            return optax.identity()
        return optax.trace(decay=self.momentum, nesterov=self.nesterov)

    def mup_rule(self) -> Rule:
        return like_sgd


@dataclass
class AdafactorConfig(OptimizerConfig):
    """Shazeer and Stern 2018: second moments as row and column means; clipping and scale per layer, not per
    stack.
    """

    kind: str = "adafactor"
    learning_rate: float = 0.01  # peak; relative to the size of the weights if scale_by_param
    weight_decay: float = 0.0  # of matrices, embeddings and the head
    decay_rate: float = 0.8  # second moments forget as 1 - t ** -decay_power
    clipping_threshold: float = 1.0  # root mean square above which a layer's update is scaled down
    multiply_by_parameter_scale: bool = True  # times the root mean square of the layer's weights
    min_dim_to_factor: int = 128  # smaller matrices keep all second moments
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
                "optimizer.multiply_by_parameter_scale=true: sizes updates by the weights, whose own size model.mup_base_width lets "
                "follow from the width; set it to false, or model.mup_base_width=null"
            )
        return like_adam


@dataclass
class MuonConfig(OptimizerConfig):
    """Jordan et al. 2024: momentum made orthogonal, for the matrices of layers; the rest goes by AdamW."""

    kind: str = "muon"
    momentum: float = 0.95  # of the matrices
    ns_steps: int = 5  # Newton-Schulz iterations
    consistent_rms: float | None = 0.2  # size of updates, as AdamW's (Liu et al. 2025); null: Jordan's
    b1: float = 0.9  # of AdamW
    b2: float = 0.95  # of AdamW
    eps: float = 1e-8  # of both

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
    """Vyas et al. 2024: Adam in the eigenbasis of Shampoo, for the matrices of layers; the rest goes by
    AdamW.
    """

    kind: str = "soap"
    learning_rate: float = 3e-3  # peak
    weight_decay: float = 0.01  # of matrices, embeddings and the head
    b1: float = 0.95  # decay of the mean of gradients
    b2: float = 0.95  # decay of the mean of their squares, and of the preconditioners
    eps: float = 1e-8  # added to the root of the former
    precondition_frequency: int = field(default=10, metadata={"min": 1})  # updates between refreshed eigenbases
    max_precond_dim: int = field(default=10_000, metadata={"min": 1})  # a side longer than this keeps its own basis

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
            "model.mup_base_width: for optimizer=soap no rule of widths is known here, as its updates are neither Adam's "
            "nor orthogonal; take optimizer=adamw or muon, or model.mup_base_width=null"
        )


@dataclass
class ScheduleFreeConfig(OptimizerConfig):
    """Defazio et al. 2024: AdamW whose averaging replaces the decay of the rate. Use it with
    schedule=constant.
    """

    kind: str = "schedule_free"
    learning_rate: float = 2.5e-3  # peak
    # How far gradients are taken towards the average
    b1: float = field(default=0.9, metadata={"above": 0, "below": 1})
    b2: float = 0.95  # decay of the mean of squared gradients
    eps: float = 1e-8  # added to its root

    def check(self) -> None:
        super().check()
        if self.ema_decay is not None:
            raise ValueError(
                f"optimizer.ema_decay={self.ema_decay}: optimizer=schedule_free has an average of its own; "
                "set optimizer.ema_decay=null"
            )

    def chain_updates(
        self, schedule: Schedule, param_axes: Tree, factors: Tree | None = None
    ) -> optax.GradientTransformationExtraArgs:
        return schedule_free(super().chain_updates(schedule, param_axes, factors), schedule, b1=self.b1)

    def direction(self, param_axes: Tree) -> optax.GradientTransformation:
        return optax.scale_by_rms(decay=self.b2, eps=self.eps, eps_in_sqrt=False, bias_correction=True)


def _muon_dims(axes: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers:
    dims = matrix_dims(axes)
    return optax.contrib.MuonDimensionNumbers(dims.row_axes(), dims.col_axes(len(axes)))


def matrices_only(param_axes: Tree, value: Any) -> Tree:
    """`value(axes)` at each matrix, and optax's mark for 'not mine' at all else."""
    return jax.tree.map(
        lambda role, axes: value(axes) if role is ParamGroup.matrix else optax.MaskedNode(),
        param_groups(param_axes),
        param_axes,
    )


def matrices_by(
    matrices: optax.GradientTransformation, others: optax.GradientTransformation, param_axes: Tree
) -> optax.GradientTransformation:
    """One transformation for the matrices of layers, another for all else."""
    labels = jax.tree.map(lambda role: "matrix" if role is ParamGroup.matrix else "other", param_groups(param_axes))
    return optax.partition({"matrix": matrices, "other": others}, labels)


def scale_by_shape(dims: Tree, consistent_rms: float | None) -> optax.GradientTransformation:
    """Orthogonal [R, C] updates times sqrt(max(R, C)) * consistent_rms, or else times sqrt(max(1, C / R))."""

    def scale(update: jax.Array, matrix: MatrixDims) -> jax.Array:
        _, rows, cols = matrix.matrix_shape(update.shape)
        size = max(1.0, cols / rows) if consistent_rms is None else max(rows, cols) * consistent_rms**2
        return update * size**0.5

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, dims))


def scale_each(factors: Tree) -> optax.GradientTransformation:
    """Times the factor of each parameter (a tree of floats)."""
    scale = lambda updates: jax.tree.map(lambda u, factor: u * jnp.asarray(factor, u.dtype), updates, factors)
    return optax.stateless(lambda updates, params: scale(updates))


def scale_by_learning_rates(schedule: Schedule, factors: Tree) -> optax.GradientTransformationExtraArgs:
    """Times minus the learning rate of `step`, times the factor of each parameter (a tree of floats)."""

    def update(updates: Tree, state: Any, params: Params = None, *, step: jax.Array, **_: Any) -> tuple[Tree, Any]:
        rate = schedule(step)
        return jax.tree.map(lambda u, factor: u * (-rate * factor).astype(u.dtype), updates, factors), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def router_bias_update(
    descent: optax.GradientTransformationExtraArgs, roles: Tree, rate: float
) -> optax.GradientTransformationExtraArgs:
    """`descent` for all parameters but the balancing biases, which go down by `rate` where the load of their expert is
    above the mean and up where it is below (DeepSeek-V3, section 2.1.2): the gradient's sign says which.
    """

    def update(updates: Tree, state: Any, params: Params = None, **extra: Any) -> tuple[Tree, Any]:
        learnt = jax.tree.map(lambda role, g: jnp.zeros_like(g) if role is ParamGroup.balance else g, roles, updates)
        new, state = descent.update(learnt, state, params, **extra)
        step = lambda role, u, g: -rate * jnp.sign(g).astype(u.dtype) if role is ParamGroup.balance else u
        return jax.tree.map(step, roles, new, updates), state

    return optax.GradientTransformationExtraArgs(descent.init, update)


class AverageState(NamedTuple):
    count: jax.Array  # [] i32
    average: Params  # f32


def average_params(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keeps `average = d * average + (1 - d) * params` of the updated parameters; changes no update.

    d = min(decay, (1 + count) / (10 + count)): an average of 0.9999 would else hold on to the initial weights
    for ten thousand updates (the rule of TensorFlow's ExponentialMovingAverage).
    """

    def init(params: Params) -> AverageState:
        # A copy: the state and the parameters are donated together, and must not share a buffer.
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.array(p, jnp.float32), params))

    def update(
        updates: Tree, state: AverageState, params: Params = None, *, taken: jax.Array | bool = True, **_: Any
    ) -> tuple[Tree, AverageState]:
        d = jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        new = optax.tree.where(taken, optax.apply_updates(params, updates), params)  # see `scale_by_adam`
        average = jax.tree.map(lambda a, p: a + (1 - d) * (p.astype(jnp.float32) - a), state.average, new)
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformationExtraArgs(init, update)


class ScheduleFreeState(NamedTuple):
    inner: Any
    z: Params  # the point that plain descent would have reached
    weight_sum: jax.Array  # [] f32
    max_rate: jax.Array  # [] f32
    b1: jax.Array  # [] f32: kept, for the average is computed from it


def schedule_free(
    descent: optax.GradientTransformation, schedule: Schedule, *, b1: float
) -> optax.GradientTransformationExtraArgs:
    """Gradients are taken at y = (1 - b1) z + b1 x, where x is the average of z, weighed by squared rates.

    The parameters are y; x is (y - (1 - b1) z) / b1, so only one copy is kept beside them. `optax.contrib`
    has the same, but counts its own steps.
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
    """The parameters to evaluate, export and generate with: the average where the optimizer keeps one."""
    kinds = (AverageState, ScheduleFreeState)
    for found in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(found, AverageState):
            return jax.tree.map(lambda a, p: a.astype(p.dtype), on_device(found.average), state.params)
        if isinstance(found, ScheduleFreeState):
            return _average_of(on_device(found), state.params)
    return state.params
