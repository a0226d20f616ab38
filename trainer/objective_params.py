"""Trainable parameters of a loss that are not part of the model, such as a projection between two widths.

They are trained and checkpointed with the model's parameters, under a separate name. Evaluation, generation and export
use `model_params`, which excludes them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any  # a nested dict of arrays
OBJECTIVE_PARAMS = "beside"  # top-level name in the parameter tree; part of the checkpoint format


class ParamSpec(NamedTuple):
    """A parameter, initialized from a normal distribution with standard deviation `std`."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical axis names
    std: float


def model_params(params: Params) -> Params:
    """Returns the parameters of the model only."""
    return (
        {name: value for name, value in params.items() if name != OBJECTIVE_PARAMS}
        if OBJECTIVE_PARAMS in params
        else params
    )


def objective_param_axes(extras: Mapping[str, ParamSpec]) -> Params:
    """Returns logical axes of the objective's parameters, to be merged with those of the model."""
    return {OBJECTIVE_PARAMS: {name: extra.axes for name, extra in extras.items()}} if extras else {}


def init_objective_params(extras: Mapping[str, ParamSpec], key: jax.Array) -> Params:
    """Initializes the objective's parameters (f32), to be merged with those of the model."""
    if not extras:
        return {}
    keys = jax.random.split(jax.random.fold_in(key, 1), len(extras))
    draw = lambda key, extra: extra.std * jax.random.normal(key, extra.shape, jnp.float32)
    return {OBJECTIVE_PARAMS: {name: draw(key, extra) for key, (name, extra) in zip(keys, extras.items(), strict=True)}}


def with_objective_params(
    extras: Mapping[str, ParamSpec], init: Callable[[jax.Array], Params]
) -> Callable[[jax.Array], Params]:
    """Extends `init` by the objective's parameters. Returns `init` itself if there are none."""
    return (lambda key: {**init(key), **init_objective_params(extras, key)}) if extras else init
