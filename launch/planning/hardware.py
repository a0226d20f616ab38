"""Accelerator specifications for planning: compute, memory, interconnect, power and price per JAX device.

Figures come from vendors' data sheets (dense bf16). Prices are rounded on-demand list prices of large clouds; override
them with `task.price_per_device_hour=DOLLARS`. The host link is PCI Express of the device's generation, one direction;
it is unpublished for TPUs, where 16 GB/s is assumed.
"""

import math
import re
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import jax

from trainer.metrics import published_peak

GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """One kind of device and its interconnect."""

    name: str
    kind: str  # substring of JAX's `device_kind`; the longest match wins
    memory: float  # bytes available to programs
    memory_bandwidth: float  # bytes/s
    intra_node: float  # send bandwidth per device within its node or slice, all links, in bytes/s
    inter_node: float  # send bandwidth per device beyond its node or slice, in bytes/s
    node: int  # devices connected by the fast links: of a host, or of the largest slice
    watts: float  # power per device under load, including its share of the host
    price: float  # dollars per device-hour
    platform: str  # cuda, tpu, cpu
    host: float = 16 * GB  # bandwidth between device and host memory, in bytes/s
    devices_per_chip: int = 1  # JAX devices per chip, for names that count chips

    @property
    def flops(self) -> float:
        """Dense bf16 FLOP/s."""
        return published_peak(self.kind) or CPU_FLOPS


CPU_FLOPS = 2e11  # assumed FLOP/s of a few cores

HARDWARE = {
    h.name: h
    for h in (
        Hardware("a100", "A100", 80 * GB, 2.0e12, 300 * GB, 25 * GB, 8, 700, 3.0, "cuda", 32 * GB),
        Hardware("h100", "H100", 80 * GB, 3.35e12, 450 * GB, 50 * GB, 8, 1100, 6.0, "cuda", 64 * GB),
        Hardware("h200", "H200", 141 * GB, 4.8e12, 450 * GB, 50 * GB, 8, 1100, 7.0, "cuda", 64 * GB),
        Hardware("b200", "B200", 180 * GB, 8.0e12, 900 * GB, 50 * GB, 8, 1600, 11.0, "cuda", 64 * GB),
        Hardware("l4", "L4", 24 * GB, 3.0e11, 32 * GB, 12 * GB, 8, 120, 0.7, "cuda", 32 * GB),
        Hardware("v4", "TPU v4", 32 * GB, 1.2e12, 270 * GB, 6 * GB, 4096, 350, 3.2, "tpu"),
        Hardware("v5e", "TPU v5 lite", 16 * GB, 8.1e11, 180 * GB, 6 * GB, 256, 250, 1.2, "tpu"),
        Hardware("v5p", "TPU v5", 95 * GB, 2.77e12, 540 * GB, 6 * GB, 8960, 550, 4.2, "tpu"),
        Hardware("v6e", "TPU v6 lite", 32 * GB, 1.64e12, 360 * GB, 12 * GB, 256, 400, 2.7, "tpu"),
        Hardware("tpu7x", "TPU7x", 96 * GB, 3.7e12, 600 * GB, 12 * GB, 9216, 600, 6.0, "tpu", devices_per_chip=2),
        Hardware("cpu", "cpu", 16 * GB, 4e10, 1e10, 1e9, 1024, 100, 0.1, "cpu", 10 * GB),
    )
}
ALIASES = {"v5litepod": "v5e", "v6": "v6e", "v5lite": "v5e", "v7x": "tpu7x"}
# Kinds whose public names count TensorCores, two per chip.
CORES = {"v4", "v5p"}


@dataclass(frozen=True)
class Target:
    """A number of devices of one kind."""

    hardware: Hardware
    num_devices: int
    num_slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.hardware.name} x {self.num_devices}"


def parse_target(text: str, devices: int | None = None) -> Target:
    """Parses `v5p-512`, `h100x64`, `v6e-256`, `4*v5e-256` (slices) or `cpu`.

    The number of a TPU is that of its public name: cores for `v4` and `v5p`, chips otherwise. `cpu` uses `devices`.
    Raises: ValueError for unknown hardware or an invalid number of devices.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z]+[a-z0-9]*?)(?:[-x:](\d+))?", text.strip().lower())
    name = ALIASES.get(match.group(2), match.group(2)) if match else ""
    if match is None or name not in HARDWARE:
        raise ValueError(
            f"target={text}: no such hardware; use KIND-COUNT, such as v5p-512, v6e-256 or h100x64, or cpu; kinds: "
            f"{', '.join(HARDWARE)}"
        )
    hardware = HARDWARE[name]
    slices, count = int(match.group(1) or 1), int(match.group(3) or devices or 1)
    if name in CORES and match.group(3):
        if count % 2:
            raise ValueError(
                f"target={text}: the number of {name} counts TensorCores, two per chip, and must be even; use "
                f"{name}-{count + 1}"
            )
        count //= 2
    count *= hardware.devices_per_chip
    if count < 1:
        raise ValueError(f"target={text}: must have at least one device")
    if hardware.platform == "tpu" and count > hardware.node:
        raise ValueError(
            f"target={text}: a slice of {name} has at most {hardware.node} devices; use several slices: 2*{name}-..."
        )
    return Target(hardware, count * slices, slices)


def hardware_for(device_kind: str) -> Hardware:
    """Returns the hardware for JAX's `device_kind`. Raises: ValueError if it is unknown."""
    known = [h for h in HARDWARE.values() if h.kind.lower() in device_kind.lower()]
    if not known:
        raise ValueError(f"mesh=auto: unknown device kind {device_kind!r}; set mesh.fsdp and the other axes explicitly")
    return max(known, key=lambda h: len(h.kind))


def local_target() -> Target:
    """Returns the devices of this job as a target. Raises: ValueError if their kind is unknown."""
    device = jax.devices()[0]
    hardware = hardware_for(device.device_kind)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        hardware = replace(hardware, memory=float(limit))
    slices = {getattr(d, "slice_index", 0) for d in jax.devices()}
    return Target(hardware, jax.device_count(), len(slices))


def topology_shape(hardware: Hardware, count: int) -> tuple[int, ...]:
    """Returns the chip topology of one slice, as close to a square or cube as possible.

    Each side is 1, 2 or a multiple of 4. Raises: ValueError if no such slice exists.
    """
    chips = count // hardware.devices_per_chip
    dims = 3 if hardware.name in ("v4", "v5p", "tpu7x") else 2
    sides = [s for s in range(1, chips + 1) if chips % s == 0 and (s in (1, 2) or s % 4 == 0)]
    shapes = [shape for shape in combinations_with_replacement(sides, dims) if math.prod(shape) == chips]
    if not shapes:
        raise ValueError(
            f"target: no slice of {hardware.name} has {count} devices; use a power of 2 or a multiple of 64"
        )
    best = min(shapes, key=lambda shape: max(shape) / min(shape))
    return tuple(sorted(best, key=lambda side: (side == 1, side)))  # 2x2x1, but 4x4x8
