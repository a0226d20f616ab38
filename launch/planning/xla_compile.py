"""A plan by the compiler: the training step compiled for devices that are not there, and what XLA says of it."""

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
    """Those of one kind along one axis, in one step."""

    axes: str  # of the mesh, joined by +; "?": none that fit
    kind: str
    count: int  # with the turns of the loops around them
    bytes: float  # of their results on one device, all together
    hidden: int  # how many of them begin before they are waited for


@dataclass(frozen=True)
class Compiled:
    """What XLA says, of one device."""

    seconds: float  # to compile
    argument_bytes: float
    temporary_bytes: float
    peak_bytes: float  # of arguments, results and temporaries at once
    collectives: list[Collective] | None  # None: it does not fit, and there is no program


def compile_step(config: RunConfig, target: Target) -> Compiled:
    """Raises: ValueError where the plugin for the target is not installed."""
    mesh = make_mesh(config.mesh, target_devices(target))
    if config.optimizer.offload_state and target.hardware.platform == "cuda":  # it would be told what takes no offload
        raise ValueError(
            "optimizer.offload_state=true: XLA's compiler for GPUs that are not there knows no memory of a host; leave "
            "compile=true out, or give a TPU"
        )
    shapes = shapes_of(config, mesh, frozen_configs(config))
    begin = time.perf_counter()
    try:
        program = shapes.core.train_step.lower(*shapes.arguments).compile()  # type: ignore[attr-defined]
    except jax.errors.JaxRuntimeError as error:
        arguments = bytes_on_device(shapes.arguments)
        peak = memory_from_error(str(error), arguments)
        if peak is None:
            raise
        return Compiled(time.perf_counter() - begin, arguments, 0.0, peak, None)
    seconds, memory = time.perf_counter() - begin, program.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Only libtpu's peak counts all of these at the fullest moment; elsewhere temporaries are one allocation.
    peak = memory.peak_memory_in_bytes if target.hardware.platform == "tpu" else arguments + temporary + fresh
    return Compiled(
        seconds, arguments, temporary, peak, collectives(program.as_text(), _of_one_slice(dict(mesh.shape), target))
    )


def memory_from_error(error: str, arguments: float) -> float | None:
    """Bytes that a program would take of which libtpu says that it does not fit, for it compiles no such thing; None
    where `error` is another.
    """
    if "RESOURCE_EXHAUSTED" not in error:
        return None
    size = lambda found: float(found.group(1)) * 1024 ** ("KMGT".index(found.group(2)) + 1)
    if used := re.search(r"Used ([\d.]+)([KMGT]) of", error):
        return size(used)
    temporaries = re.search(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", error)
    return arguments + size(temporaries) if temporaries else None


# On machines without a TPU libtpu asks for what it finds in these; and two of them may be at work.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def disable_devices() -> None:
    """Compilers of devices that are not there look for none. Before any other use of JAX."""
    jax.config.update("jax_platforms", "cpu")
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)


def target_devices(target: Target) -> Sequence[Any]:
    """Devices of a topology that is not there. Raises: ValueError where what knows it is not installed."""
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
        raise ValueError(f"target={target.name}: the compiler has no description of it; compile=true knows {names}")
    nodes, left = divmod(count, hardware.node)
    if nodes and left:
        raise ValueError(f"target={target.name}: nodes have {hardware.node} devices; give a multiple of them")
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=hardware.name,
        target_config=known[hardware.name].read_text(),
        topology=f"1x{max(nodes, 1)}x{hardware.node if nodes else left}",
    ).devices


def _missing(target: Target, packages: str, extra: str) -> str:
    return (
        f"target={target.name}: compile=true needs {packages}, which are not installed; "
        f"pip install 'meshwright[{extra}]', or leave compile=true out"
    )


# Reading the program

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "send")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
_OP = re.compile(rf"= (\(?.*?\)?) ({'|'.join(_KINDS)})(-start)?\(")
_ALONE = re.compile(r"replica_groups=\{(?:\{\d+\},?)+\}")  # nobody speaks to another
_CALLS = re.compile(
    r"\b(body|calls|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")


def collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """Of a compiled program's text. A loop's body counts as often as the loop is known to turn."""
    bodies, entry = _computations(text)
    groups = _groups_of_axes(sizes)
    count: Counter[tuple[str, str]] = Counter()
    moved: Counter[tuple[str, str]] = Counter()
    hidden: Counter[tuple[str, str]] = Counter()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if (found := _OP.search(line)) and not _ALONE.search(line):
                key = "slices" if found.group(2) == "send" else _axes_of_groups(line, groups), found.group(2)
                count[key] += times
                moved[key] += times * _result_bytes(found.group(1), started=found.group(3) is not None)
                hidden[key] += times if found.group(3) else 0
            for role, called in _CALLS.findall(line):
                for each in re.findall(r"[\w.\-]+", called):
                    visit(each, times * _turns(line, bodies) if role == "body" else times)

    visit(entry, 1)
    return [Collective(*key, count[key], moved[key], hidden[key]) for key in sorted(count)]


def _turns(line: str, bodies: Mapping[str, Sequence[str]]) -> int:
    """Of a loop: as XLA notes it, or the one number that its condition compares with, as libtpu leaves it; else 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    ends = re.findall(r"constant\((\d+)\)", "\n".join(bodies.get(condition.group(1), ()))) if condition else []
    return int(ends[0]) if len(ends) == 1 else 1


def _of_one_slice(sizes: Mapping[str, int], target: Target) -> dict[str, int]:
    """Each slice has a program of its own; what goes between slices is sent and received."""
    outer = dcn_shape(list(sizes.values()), target.num_slices)
    return {axis: size // slow for (axis, size), slow in zip(sizes.items(), outer, strict=True)}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = head.group(2)
            bodies[name] = []
            entry = name if head.group(1) else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _result_bytes(shape: str, *, started: bool) -> float:
    """Of the result; one that is only started names its operands, too, before the results."""
    arrays = [
        math.prod(int(n) for n in dims.split(",") if n) * _SIZES.get(dtype, 4) for dtype, dims in _ARRAY.findall(shape)
    ]
    return float(sum(arrays[len(arrays) // 2 :] if started and len(arrays) > 1 else arrays))


def _groups_of_axes(sizes: Mapping[str, int]) -> dict[frozenset[frozenset[int]], str]:
    """Which devices speak to each other in a collective along each set of axes; the smallest set wins."""
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
        talking = [set(map(int, pair.split(","))) for pair in re.findall(r"\{?(\d+,\d+)\}?", pairs.group(1))]
        fitting = [name for key, name in groups.items() if all(any(p <= g for g in key) for p in talking)]
        return fitting[0] if fitting else "?"
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        rows = [frozenset(map(int, row.split(","))) for row in re.findall(r"\{([\d,]+)\}", listed.group(1))]
        return groups.get(frozenset(rows), "?")
    if dealt := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = _iota(dealt.group(3), dealt.group(4))
        return _named(ids.reshape(int(dealt.group(1)), int(dealt.group(2))), groups)
    if meant := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? ?\{([^}]*)\}", line
    ):
        rows = _rows_of_mesh(meant.group(1), meant.group(4))
        return _named(_iota(meant.group(2), meant.group(3)).reshape(-1)[rows] if meant.group(2) else rows, groups)
    return "?"


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Numbers of devices, as in `[4,2]T(1,0)`: counted in that shape, then transposed."""
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _named(rows: np.ndarray, groups: Mapping[frozenset[frozenset[int]], str]) -> str:
    return groups.get(frozenset(frozenset(row.tolist()) for row in rows), "?")


def _rows_of_mesh(axes: str, along: str) -> np.ndarray:
    """[groups, devices] of `'a'=4,'b'=2` along `'b'`, or along `'a':(2)2`: of a in 2 x 2 the second part."""
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
