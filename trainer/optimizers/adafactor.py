"""Adafactor's factored second moments for stacked layers and merged heads.

`optax.adafactor` factors over the two largest dims of a parameter, one of which may be `layers`, and clips a stack of
layers as one matrix. Here, rows and columns follow from the logical axes.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.optimizers.mup_rates import Rule, like_adam
from trainer.optimizers.optimizer import OptimizerConfig, Tree
from trainer.optimizers.param_groups import ParamGroup, matrix_dims, param_groups


class FactoredState(NamedTuple):
    """Trees over the parameters, with `optax.MaskedNode()` where an entry does not apply."""

    count: jax.Array  # [] i32
    rows: Any  # [batch..., rows..., 1...]: squares averaged over the columns
    cols: Any  # [batch..., 1..., cols...]: squares averaged over the rows
    full: Any  # shape of the parameter, if it is not factored


class _Plan(NamedTuple):
    """Factorization of one parameter: the dims of rows and columns; together they are those of a layer."""

    factored: bool
    row_axes: tuple[int, ...]
    col_axes: tuple[int, ...]

    def layer_axes(self) -> tuple[int, ...]:
        return self.row_axes + self.col_axes


def _plan(role: ParamGroup, axes: tuple[str | None, ...], shape: tuple[int, ...], min_dim: int) -> _Plan:
    dims = matrix_dims(axes)
    _, rows, cols = dims.matrix_shape(shape)
    factored = role is not ParamGroup.vector and min(rows, cols) >= min_dim
    return _Plan(factored, dims.row_axes(), dims.col_axes(len(shape)))


def _rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axes, keepdims=True))


def _scaled(grad: jax.Array, plan: _Plan, rows: Any, cols: Any, full: Any) -> jax.Array:
    if not plan.factored:
        return grad * jax.lax.rsqrt(full)
    row_factor = jax.lax.rsqrt(rows / jnp.mean(rows, plan.row_axes, keepdims=True))
    # Broadcast both first: their reduced dims have size 1.
    return grad * jnp.broadcast_to(row_factor, grad.shape) * jnp.broadcast_to(jax.lax.rsqrt(cols), grad.shape)


def scale_by_factored_rms(
    param_axes: Any,
    *,
    decay_power: float,
    clip_update: float,
    scale_by_param: bool,
    min_dim_to_factor: int,
    eps: float,
    min_param_rms: float = 1e-3,
) -> optax.GradientTransformation:
    """Divides gradients by the root of their factored second moments and clips each layer independently.

    `scale_by_param`: also multiplies by the RMS of the weights of the layer, at least `min_param_rms`.
    """
    roles = param_groups(param_axes)
    none = optax.MaskedNode()

    def over(function: Any, params: Any, *trees: Any) -> Any:
        def leaf(param: jax.Array, role: ParamGroup, axes: Any, *values: Any) -> Any:
            return function(_plan(role, axes, param.shape, min_dim_to_factor), param, *values)

        return jax.tree.map(leaf, params, roles, param_axes, *trees)

    def init(params: Any) -> FactoredState:
        def zeros(plan: _Plan, p: jax.Array, used: bool, axes: tuple[int, ...]) -> Any:
            shape = [1 if i in axes else size for i, size in enumerate(p.shape)]
            return jnp.zeros(shape, jnp.float32) if used else none

        return FactoredState(
            jnp.zeros((), jnp.int32),
            over(lambda plan, p: zeros(plan, p, plan.factored, plan.col_axes), params),
            over(lambda plan, p: zeros(plan, p, plan.factored, plan.row_axes), params),
            over(lambda plan, p: zeros(plan, p, not plan.factored, ()), params),
        )

    def update(updates: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        decay = 1 - (state.count + 1.0) ** -decay_power

        def ema(old: Any, grad: jax.Array, axes: tuple[int, ...]) -> Any:
            if isinstance(old, optax.MaskedNode):
                return old
            square = jnp.square(grad.astype(jnp.float32)) + eps
            return decay * old + (1 - decay) * jnp.mean(square, axes, keepdims=True)

        rows = over(lambda plan, g, old: ema(old, g, plan.col_axes), updates, state.rows)
        cols = over(lambda plan, g, old: ema(old, g, plan.row_axes), updates, state.cols)
        full = over(lambda plan, g, old: ema(old, g, ()), updates, state.full)

        def direction(plan: _Plan, grad: jax.Array, param: jax.Array, *moments: Any) -> jax.Array:
            scaled = _scaled(grad.astype(jnp.float32), plan, *moments)
            factor = 1 / jnp.maximum(1.0, _rms(scaled, plan.layer_axes()) / clip_update)
            if scale_by_param:
                factor = factor * jnp.maximum(_rms(param.astype(jnp.float32), plan.layer_axes()), min_param_rms)
            return scaled * jnp.broadcast_to(factor, scaled.shape)

        directions = over(direction, updates, params, rows, cols, full)
        return directions, FactoredState(state.count + 1, rows, cols, full)

    return optax.GradientTransformation(init, update)


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
