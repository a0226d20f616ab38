"""Names of dims. Which mesh axes they lie on is not known here."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax

LOGICAL_AXES = (
    "batch", "length", "residual", "positions", "embed", "heads", "kv_heads", "head_dim", "latent", "mlp", "vocab",
    "experts", "router", "layers", "outputs",
)  # fmt: skip

Axes = tuple[str | None, ...]  # None: kept whole
TOKENS: Axes = ("batch", "length", "embed")  # of what a layer's products read
RESIDUAL: Axes = ("batch", "residual", "embed")  # of what goes from layer to layer
Cut = Mapping[str, tuple[str, ...]]  # the mesh axes that cut the dims of a name; a name that none cuts is not in it


class ShardingConstraint(Protocol):
    """The mesh as a model sees it; the trainer knows how."""

    stages: int  # parts of the layers, each on other devices
    shown_stages: int  # of these, in the arrays that the program sees: all, but in a plan's share of one device
    platform: str  # of the devices: cpu, gpu, tpu

    def num_shards(self, name: str) -> int:
        """In how many a dim of this name is cut."""
        ...

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """`x`, an activation whose dims have these names, pinned to the mesh."""
        ...

    def per_device(
        self, function: Callable[..., jax.Array], axes: Sequence[Axes | None], *args: jax.Array | None
    ) -> jax.Array:
        """`function(cut, *args)` with each device's pieces of `args`, for what the partitioner cannot cut by itself.

        `axes` names the dims of each argument (None for None). The result has the dims of the first argument and
        lies as it does. Collectives inside `function` go along the mesh axes that `cut` names.
        """
        ...

    def along_stages(self, x: jax.Array) -> jax.Array:
        """`x` [stages, ...], each part pinned to its stage; its other dims stay as they lie."""
        ...

    def vmap_stages(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(constrain, *args)` of each stage: leaves of `args` and of the result have a leading dim of stages.

        `constrain` is the mesh of one of them.
        """
        ...


class NoConstraint:
    """A single device."""

    stages = 1
    shown_stages = 1

    def __init__(self, platform: str | None = None):
        """None: that of the devices that are there."""
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
