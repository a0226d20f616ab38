"""Compiles the training step for absent devices (AOT) and reads memory and collectives from XLA."""

import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from configs.schema import RunConfig
from launch.planning.hardware import Target, topology_shape
from launch.planning.local_shapes import bytes_on_device, frozen_configs, shapes_of
from trainer.mesh import AXES, dcn_shape, make_mesh


class Collective(NamedTuple):
    """Collectives of one kind along the same mesh axes, in one step."""

    axes: str  # mesh axes joined by +; "?": unknown
    kind: str
    count: int  # executions, including iterations of enclosing loops
    bytes: float  # total size of the results on one device
    hidden: int  # number of asynchronous executions


@dataclass(frozen=True)
class Compiled:
    """Compilation results for one device."""

    seconds: float  # compilation time
    argument_bytes: float
    temporary_bytes: float
    peak_bytes: float  # arguments, results and temporaries
    collectives: list[Collective] | None  # None: the program does not fit into memory and was not compiled


def compile_step(config: RunConfig, target: Target) -> Compiled:
    """Compiles the training step for `target`. Raises: ValueError if the compiler plugin is not installed."""
    mesh = make_mesh(config.mesh, target_devices(target))
    if config.optimizer.offload_state and target.hardware.platform == "cuda":
        raise ValueError(
            "optimizer.offload_state=true: XLA's ahead-of-time compiler for GPUs does not support host memory; remove "
            "compile=true, or use a TPU target"
        )
    shapes = shapes_of(config, mesh, frozen_configs(config))
    start = time.perf_counter()
    try:
        program = shapes.core.train_step.lower(*shapes.arguments).compile()  # type: ignore[attr-defined]
    except jax.errors.JaxRuntimeError as error:
        arguments = bytes_on_device(shapes.arguments)
        peak = memory_from_error(str(error), arguments)
        if peak is None:
            raise
        return Compiled(time.perf_counter() - start, arguments, 0.0, peak, None)
    seconds, memory = time.perf_counter() - start, program.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Only libtpu reports the peak of all three; on other platforms temporaries are a single allocation.
    peak = memory.peak_memory_in_bytes if target.hardware.platform == "tpu" else arguments + temporary + fresh
    return Compiled(
        seconds, arguments, temporary, peak, collectives(program.as_text(), _of_one_slice(dict(mesh.shape), target))
    )


def memory_from_error(error: str, arguments: float) -> float | None:
    """Returns the required bytes from libtpu's out-of-memory compile error, or None for any other error."""
    if "RESOURCE_EXHAUSTED" not in error:
        return None
    size = lambda found: float(found.group(1)) * 1024 ** ("KMGT".index(found.group(2)) + 1)
    if used := re.search(r"Used ([\d.]+)([KMGT]) of", error):
        return size(used)
    temporaries = re.search(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", error)
    return arguments + size(temporaries) if temporaries else None


# Needed by libtpu on machines without a TPU; the last one allows concurrent processes.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def disable_devices() -> None:
    """Configures JAX to compile for absent devices. Must be called before any other use of JAX."""
    jax.config.update("jax_platforms", "cpu")
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)


def target_devices(target: Target) -> Sequence[Any]:
    """Returns the devices of the target topology. Raises: ValueError if the compiler plugin is not installed."""
    from jax.experimental import topologies

    hardware, count = target.hardware, target.num_devices
    if hardware.platform == "cpu":
        if len(jax.devices("cpu")) < count:
            raise ValueError(f"target=cpu: compiling for {count} devices needs fake_devices={count}")
        return jax.devices("cpu")[:count]
    if hardware.platform == "tpu":
        if find_spec("libtpu") is None:
            raise ValueError(_missing(target, "libtpu", "tpu"))
        shape = topology_shape(hardware, count // target.num_slices)
        options: dict[str, Any] = {} if target.num_slices == 1 else {"num_slices": target.num_slices}
        if math.prod(shape) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        name = f"{hardware.name}:{'x'.join(map(str, shape))}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda12") is None:
        raise ValueError(_missing(target, "jax-cuda12-plugin and jax-cuda12-pjrt", "plan-cuda"))
    known = {Path(file.name).stem: file for file in files("launch.planning").joinpath("gpus").iterdir()}
    if hardware.name not in known:
        names = ", ".join(sorted(known))
        raise ValueError(
            f"target={target.name}: the compiler has no description of this GPU; compile=true supports {names}"
        )
    nodes, left = divmod(count, hardware.node)
    if nodes and left:
        raise ValueError(f"target={target.name}: a node has {hardware.node} devices; use a multiple of that number")
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=hardware.name,
        target_config=known[hardware.name].read_text(),
        topology=f"1x{max(nodes, 1)}x{hardware.node if nodes else left}",
    ).devices


def _missing(target: Target, packages: str, extra: str) -> str:
    return (
        f"target={target.name}: compile=true needs {packages}, not installed; run pip install 'meshwright[{extra}]', "
        "or remove compile=true"
    )


# Parsing the compiled HLO

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "send")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
_OP = re.compile(rf"= (\(?.*?\)?) ({'|'.join(_KINDS)})(-start)?\(")
_SINGLETON = re.compile(r"replica_groups=\{(?:\{\d+\},?)+\}")  # groups of one device: no communication
_CALLS = re.compile(
    r"\b(body|calls|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")


def collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """Returns the collectives of a compiled program, given its HLO text. Loop bodies count once per iteration."""
    computations, entry = _computations(text)
    groups = _groups_of_axes(sizes)
    count: Counter[tuple[str, str]] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    hidden: Counter[tuple[str, str]] = Counter()

    def visit(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            if (found := _OP.search(line)) and not _SINGLETON.search(line):
                key = "slices" if found.group(2) == "send" else _axes_of_groups(line, groups), found.group(2)
                count[key] += times
                moved[key] += times * _result_bytes(found.group(1), started=found.group(3) is not None)
                hidden[key] += times if found.group(3) else 0
            for role, called in _CALLS.findall(line):
                for each in re.findall(r"[\w.\-]+", called):
                    visit(each, times * _hlo_trip_count(line, computations) if role == "body" else times)

    visit(entry, 1)
    return [Collective(*key, count[key], moved[key], hidden[key]) for key in sorted(count)]


def _hlo_trip_count(line: str, computations: Mapping[str, Sequence[str]]) -> int:
    """Returns the iterations of a loop from XLA's known_trip_count, or the only constant of its condition, or 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    ends = re.findall(r"constant\((\d+)\)", "\n".join(computations.get(condition.group(1), ()))) if condition else []
    return int(ends[0]) if len(ends) == 1 else 1


def _of_one_slice(sizes: Mapping[str, int], target: Target) -> dict[str, int]:
    """Returns the mesh sizes within one slice. Each slice has a separate program; slices communicate by send/recv."""
    outer = dcn_shape(list(sizes.values()), target.num_slices)
    return {axis: size // slow for (axis, size), slow in zip(sizes.items(), outer, strict=True)}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = head.group(2)
            computations[name] = []
            entry = name if head.group(1) else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _result_bytes(shape: str, *, started: bool) -> float:
    """Returns the size of a result. An async start op (`started`) lists its operands before the results."""
    arrays = [
        math.prod(int(n) for n in dims.split(",") if n) * _SIZES.get(dtype, 4) for dtype, dims in _ARRAY.findall(shape)
    ]
    return float(sum(arrays[len(arrays) // 2 :] if started and len(arrays) > 1 else arrays))


def _groups_of_axes(sizes: Mapping[str, int]) -> dict[frozenset[frozenset[int]], str]:
    """Maps the device groups of collectives to mesh axes; for equal groups, the smallest set of axes wins."""
    axes = [axis for axis in AXES if sizes[axis] > 1]
    ids = np.arange(math.prod(sizes[axis] for axis in axes)).reshape([sizes[axis] for axis in axes] or [1])
    found: dict[frozenset[frozenset[int]], str] = {}
    for size in range(1, len(axes) + 1):
        for chosen in combinations(range(len(axes)), size):
            moved = np.moveaxis(ids, chosen, range(-size, 0)).reshape(-1, math.prod(ids.shape[i] for i in chosen))
            key = frozenset(frozenset(row.tolist()) for row in moved)
            found.setdefault(key, "+".join(axes[i] for i in chosen))
    return found


def _axes_of_groups(line: str, groups: Mapping[frozenset[frozenset[int]], str]) -> str:
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        peers = [set(map(int, pair.split(","))) for pair in re.findall(r"\{?(\d+,\d+)\}?", pairs.group(1))]
        matching = [name for key, name in groups.items() if all(any(p <= g for g in key) for p in peers)]
        return matching[0] if matching else "?"
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        rows = [frozenset(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)\}", listed.group(1))]
        return groups.get(frozenset(rows), "?")
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = _iota(iota.group(3), iota.group(4))
        return _axes_of_rows(ids.reshape(int(iota.group(1)), int(iota.group(2))), groups)
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? ?\{([^}]*)\}", line
    ):
        rows = _rows_of_mesh(named.group(1), named.group(4))
        ids = _iota(named.group(2), named.group(3)).reshape(-1)[rows] if named.group(2) else rows
        return _axes_of_rows(ids, groups)
    return "?"


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Returns device IDs of HLO's iota notation, as `[4,2]T(1,0)`: arange in that shape, then transposed."""
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _axes_of_rows(rows: np.ndarray, groups: Mapping[frozenset[frozenset[int]], str]) -> str:
    return groups.get(frozenset(frozenset(row.tolist()) for row in rows), "?")


def _rows_of_mesh(axes: str, along: str) -> np.ndarray:
    """Returns device IDs [groups, devices] of the mesh `'a'=4,'b'=2` along `'b'`, or along the sub-axis `'a':(2)2`.

    The sub-axis is the second factor of axis a, viewed as 2 x 2.
    """
    parts = {name: tuple(map(int, part)) for name, *part in re.findall(r"'([^']+)':\((\d+)\)(\d+)", along)}
    shape: list[int] = []
    chosen = []
    for name, size in re.findall(r"'([^']+)'=(\d+)", axes):
        before, own = parts.get(name, (1, int(size)))
        if f"'{name}'" in along:
            chosen.append(len(shape) + 1)
        shape += [before, own, int(size) // before // own]
    ids = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), chosen, range(-len(chosen), 0))
    return ids.reshape(-1, math.prod(shape[i] for i in chosen))
