"""Parameters that a loss learns beside the model's own, such as a projection between two widths.

They train and are saved with the others, under a name that no model reads: what evaluates, writes or exports a model
takes `own_params` and never sees them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any  # a nested dict of arrays
BESIDE = "beside"  # their name among the parameters


class Extra(NamedTuple):
    """A parameter that begins normal with `std`."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # the names of its dims
    std: float


def own_params(params: Params) -> Params:
    """The model's own."""
    return {name: value for name, value in params.items() if name != BESIDE} if BESIDE in params else params


def extra_axes(extras: Mapping[str, Extra]) -> Params:
    """To be joined to the axes of a model."""
    return {BESIDE: {name: extra.axes for name, extra in extras.items()}} if extras else {}


def init_extras(extras: Mapping[str, Extra], key: jax.Array) -> Params:
    """To be joined to the parameters of a model; f32."""
    if not extras:
        return {}
    keys = jax.random.split(jax.random.fold_in(key, 1), len(extras))
    draw = lambda key, extra: extra.std * jax.random.normal(key, extra.shape, jnp.float32)
    return {BESIDE: {name: draw(key, extra) for key, (name, extra) in zip(keys, extras.items(), strict=True)}}


def with_extras(extras: Mapping[str, Extra], init: Callable[[jax.Array], Params]) -> Callable[[jax.Array], Params]:
    """`init` of both. Without any, `init` itself."""
    return (lambda key: {**init(key), **init_extras(extras, key)}) if extras else init
