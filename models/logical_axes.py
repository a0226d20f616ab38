"""Logical axis names of array dims, and the sharding interface that maps them to the mesh."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax

LOGICAL_AXES = (
    "batch", "length", "residual", "positions", "embed", "heads", "kv_heads", "head_dim", "latent", "mlp", "vocab",
    "experts", "router", "layers", "outputs",
)  # fmt: skip

Axes = tuple[str | None, ...]  # None: not sharded
TOKENS: Axes = ("batch", "length", "embed")  # inputs of the matmuls of a layer
RESIDUAL: Axes = ("batch", "residual", "embed")  # activations between layers
Cut = Mapping[str, tuple[str, ...]]  # mesh axes that shard each logical axis; unsharded axes are absent


class ShardingConstraint(Protocol):
    """The mesh as seen by a model; implemented by the trainer."""

    stages: int  # pipeline stages
    shown_stages: int  # stages in the arrays of the program: all, or 1 when a plan compiles one device's share
    platform: str  # device platform: cpu, gpu, tpu

    def num_shards(self, name: str) -> int:
        """Returns the number of shards of a dim with this logical axis."""
        ...

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Constrains the sharding of activation `x`, whose dims have these logical axes."""
        ...

    def per_device(
        self, function: Callable[..., jax.Array], axes: Sequence[Axes | None], *args: jax.Array | None
    ) -> jax.Array:
        """Runs `function(cut, *args)` on the shards of each device, for code that the partitioner cannot shard.

        `axes` has the logical axes of each argument (None for None). The result has the dims and sharding of the first
        argument. Collectives in `function` use the mesh axes given in `cut`.
        """
        ...

    def along_stages(self, x: jax.Array) -> jax.Array:
        """Shards the leading dim of `x` [stages, ...] over the stages; the sharding of other dims is unchanged."""
        ...

    def vmap_stages(self, function: Callable[..., Any], *args: Any) -> Any:
        """Maps `function(constrain, *args)` over stages, the leading dim of all leaves of `args` and of the result.

        `constrain` is the mesh of a single stage.
        """
        ...


class NoConstraint:
    """Sharding on a single device: none."""

    stages = 1
    shown_stages = 1

    def __init__(self, platform: str | None = None):
        """`platform` None: the default backend."""
        self._platform = platform

    @property
    def platform(self) -> str:
        return self._platform or jax.default_backend()

    def num_shards(self, name: str) -> int:
        return 1

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        return x

    def per_device(self, function: Callable[..., jax.Array], axes: Any, *args: Any) -> jax.Array:
        return function({}, *args)

    def along_stages(self, x: jax.Array) -> jax.Array:
        return x

    def vmap_stages(self, function: Callable[..., Any], *args: Any) -> Any:
        return jax.vmap(partial(function, self))(*args)


no_constraint = NoConstraint()
