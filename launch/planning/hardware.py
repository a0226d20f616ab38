"""Accelerators as a plan sees them: how fast they compute, remember and speak to each other, and what they cost.

Figures are those of the vendors' data sheets, dense bf16, for what JAX calls one device. Prices are list prices on
demand of large clouds, rounded, and only a beginning: `task.price_per_device_hour=DOLLARS` sets one's own. Between a device and the
memory of its host: PCI Express of its generation, one way; makers of TPUs say nothing of it, and 16 GB/s are taken.
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
    """One kind of device and what lies between several of them."""

    name: str
    kind: str  # a part of what JAX calls it; the longest that fits wins
    memory: float  # bytes that programs may use
    memory_bandwidth: float  # bytes a second
    inside: float  # bytes a second of one device, sent to those of its node or slice, all links together
    outside: float  # bytes a second of one device, sent beyond them
    node: int  # devices that lie within the fast links: of a host, or of the largest slice
    watts: float  # of a device with its share of the host, under load
    price: float  # dollars an hour of one device
    platform: str  # cuda, tpu, cpu
    host: float = 16 * GB  # bytes a second between a device and the memory of its host
    devices_per_chip: int = 1  # of a name that counts chips

    @property
    def flops(self) -> float:
        """Dense bf16 FLOP/s."""
        return published_peak(self.kind) or CPU_FLOPS


CPU_FLOPS = 2e11  # of a few cores, where nothing was measured

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
# Names that count TensorCores, of which a chip has two.
CORES = {"v4", "v5p"}


@dataclass(frozen=True)
class Target:
    """So many devices of a kind."""

    hardware: Hardware
    num_devices: int
    num_slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.hardware.name} x {self.num_devices}"


def parse_target(text: str, devices: int | None = None) -> Target:
    """`v5p-512`, `h100x64`, `v6e-256`, `4*v5e-256` (slices), `cpu`.

    A TPU's number is that of its public name: of cores (`v4`, `v5p`), of chips otherwise. `cpu` takes `devices`.
    Raises: ValueError where the hardware is not known.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z]+[a-z0-9]*?)(?:[-x:](\d+))?", text.strip().lower())
    name = ALIASES.get(match.group(2), match.group(2)) if match else ""
    if match is None or name not in HARDWARE:
        raise ValueError(
            f"target={text}: no such hardware; give KIND-COUNT as v5p-512, v6e-256, h100x64, or cpu; kinds: "
            f"{', '.join(HARDWARE)}"
        )
    hardware = HARDWARE[name]
    slices, count = int(match.group(1) or 1), int(match.group(3) or devices or 1)
    if name in CORES and match.group(3):
        if count % 2:
            raise ValueError(
                f"target={text}: the number of {name} counts TensorCores, two a chip; give {name}-{count + 1}"
            )
        count //= 2
    count *= hardware.devices_per_chip
    if count < 1:
        raise ValueError(f"target={text}: at least one device")
    if hardware.platform == "tpu" and count > hardware.node:
        raise ValueError(
            f"target={text}: a slice of {name} has at most {hardware.node} devices; give several, as 2*{name}-..."
        )
    return Target(hardware, count * slices, slices)


def of_kind(device_kind: str) -> Hardware:
    """What JAX calls so. Raises: ValueError where nothing is known of it."""
    known = [h for h in HARDWARE.values() if h.kind.lower() in device_kind.lower()]
    if not known:
        raise ValueError(f"mesh=auto: nothing is known of {device_kind}; give mesh.fsdp and its like yourself")
    return max(known, key=lambda h: len(h.kind))


def present() -> Target:
    """The devices of this job. Raises: ValueError where nothing is known of their kind."""
    device = jax.devices()[0]
    hardware = of_kind(device.device_kind)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        hardware = replace(hardware, memory=float(limit))
    slices = {getattr(d, "slice_index", 0) for d in jax.devices()}
    return Target(hardware, jax.device_count(), len(slices))


def topology_shape(hardware: Hardware, count: int) -> tuple[int, ...]:
    """How the chips of one slice are wired: as near to a square or a cube as there is, each side a power of two or a
    multiple of 4. Raises: ValueError where there is no such slice.
    """
    chips = count // hardware.devices_per_chip
    dims = 3 if hardware.name in ("v4", "v5p", "tpu7x") else 2
    sides = [s for s in range(1, chips + 1) if chips % s == 0 and (s in (1, 2) or s % 4 == 0)]
    shapes = [shape for shape in combinations_with_replacement(sides, dims) if math.prod(shape) == chips]
    if not shapes:
        raise ValueError(
            f"target: {count} devices of {hardware.name} make no slice; give a product of 2s, or a multiple of 64"
        )
    best = min(shapes, key=lambda shape: max(shape) / min(shape))
    return tuple(sorted(best, key=lambda side: (side == 1, side)))  # 2x2x1, but 4x4x8
