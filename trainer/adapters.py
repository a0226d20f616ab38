"""Adapter (LoRA) training: the base model is frozen and the adapters are the trainable parameters.

Train step and objectives are unaffected: `AdapterObjective` applies the adapters and passes the model's own tree on.
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
from trainer.objective import Params, WrappedObjective
from trainer.sharding import with_shardings

BASE = "base"  # key of the base model among the frozen models
Shard = Callable[..., Any]  # (axes, shapes) -> shardings; strict=False replicates indivisible parameters


@dataclass(frozen=True)
class AdapterLayout:
    """Shapes, shardings and conversions of the adapters of a run and their base model."""

    config: AdapterConfig
    model_axes: Params  # logical axes of the model's own parameters
    # `jax.ShapeDtypeStruct`s with shardings: of the base as loaded, and of merged parameters.
    full_params: Params
    shard: Shard

    @cached_property
    def stored(self) -> Params:
        """Shapes and shardings of the base in its (quantized) storage format."""
        shapes = jax.eval_shape(self._store, self.full_params)
        # Not strict: a shardable weight may have fewer block scales than devices.
        return with_shardings(shapes, self.shard(quantized_axes_of(self.model_axes, shapes), shapes, strict=False))

    @cached_property
    def axes(self) -> Params:
        """Logical axes of the adapters. Raises: ValueError for invalid target modules."""
        return adapter_axes(self.config, self.model_axes)

    @cached_property
    def abstract(self) -> Params:
        """Shapes and shardings of the adapters."""
        shapes = jax.eval_shape(self.init, jax.random.key(0), self.stored)
        return with_shardings(shapes, self.shard(self.axes, shapes))

    def init(self, key: jax.Array, base: Params) -> Params:
        """Returns initial adapters; their contribution is zero."""
        return init_adapters(self.config, self.model_axes, key, base)

    def _store(self, params: Params) -> Params:
        return quantized_base(self.config, self.model_axes, params)

    def quantize_base(self, params: Params) -> Params:
        """Returns the base in its storage format, quantized if `adapter.quantize_base` says so."""
        if self.config.quantize_base is QuantizeBase.none:
            return params
        return jax.jit(self._store, out_shardings=_shardings(self.stored))(params)

    def apply_adapters(self, base: Params, adapters: Params, rng: jax.Array | None = None) -> Params:
        """Returns the model's own tree for its `apply`; `rng` enables adapter dropout for a training pass."""
        return bind_adapters(self.config, self.model_axes, base, adapters, rng)

    def merge(self, base: Params, adapters: Params) -> Params:
        """Returns merged parameters in the model's dtype, for evaluation, generation and export."""
        return self._merge(base, adapters)

    @cached_property
    def _merge(self) -> Callable[[Params, Params], Params]:
        dtype = jax.tree.leaves(self.full_params)[0].dtype
        merge_all = partial(merge, self.config, self.model_axes, dtype=jnp.dtype(dtype))
        return jax.jit(merge_all, out_shardings=_shardings(self.full_params))

    @property
    def num_trainable(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract))


def _shardings(abstract: Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


@dataclass(frozen=True)
class AdapterObjective(WrappedObjective):
    """Wraps an `Objective` over model parameters as an `Objective` over adapters."""

    apply_adapters: Callable[..., Params]  # `AdapterLayout.apply_adapters`

    def wrap(self, apply, params, frozen, batch, rng) -> tuple[Any, Params]:
        return apply, self.apply_adapters(frozen[BASE], params, None if rng is None else jax.random.fold_in(rng, 1))
