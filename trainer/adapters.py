"""Training adapters instead of parameters: the base is a frozen model, and what trains is put on it where it is used.

Neither the step nor an objective knows of it: an objective that is `AdapterObjective` gives them the model's own tree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from models.adapters.lora import (
    AdapterConfig,
    QuantizeBase,
    adapter_axes,
    bind_adapters,
    init_adapters,
    merge,
    quantized_axes_of,
    quantized_base,
)
from trainer.mesh import with_shardings
from trainer.objective import Params, WrappedObjective

BASE = "base"  # its name among the frozen models
Shard = Callable[..., Any]  # (axes, shapes) to shardings; strict=False: what cannot be cut stays whole


@dataclass(frozen=True)
class AdapterLayout:
    """How the adapters of a run stand on their base."""

    config: AdapterConfig
    model_axes: Params  # of the model's own parameters
    full_params: (
        Params  # these as `jax.ShapeDtypeStruct`s with shardings: the base as it is read, and what a merge gives
    )
    shard: Shard

    @cached_property
    def stored(self) -> Params:
        """Shapes and shardings of the base as it is kept."""
        shapes = jax.eval_shape(self._store, self.full_params)
        # Of the scales of blocks there may be fewer than devices, where the weight itself can be cut.
        return with_shardings(shapes, self.shard(quantized_axes_of(self.model_axes, shapes), shapes, strict=False))

    @cached_property
    def axes(self) -> Params:
        """The names of the dims of the adapters. Raises: ValueError for targets that cannot be."""
        return adapter_axes(self.config, self.model_axes)

    @cached_property
    def abstract(self) -> Params:
        """Shapes and shardings of the adapters."""
        shapes = jax.eval_shape(self.init, jax.random.key(0), self.stored)
        return with_shardings(shapes, self.shard(self.axes, shapes))

    def init(self, key: jax.Array, base: Params) -> Params:
        """Adapters that change nothing yet."""
        return init_adapters(self.config, self.model_axes, key, base)

    def _store(self, params: Params) -> Params:
        return quantized_base(self.config, self.model_axes, params)

    def quantize_base(self, params: Params) -> Params:
        """The base as it is kept."""
        if self.config.quantize_base is QuantizeBase.none:
            return params
        return jax.jit(self._store, out_shardings=_shardings(self.stored))(params)

    def apply_adapters(self, base: Params, adapters: Params, rng: jax.Array | None = None) -> Params:
        """The model's own tree, for its `apply`; with `rng`, for one pass of training."""
        return bind_adapters(self.config, self.model_axes, base, adapters, rng)

    def merge(self, base: Params, adapters: Params) -> Params:
        """Plain parameters, in the dtype of the model's: what is evaluated, written with and exported."""
        return self._merge(base, adapters)

    @cached_property
    def _merge(self) -> Callable[[Params, Params], Params]:
        dtype = jax.tree.leaves(self.full_params)[0].dtype
        join = partial(merge, self.config, self.model_axes, dtype=jnp.dtype(dtype))
        return jax.jit(join, out_shardings=_shardings(self.full_params))

    @property
    def num_trainable(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract))


def _shardings(abstract: Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


@dataclass(frozen=True)
class AdapterObjective(WrappedObjective):
    """An `Objective` over adapters, from one over the model's own parameters."""

    apply_adapters: Callable[..., Params]  # `AdapterLayout.join`

    def wrap(self, apply, params, frozen, batch, rng) -> tuple[Any, Params]:
        return apply, self.apply_adapters(frozen[BASE], params, None if rng is None else jax.random.fold_in(rng, 1))
