"""Names of dims. Which mesh axes they lie on is not known here."""

from collections.abc import Callable

import jax

LOGICAL_AXES = ("batch", "length", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "layers")

Axes = tuple[str | None, ...]  # None: kept whole
# Given an activation and the names of its dims, pins it to the mesh; the trainer knows how.
Constrain = Callable[[jax.Array, Axes], jax.Array]


def no_constraint(x: jax.Array, axes: Axes) -> jax.Array:
    """For a single device."""
    return x
