"""The device mesh and the sizes of its axes.

Logical axes of tensors are mapped to mesh axes in `trainer/sharding.py`. Here, *axis* refers to the mesh and *dim* to a
tensor.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")  # devices along the last axis have the fastest links


@dataclass
class MeshConfig:
    """Number of devices along each mesh axis. One of them may be -1: all remaining devices."""

    data: int = -1  # data parallelism: replicates parameters, shards the batch
    fsdp: int = 1  # fully sharded data parallelism: shards the batch and the parameters
    tensor: int = 1  # tensor parallelism: shards heads, MLP and vocabulary
    expert: int = 1  # expert parallelism: shards the batch and the experts
    context: int = 1  # context parallelism: shards the sequence length
    stage: int = 1  # pipeline parallelism: number of stages; see model.pipeline
    auto: bool = False  # choose all axis sizes automatically for the available devices


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh over all `devices` (default: all devices of all processes); `tensor` uses the fastest links.

    The slow network between slices or nodes is assigned to the first axes: with `data=2 fsdp=8` on two slices of eight
    devices, parameters are gathered within each slice and only gradients cross between them.
    Raises: ValueError naming the key if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    kinds = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        outer = dcn_shape(sizes, slices)
        inner = [size // dcn_size for size, dcn_size in zip(sizes, outer, strict=True)]
        split = {"allow_split_physical_axes": True}
        return Mesh(mesh_utils.create_hybrid_device_mesh(inner, outer, list(devices), **split), AXES, axis_types=kinds)
    try:
        return jax.make_mesh(sizes, AXES, devices=devices, axis_types=kinds)
    except NotImplementedError:  # an axis does not match the physical TPU torus: split physical axes
        device_array = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
        return Mesh(device_array, AXES, axis_types=kinds)


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """Formats mesh sizes as `fsdp 4 x tensor 2`, or `one device`."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def dcn_shape(sizes: Sequence[int], slices: int) -> list[int]:
    """Returns the factor of each mesh axis that spans slices (data-center network), assigned to the first axes."""
    outer = []
    for size in sizes:
        outer.append(math.gcd(size, slices))
        slices //= outer[-1]
    return outer


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """Returns the mesh of `make_mesh` without devices, for shapes and shardings."""
    return AbstractMesh(mesh_sizes(config, num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the number of devices along each of `AXES`. Raises: ValueError as `make_mesh`."""
    requested = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in requested.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis}={size}: must be at least 1, or -1 for all remaining devices")
    open_axes = [axis for axis, size in requested.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f"mesh.{open_axes[1]}=-1: mesh.{open_axes[0]} is -1 already, and takes all remaining devices; "
            f"set mesh.{open_axes[1]}=1"
        )
    fixed = math.prod(size for size in requested.values() if size != -1)
    if num_devices % fixed == 0 and (open_axes or fixed == num_devices):
        return tuple(num_devices // fixed if size == -1 else size for size in requested.values())

    def distance(sizes: tuple[int, ...]) -> float:
        return sum(abs(math.log(s / r)) for s, r in zip(sizes, requested.values(), strict=True) if r != -1)

    candidates = itertools.product(divisors(num_devices), repeat=len(AXES))
    valid = sorted((c for c in candidates if math.prod(c) == num_devices), key=distance)[:3]
    fixed_axes = [axis for axis in AXES if requested[axis] != -1]
    worst = max(fixed_axes, key=lambda axis: (num_devices % requested[axis] != 0, requested[axis]))
    product = "*".join(f"{axis}({requested[axis]})" for axis in fixed_axes)
    relation = "divide" if open_axes else "equal"
    nearest = "; ".join(" ".join(f"mesh.{a}={s}" for a, s in zip(AXES, v, strict=True)) for v in valid)
    raise ValueError(
        f"mesh.{worst}={requested[worst]}: {product} = {fixed} must {relation} the {num_devices} devices; "
        f"nearest valid: {nearest}"
    )


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
