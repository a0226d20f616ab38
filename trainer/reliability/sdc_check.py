"""Devices that compute wrong without a word: replicas that differ, and a step that gives other bits when repeated.

Silent data corruption: Hochschild et al. 2021, Cores that don't count; Dixit et al. 2021 (2102.11245). Llama 3
(2407.21783), section 3.3.4, lost runs to it.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.checkpoint.checksums import key_data, leaf_paths, on_host
from trainer.host_offload import on_device
from trainer.objective import Batch
from trainer.state import TrainState
from trainer.step import Metrics, TrainStep
from trainer.xla_options import compiler_options

NAMED = 3  # parameters that a message names


@dataclass
class SDCCheckConfig:
    """Whether devices are checked for wrong results."""

    every: int = field(default=0, metadata={"min": 0})  # steps between checks, of the time of two steps each; 0: never


class SilentDataCorruption(Exception):
    """A check has failed before step `step`; the last that had not was before step `sound`."""

    def __init__(self, step: int, sound: int, why: str) -> None:
        super().__init__(why)
        self.step, self.sound = step, sound


def shard_digests(tree: Any, specs: Any, mesh: Mesh) -> jax.Array:
    """A digest of each device's own piece of each leaf [devices in the order of the mesh, leaves] u32.

    One changed element always changes it. To be compiled; `specs`: how the leaves lie on the mesh.
    """
    axes = tuple(mesh.axis_names)

    def local(*pieces: jax.Array) -> jax.Array:
        return jnp.stack([_digest(piece) for piece in pieces])[None]

    # Unchecked: what is equal on all devices by right is what is asked about.
    run = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(jax.tree.leaves(specs, is_leaf=_is_spec)), out_specs=PartitionSpec(axes),
        check_vma=False,
    )  # fmt: skip
    return run(*jax.tree.leaves(on_device(jax.tree.map(key_data, tree))))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _digest(x: jax.Array) -> jax.Array:
    """Sum of all elements' bits, each times an odd number of its own, modulo 2^32."""
    bits = x.astype(jnp.uint32)
    if not jnp.issubdtype(x.dtype, jnp.integer) and x.dtype != jnp.bool_:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= x.shape[dim]
    return jnp.sum(bits * (place * jnp.uint32(0x9E3779B8) + jnp.uint32(0x7F4A7C15)), dtype=jnp.uint32)


class IntegrityWatch:
    """Checks a run of one state layout. Every process makes one and guards the same steps."""

    def __init__(
        self, config: SDCCheckConfig, train_step: Callable[..., tuple[TrainState, Metrics]], state: TrainState
    ):
        """`config.every` above 0; `train_step` with limits, as `make_train_step` makes it; `state`: abstract, with
        shardings.
        """
        self._every = config.every
        leaves = leaf_paths(state)
        self._names = list(leaves)
        mesh = leaves[self._names[0]].sharding.mesh
        self._devices = list(mesh.devices.flat)
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
        self._groups = {name: _replicas(leaf.sharding, leaf.shape) for name, leaf in leaves.items()}
        self._of_state = jax.jit(partial(shard_digests, specs=specs, mesh=mesh))
        plain = getattr(train_step, "__wrapped__", train_step)  # the compiler is told by the outer program
        options = compiler_options(self._devices[0].platform, len(self._devices))
        self._of_step = jax.jit(lambda *step: shard_digests(plain(*step)[0], specs, mesh), compiler_options=options)

    def guard(self, train_step: TrainStep, first_step: int) -> TrainStep:
        """`train_step`, checked before each update that makes a step which is due."""
        step, sound = first_step, first_step

        def guarded(state: TrainState, frozen: Mapping[str, Any], batch: Batch, *limits: Any) -> Any:
            nonlocal step, sound
            step += 1
            if step % self._every == 0:
                why = self.differing_replicas(state) or self.differing_repeats(state, frozen, batch, *limits)
                if why:
                    raise SilentDataCorruption(step, sound, why)
                sound = step
            return train_step(state, frozen, batch, *limits)

        return guarded

    def differing_replicas(self, state: TrainState) -> str:
        """Which devices hold another copy of what should be the same; empty where none does."""
        digests = on_host(self._of_state(state))
        wrong: dict[str, list[str]] = defaultdict(list)
        for column, name in zip(digests.T, self._names, strict=True):
            for group in self._groups[name]:
                for device in minority_indices(column[group]):
                    wrong[self._told(group[device])].append(name)
        return "; ".join(
            f"{device} holds another copy of {_some(names)} than others" for device, names in wrong.items()
        )

    def differing_repeats(self, *step: Any) -> str:
        """Which devices come to another state when the same step is done again; empty where none does."""
        first, second = on_host(self._of_step(*step)), on_host(self._of_step(*step))
        return "; ".join(
            f"{self._told(device)} gave other bits for {_some([self._names[i] for i in np.flatnonzero(differs)])} when "
            "the same step was repeated"
            for device, differs in enumerate(first != second)
            if differs.any()
        )

    def _told(self, index: int) -> str:
        device = self._devices[index]
        return f"device {device.id} of process {device.process_index}"


def _replicas(sharding: NamedSharding, shape: tuple[int, ...]) -> list[list[int]]:
    """Devices, by their place in the mesh, that hold the same piece."""
    places = {device: i for i, device in enumerate(np.asarray(sharding.mesh.devices).flat)}
    groups: dict[str, list[int]] = defaultdict(list)
    for device, index in sharding.devices_indices_map(shape).items():
        groups[str(index)].append(places[device])
    return [sorted(group) for group in groups.values() if len(group) > 1]


def minority_indices(values: np.ndarray) -> list[int]:
    """Indices of those that differ from the majority; all, where there is none."""
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) == 1:
        return []
    if 2 * counts.max() <= len(values):
        return list(range(len(values)))
    return np.flatnonzero(values != kinds[counts.argmax()]).tolist()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
