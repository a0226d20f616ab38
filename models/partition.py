"""Names of dims. Which mesh axes they lie on is not known here."""

from collections.abc import Callable, Mapping, Sequence
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


class Constrain(Protocol):
    """The mesh as a model sees it; the trainer knows how."""

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


class NoConstraint:
    """A single device."""

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        return x

    def per_device(self, function: Callable[..., jax.Array], axes: Any, *args: Any) -> jax.Array:
        return function({}, *args)


no_constraint = NoConstraint()
