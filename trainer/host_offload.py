"""What lies in the memory of the host between its uses (ZeRO-Offload, Ren et al. 2021 [2101.06840], without its CPU
update: the devices still compute it).
"""

from typing import Any

import jax
from jax.sharding import NamedSharding

HOST = "pinned_host"


def in_host_memory(shapes: Any, shardings: Any) -> Any:
    """The same shardings, of arrays in the host's memory; numbers stay where they are."""

    def moved(leaf: Any, sharding: NamedSharding) -> NamedSharding:
        return sharding.with_memory_kind(HOST) if leaf.ndim else sharding

    return jax.tree.map(moved, shapes, shardings)


def on_device(tree: Any) -> Any:
    """What of `tree` lies in the host's memory comes to the devices; in a compiled program or outside."""
    is_away = lambda x: jax.typeof(x).memory_space == jax.memory.Space.Host
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if is_away(x) else x, tree)
