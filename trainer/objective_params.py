"""Parameters that a loss learns beside the model's own, such as a projection between two widths.

They train and are saved with the others, under a name that no model reads: what evaluates, writes or exports a model
takes `model_params` and never sees them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any  # a nested dict of arrays
OBJECTIVE_PARAMS = "beside"  # their name among the parameters


class ParamSpec(NamedTuple):
    """A parameter that begins normal with `std`."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # the names of its dims
    std: float


def model_params(params: Params) -> Params:
    """The model's own."""
    return (
        {name: value for name, value in params.items() if name != OBJECTIVE_PARAMS}
        if OBJECTIVE_PARAMS in params
        else params
    )


def objective_param_axes(extras: Mapping[str, ParamSpec]) -> Params:
    """To be joined to the axes of a model."""
    return {OBJECTIVE_PARAMS: {name: extra.axes for name, extra in extras.items()}} if extras else {}


def init_objective_params(extras: Mapping[str, ParamSpec], key: jax.Array) -> Params:
    """To be joined to the parameters of a model; f32."""
    if not extras:
        return {}
    keys = jax.random.split(jax.random.fold_in(key, 1), len(extras))
    draw = lambda key, extra: extra.std * jax.random.normal(key, extra.shape, jnp.float32)
    return {OBJECTIVE_PARAMS: {name: draw(key, extra) for key, (name, extra) in zip(keys, extras.items(), strict=True)}}


def with_objective_params(
    extras: Mapping[str, ParamSpec], init: Callable[[jax.Array], Params]
) -> Callable[[jax.Array], Params]:
    """`init` of both. Without any, `init` itself."""
    return (lambda key: {**init(key), **init_objective_params(extras, key)}) if extras else init
