"""Offloads arrays to pinned host memory between uses.

As ZeRO-Offload (Ren et al. 2021 [2101.06840]), but the devices, not the CPU, compute the update.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding

HOST = "pinned_host"


def in_host_memory(shapes: Any, shardings: Any) -> Any:
    """Returns the same shardings with host memory kind; scalars stay on the device."""

    def to_host(leaf: Any, sharding: NamedSharding) -> NamedSharding:
        return sharding.with_memory_kind(HOST) if leaf.ndim else sharding

    return jax.tree.map(to_host, shapes, shardings)


def on_device(tree: Any) -> Any:
    """Moves the leaves in host memory to the devices. Works inside and outside of jit."""
    on_host = lambda x: jax.typeof(x).memory_space == jax.memory.Space.Host
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if on_host(x) else x, tree)
