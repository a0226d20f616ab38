"""Silent data corruption (SDC) checks: compares replicas, and the results of a repeated train step, bit for bit.

Hochschild et al. 2021, Cores that don't count; Dixit et al. 2021 (2102.11245). Llama 3 training was interrupted by it
(2407.21783, section 3.3.4).
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

NAMED = 3  # maximum number of parameters named in a message


@dataclass
class SDCCheckConfig:
    """Silent data corruption checks."""

    # optimizer steps between checks, each of which costs two extra steps; 0 disables them
    every: int = field(default=0, metadata={"min": 0})


class SilentDataCorruption(Exception):
    """Raised when the check before step `step` fails. The last check that passed was before step `sound`."""

    def __init__(self, step: int, sound: int, why: str) -> None:
        super().__init__(why)
        self.step, self.sound = step, sound


def shard_digests(tree: Any, specs: Any, mesh: Mesh) -> jax.Array:
    """Returns the digest of each device's shard of each leaf: [devices in mesh order, leaves] u32.

    Any single changed element changes the digest. Call it under jit. `specs`: `PartitionSpec` of each leaf.
    """
    axes = tuple(mesh.axis_names)

    def local(*shards: jax.Array) -> jax.Array:
        return jnp.stack([_digest(shard) for shard in shards])[None]

    # check_vma=False: replicas must not be assumed equal, because that is what the check verifies.
    run = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(jax.tree.leaves(specs, is_leaf=_is_spec)), out_specs=PartitionSpec(axes),
        check_vma=False,
    )  # fmt: skip
    return run(*jax.tree.leaves(on_device(jax.tree.map(key_data, tree))))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _digest(x: jax.Array) -> jax.Array:
    """Returns the sum modulo 2^32 of the bits of all elements, each times an odd number that depends on its index."""
    bits = x.astype(jnp.uint32)
    if not jnp.issubdtype(x.dtype, jnp.integer) and x.dtype != jnp.bool_:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= x.shape[dim]
    return jnp.sum(bits * (index * jnp.uint32(0x9E3779B8) + jnp.uint32(0x7F4A7C15)), dtype=jnp.uint32)


class SDCChecker:
    """Checks the train steps of a run for silent data corruption. Every process must guard the same steps."""

    def __init__(
        self, config: SDCCheckConfig, train_step: Callable[..., tuple[TrainState, Metrics]], state: TrainState
    ):
        """`config.every` must be above 0. `train_step`: from `make_train_step`. `state`: abstract, with shardings."""
        self._every = config.every
        leaves = leaf_paths(state)
        self._names = list(leaves)
        mesh = leaves[self._names[0]].sharding.mesh
        self._devices = list(mesh.devices.flat)
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
        self._groups = {name: _replicas(leaf.sharding, leaf.shape) for name, leaf in leaves.items()}
        self._of_state = jax.jit(partial(shard_digests, specs=specs, mesh=mesh))
        plain = getattr(train_step, "__wrapped__", train_step)  # not jitted: options come from the outer jit
        options = compiler_options(self._devices[0].platform, len(self._devices))
        self._of_step = jax.jit(lambda *step: shard_digests(plain(*step)[0], specs, mesh), compiler_options=options)

    def guard(self, train_step: TrainStep, first_step: int) -> TrainStep:
        """Wraps `train_step` with a check before every `config.every`-th step."""
        step, sound = first_step, first_step

        def guarded(state: TrainState, frozen: Mapping[str, Any], batch: Batch, *limits: Any) -> Any:
            nonlocal step, sound
            step += 1
            if step % self._every == 0:
                problem = self.differing_replicas(state) or self.differing_repeats(state, frozen, batch, *limits)
                if problem:
                    raise SilentDataCorruption(step, sound, problem)
                sound = step
            return train_step(state, frozen, batch, *limits)

        return guarded

    def differing_replicas(self, state: TrainState) -> str:
        """Names the devices whose replica of a parameter differs from the others; empty if none."""
        digests = on_host(self._of_state(state))
        wrong: dict[str, list[str]] = defaultdict(list)
        for column, name in zip(digests.T, self._names, strict=True):
            for group in self._groups[name]:
                for device in minority_indices(column[group]):
                    wrong[self._device_name(group[device])].append(name)
        return "; ".join(
            f"the replica of {_abbreviate(names)} on {device} differs from the others"
            for device, names in wrong.items()
        )

    def differing_repeats(self, *step: Any) -> str:
        """Names the devices whose result changes when the same step is repeated; empty if none."""
        first, second = on_host(self._of_step(*step)), on_host(self._of_step(*step))
        return "; ".join(
            f"{self._device_name(device)} gave different bits for "
            f"{_abbreviate([self._names[i] for i in np.flatnonzero(differs)])} when the same step was repeated"
            for device, differs in enumerate(first != second)
            if differs.any()
        )

    def _device_name(self, index: int) -> str:
        device = self._devices[index]
        return f"device {device.id} of process {device.process_index}"


def _replicas(sharding: NamedSharding, shape: tuple[int, ...]) -> list[list[int]]:
    """Returns groups of device indices (in mesh order) that hold the same shard."""
    mesh_index = {device: i for i, device in enumerate(np.asarray(sharding.mesh.devices).flat)}
    groups: dict[str, list[int]] = defaultdict(list)
    for device, index in sharding.devices_indices_map(shape).items():
        groups[str(index)].append(mesh_index[device])
    return [sorted(group) for group in groups.values() if len(group) > 1]


def minority_indices(values: np.ndarray) -> list[int]:
    """Returns the indices of values that differ from the majority; all indices if there is no majority."""
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) == 1:
        return []
    if 2 * counts.max() <= len(values):
        return list(range(len(values)))
    return np.flatnonzero(values != kinds[counts.argmax()]).tolist()


def _abbreviate(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
