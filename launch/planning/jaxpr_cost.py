"""Estimates peak memory, FLOPs and memory traffic of a program from its jaxpr, without compiling it.

The program is walked once in order. A value is live from the step that produces it to its last reader. Elementwise
steps, casts, broadcasts and transposes are fused into their consumer and need no buffer, unless the consumer is a
matmul, a loop or the program output. A loop holds its carries and stacked outputs; its body is walked once.

`docs/plan.md` compares the estimates with XLA's allocations.
"""

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Primitives that read buffers and produce one.
BUFFERED = frozenset(
    {
        "dot_general", "ragged_dot_general", "ragged_dot", "scan", "while", "cond", "sort", "top_k", "scatter",
        "scatter-add", "cumsum", "cummax", "cumlogsumexp", "conv_general_dilated", "dynamic_update_slice", "eigh",
        "copy", "qr", "svd", "cholesky", "triangular_solve", "random_bits", "threefry2x32",
    }
)  # fmt: skip
REDUCING = ("reduce", "arg")  # prefixes of reductions: produce a buffer and fuse preceding elementwise steps
# Primitives that change no value, only shape or layout.
VIEWS = frozenset({"reshape", "squeeze", "expand_dims", "transpose", "stop_gradient", "optimization_barrier"})
LOOPS = ("scan", "while", "cond")
COSTLY = frozenset(
    {"exp", "exp2", "log", "log1p", "tanh", "logistic", "erf", "sin", "cos", "pow", "rsqrt", "sqrt", "gather"}
)  # not recomputed for several readers


@dataclass(frozen=True)
class Value:
    """Shape, dtype and memory space of a program variable."""

    shape: tuple[int, ...]
    dtype: Any
    on_host: bool = False  # in host memory

    @property
    def bytes(self) -> float:
        """Device memory in bytes; 0 for a value in host memory."""
        return 0.0 if self.on_host else self.size_bytes

    @property
    def size_bytes(self) -> float:
        """Size in bytes, regardless of the memory space."""
        extended = jax.dtypes.issubdtype(self.dtype, jax.dtypes.extended)
        return math.prod(self.shape) * (8 if extended else np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Rules:
    """Properties of mesh and platform that the estimate depends on."""

    sharded_bytes: Callable[[Value], float] = lambda value: value.bytes  # bytes of a value on one device
    seconds: Callable[[float, float], float] = lambda flops, moved: 0.0  # duration of a step from FLOPs and bytes
    rows_of_groups: float = 1.0  # fraction of the rows of a grouped matmul that are assigned to any group
    copies_donated: bool = False  # donated buffers are reused only at the end of the program


@dataclass(frozen=True)
class LiveBuffer:
    """A buffer that is live at peak memory."""

    value: Value
    bytes: float
    stacked: bool  # stacked output of a loop, one entry per iteration


@dataclass
class Cost:
    """Resource use of a program."""

    peak: float = 0.0  # peak bytes, without arguments and results in donated buffers
    held: list[LiveBuffer] = field(default_factory=list)  # buffers live at the peak
    flops: float = 0.0  # of matmuls: two per multiply-add
    moved: float = 0.0  # bytes read and written
    sent_away: float = 0.0  # bytes transferred to host memory
    seconds: float = 0.0

    def add(self, other: "Cost", times: float = 1) -> None:
        self.flops += times * other.flops
        self.moved += times * other.moved
        self.sent_away += times * other.sent_away
        self.seconds += times * other.seconds


@dataclass
class Step:
    """One primitive; `reads` and `makes` are indices into `Program.values`."""

    name: str
    params: dict[str, Any]
    reads: list[int]
    makes: list[int]

    @property
    def reduces(self) -> bool:
        return self.name.startswith(REDUCING) and self.name != "reduce_precision"

    @property
    def makes_buffers(self) -> bool:
        return self.name in BUFFERED or self.reduces


@dataclass
class Program:
    """A jaxpr with all inner calls inlined."""

    values: list[Value]
    steps: list[Step]
    inputs: list[int]
    outputs: list[int]


def jaxpr_cost(jaxpr: ClosedJaxpr, donated: Sequence[bool], rules: Rules = Rules()) -> Cost:
    """Returns the cost of a program. `donated`: per argument, whether a matching result may reuse its buffer."""
    program = _inline_calls(jaxpr.jaxpr)
    arguments = program.inputs[len(jaxpr.jaxpr.constvars) :]
    free = [program.values[i] for i, is_donated in zip(arguments, donated, strict=True) if is_donated]
    in_place = set()
    for i in program.outputs:
        if program.values[i] in free:
            free.remove(program.values[i])
            in_place.add(i)
    return _walk(program, rules, in_place=set() if rules.copies_donated else in_place)


def _inline_calls(jaxpr: Jaxpr) -> Program:
    program = Program([], [], [], [])

    def new(aval: Any) -> int:
        on_host = getattr(aval, "memory_space", None) == jax.memory.Space.Host
        shape, dtype = tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", np.dtype("int32"))
        program.values.append(Value(shape, dtype, on_host))
        return len(program.values) - 1

    def write(jaxpr: Jaxpr, env: dict[Any, int]) -> list[int]:
        env |= {var: new(var.aval) for var in jaxpr.constvars if var not in env}
        read = lambda atom: new(atom.aval) if isinstance(atom, Literal) else env[atom]
        for eqn in jaxpr.eqns:
            reads = [env[atom] for atom in eqn.invars if not isinstance(atom, Literal)]
            inner = None if eqn.primitive.name in BUFFERED else _callee(eqn)
            if inner is not None:
                arguments = dict(zip(inner.invars, map(read, eqn.invars), strict=True))
                env |= zip(eqn.outvars, write(inner, arguments), strict=True)
                continue
            makes = [new(var.aval) for var in eqn.outvars]
            env |= zip(eqn.outvars, makes, strict=True)
            program.steps.append(Step(eqn.primitive.name, eqn.params, reads, makes))
        return [read(atom) for atom in jaxpr.outvars]

    program.inputs = [new(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)]
    program.outputs = write(jaxpr, dict(zip((*jaxpr.constvars, *jaxpr.invars), program.inputs, strict=True)))
    return program


def _callee(eqn: Any) -> Jaxpr | None:
    """Returns the inner jaxpr of a call (jit, checkpoint, custom derivative); None for other primitives."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if inner is not None:
            return inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    return None


class _Flow:
    """Decides which values of a program need a buffer, and from which buffers a fused value is computed."""

    def __init__(self, program: Program, sliced: Set[int], written: Set[int]):
        """`sliced`: inputs that are slices of a stacked array. `written`: outputs written directly to their buffer."""
        self.maker = {i: step for step in program.steps for i in step.makes}
        readers: dict[int, list[Step]] = {}
        for step in program.steps:
            for i in step.reads:
                readers.setdefault(i, []).append(step)
        self.readers = readers
        self.ends = set(program.outputs) - written
        self.buffers: set[int] = {i for i in program.inputs if i not in sliced}
        self._roots: dict[int, frozenset[int]] = {}
        costly: dict[int, bool] = {}
        for i in sliced:
            if self._has_buffered_reader(i):
                self.buffers.add(i)
        for step in program.steps:
            for i in step.makes:
                costs = step.name in COSTLY or any(costly.get(j, False) for j in step.reads if j not in self.buffers)
                costly[i] = costs
                if step.makes_buffers or (step.name not in VIEWS and self._is_needed(i, costs)):
                    self.buffers.add(i)

    def _final_readers(self, i: int) -> list[Step]:
        found = []
        for step in self.readers.get(i, ()):
            found += [s for j in step.makes for s in self._final_readers(j)] if step.name in VIEWS else [step]
        return found

    def _has_buffered_reader(self, i: int) -> bool:
        return any(step.name in BUFFERED for step in self._final_readers(i))

    def _ends(self, i: int) -> bool:
        views = (j for s in self.readers.get(i, ()) if s.name in VIEWS for j in s.makes)
        return i in self.ends or any(self._ends(j) for j in views)

    def _is_needed(self, i: int, costly: bool) -> bool:
        return self._ends(i) or self._has_buffered_reader(i) or (costly and len(self._final_readers(i)) > 1)

    def roots(self, i: int) -> frozenset[int]:
        """Returns the buffers from which a value is computed."""
        if i not in self._roots:
            step = self.maker.get(i)
            if i in self.buffers:
                self._roots[i] = frozenset({i})
            elif step is None:
                self._roots[i] = frozenset()
            else:
                self._roots[i] = frozenset().union(*(self.roots(j) for j in step.reads))
        return self._roots[i]


def _walk(
    program: Program,
    rules: Rules,
    *,
    sliced: Set[int] = frozenset(),
    written: Set[int] = frozenset(),
    in_place: Set[int] = frozenset(),
) -> Cost:
    """Returns the cost of a program or loop body. `in_place`: outputs that reuse the buffers of inputs."""
    flow, total = _Flow(program, sliced, written), Cost()
    values, inputs = program.values, set(program.inputs)
    owned = inputs - sliced  # owned by the caller, not counted here
    roots = lambda ids: frozenset().union(*(flow.roots(i) for i in ids)) if ids else frozenset()
    last: dict[int, int] = {}  # step of the last read of each buffer
    for t, step in enumerate(program.steps):
        if any(i in flow.buffers for i in step.makes):
            last |= dict.fromkeys(roots(step.reads), t)
        last |= {i: t for i in step.makes if i in flow.buffers}
    last |= dict.fromkeys(roots([i for i in program.outputs if i not in written]), len(program.steps))
    held = {i: LiveBuffer(values[i], values[i].bytes, False) for i in sliced & flow.buffers}

    for t, step in enumerate(program.steps):
        if step.name == "device_put":
            total.sent_away += sum(values[i].size_bytes for i in step.makes if values[i].on_host)
        made = [i for i in step.makes if i in flow.buffers]
        if not made:
            continue
        inner = _inner_cost(step, program, rules)
        sources = roots(step.reads)
        dying = [i for i in sources if last[i] == t and i in held] if not _is_product(step) else []
        stacked = step.makes[step.params["num_carry"] :] if step.name == "scan" else []
        is_sharded = step.name not in BUFFERED or _is_outer(step)
        unsharded = 0.0
        for i in made:
            size = rules.sharded_bytes(values[i])
            if i not in stacked and not is_sharded:
                unsharded += max(values[i].bytes - size, 0.0)  # until it is sharded, as for gradients
            replaced = next((j for j in dying if held[j].bytes == size > 0), None)
            if replaced is not None:  # elementwise results reuse a buffer read for the last time
                dying.remove(replaced)
                del held[replaced]
            if i not in in_place:
                held[i] = LiveBuffer(values[i], size, i in stacked)
        live = [*held.values(), *inner.held]
        if unsharded:
            live.append(LiveBuffer(values[made[0]], unsharded, False))
        if (size := sum(buffer.bytes for buffer in live)) > total.peak:
            total.peak, total.held = size, live
        total.add(inner, _trip_count(step, rules))
        if step.name not in LOOPS:
            part = _touched(step)
            touched = [*sources, *made] if part is None else 2 * part
            moved = sum(rules.sharded_bytes(values[i]) for i in touched)
            total.add(Cost(moved=moved, seconds=rules.seconds(inner.flops, moved)))
        held = {i: buffer for i, buffer in held.items() if last.get(i, -1) > t and i not in owned}
    return total


def _touched(step: Step) -> list[int] | None:
    """Returns the values whose size is the traffic of a slice, gather or scatter; None if all data is accessed."""
    if step.name in ("gather", "dynamic_slice"):
        return step.makes
    if step.name.startswith("scatter"):
        return step.reads[2:3]
    return step.reads[1:2] if step.name == "dynamic_update_slice" else None


def _is_outer(step: Step) -> bool:
    """Returns whether a step is a loop over loops, i.e. over microbatches. Its carries are sharded as outside."""
    return step.name == "scan" and any(e.primitive.name == "scan" for e in _all_eqns(step.params["jaxpr"].jaxpr))


def _all_eqns(jaxpr: Jaxpr) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        inner = _callee(eqn)
        if inner is not None:
            yield from _all_eqns(inner)


def _is_product(step: Step) -> bool:
    in_place = ("scan", "while", "dynamic_update_slice", "scatter", "scatter-add")
    return step.name in BUFFERED and step.name not in in_place


def _trip_count(step: Step, rules: Rules) -> float:
    """Returns the number of iterations of a loop; 1 for other steps.

    `while` loops come from models/grouped_matmul.py: each iteration gathers some of the rows, until all are done.
    """
    if step.name == "scan":
        return step.params["length"]
    if step.name != "while":
        return 1
    gathers = [e for e in _all_eqns(step.params["body_jaxpr"].jaxpr) if e.primitive.name == "gather"]
    rows = lambda var: math.prod(var.aval.shape[:-1])
    return max(1, *(rules.rows_of_groups * rows(e.invars[0]) / rows(e.outvars[0]) for e in gathers))


def _inner_cost(step: Step, program: Program, rules: Rules) -> Cost:
    """Returns the cost of one loop iteration (without the loop's buffers), the worst branch, or a matmul's FLOPs."""
    if step.name == "scan":
        inner = _inline_calls(step.params["jaxpr"].jaxpr)
        consts, carries = step.params["num_consts"], step.params["num_carry"]
        offset = len(inner.inputs) - len(step.params["jaxpr"].jaxpr.invars)
        sliced = set(inner.inputs[offset + consts + carries :])
        return _walk(inner, rules, sliced=sliced, written=set(inner.outputs[carries:]) - set(inner.outputs[:carries]))
    if step.name == "while":
        body = _inline_calls(step.params["body_jaxpr"].jaxpr)
        return _walk(body, rules, in_place=set(body.outputs))
    if step.name == "cond":
        branches = [_walk(_inline_calls(branch.jaxpr), rules) for branch in step.params["branches"]]
        return max(branches, key=lambda branch: branch.peak)
    if step.name == "dot_general":
        (contracted, _), _ = step.params["dimension_numbers"]
        sizes = program.values[step.reads[0]].shape
        out = program.values[step.makes[0]].shape
        return Cost(flops=2.0 * math.prod(out) * math.prod(sizes[d] for d in contracted))
    if step.name.startswith("ragged_dot"):
        a = program.values[step.reads[0]].shape
        out = program.values[step.makes[0]].shape
        # Each row is multiplied with one group: [S, K] x [E, K, N] -> [S, N], or [S, K] x [S, N] -> [E, K, N].
        return Cost(flops=2.0 * a[0] * a[1] * out[-1] * rules.rows_of_groups)
    return Cost()
