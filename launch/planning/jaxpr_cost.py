"""What a program takes and does, read off its jaxpr in a moment: memory, floating-point operations, bytes moved.

The program is walked once in its own order. A value is held from the step that makes it to the last that reads it, but
for those that no compiler holds: elementwise steps, casts, broadcasts and transpositions become part of the step that
reads them (fusion), unless that is a product, a loop or the end, which read buffers. A loop holds what it carries and
what it stacks; of its inside one turn is walked.

An estimate: `docs/plan.md` shows it beside what XLA allocates.
"""

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# They read buffers, and make one.
BUFFERED = frozenset(
    {
        "dot_general", "ragged_dot_general", "ragged_dot", "scan", "while", "cond", "sort", "top_k", "scatter",
        "scatter-add", "cumsum", "cummax", "cumlogsumexp", "conv_general_dilated", "dynamic_update_slice", "eigh",
        "copy", "qr", "svd", "cholesky", "triangular_solve", "random_bits", "threefry2x32",
    }
)  # fmt: skip
REDUCING = ("reduce", "arg")  # they make a buffer, and take in the elementwise steps before them
# They change no number, or only the order in which a product reads them.
VIEWS = frozenset({"reshape", "squeeze", "expand_dims", "transpose", "stop_gradient", "optimization_barrier"})
LOOPS = ("scan", "while", "cond")
COSTLY = frozenset(
    {"exp", "exp2", "log", "log1p", "tanh", "logistic", "erf", "sin", "cos", "pow", "rsqrt", "sqrt", "gather"}
)  # not done twice for two readers


@dataclass(frozen=True)
class Value:
    """Something that a program names."""

    shape: tuple[int, ...]
    dtype: Any
    away: bool = False  # in the memory of the host

    @property
    def bytes(self) -> float:
        """On the device."""
        return 0.0 if self.away else self.whole

    @property
    def whole(self) -> float:
        extended = jax.dtypes.issubdtype(self.dtype, jax.dtypes.extended)
        return math.prod(self.shape) * (8 if extended else np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Rules:
    """What the walk must know of mesh and platform."""

    kept: Callable[[Value], float] = lambda value: value.bytes  # bytes of a value as it is kept on one device
    seconds: Callable[[float, float], float] = lambda flops, moved: 0.0  # that a step of so much takes
    rows_of_groups: float = 1.0  # of the rows of a grouped product, the share that falls on any group
    copies_donated: bool = False  # results take the place of arguments only in the end


@dataclass(frozen=True)
class LiveBuffer:
    """A buffer at the moment when most is held."""

    value: Value
    bytes: float
    stacked: bool  # by a loop: kept of each of its turns


@dataclass
class Cost:
    """What running a program costs."""

    peak: float = 0.0  # bytes that are held at most, arguments and what takes their place left out
    held: list[LiveBuffer] = field(default_factory=list)  # then
    flops: float = 0.0  # of products: two for each multiplication
    moved: float = 0.0  # bytes that are read and written
    sent_away: float = 0.0  # bytes that go to the memory of the host
    seconds: float = 0.0

    def add(self, other: "Cost", times: float = 1) -> None:
        self.flops += times * other.flops
        self.moved += times * other.moved
        self.sent_away += times * other.sent_away
        self.seconds += times * other.seconds


@dataclass
class Step:
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
    """A jaxpr with the calls inside it written out."""

    values: list[Value]
    steps: list[Step]
    inputs: list[int]
    outputs: list[int]


def jaxpr_cost(jaxpr: ClosedJaxpr, donated: Sequence[bool], rules: Rules = Rules()) -> Cost:
    """Of a whole program. `donated`: whether each argument's buffer is given away, for results like it."""
    program = _inline_calls(jaxpr.jaxpr)
    arguments = program.inputs[len(jaxpr.jaxpr.constvars) :]
    free = [program.values[i] for i, gone in zip(arguments, donated, strict=True) if gone]
    in_place = set()
    for i in program.outputs:
        if program.values[i] in free:
            free.remove(program.values[i])
            in_place.add(i)
    return _walk(program, rules, in_place=set() if rules.copies_donated else in_place)


def _inline_calls(jaxpr: Jaxpr) -> Program:
    program = Program([], [], [], [])

    def new(aval: Any) -> int:
        away = getattr(aval, "memory_space", None) == jax.memory.Space.Host
        program.values.append(Value(tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", np.dtype("int32")), away))
        return len(program.values) - 1

    def write(jaxpr: Jaxpr, env: dict[Any, int]) -> list[int]:
        env |= {var: new(var.aval) for var in jaxpr.constvars if var not in env}
        read = lambda atom: new(atom.aval) if isinstance(atom, Literal) else env[atom]
        for eqn in jaxpr.eqns:
            reads = [env[atom] for atom in eqn.invars if not isinstance(atom, Literal)]
            inner = None if eqn.primitive.name in BUFFERED else _called(eqn)
            if inner is not None:
                given = dict(zip(inner.invars, map(read, eqn.invars), strict=True))
                env |= zip(eqn.outvars, write(inner, given), strict=True)
                continue
            makes = [new(var.aval) for var in eqn.outvars]
            env |= zip(eqn.outvars, makes, strict=True)
            program.steps.append(Step(eqn.primitive.name, eqn.params, reads, makes))
        return [read(atom) for atom in jaxpr.outvars]

    program.inputs = [new(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)]
    program.outputs = write(jaxpr, dict(zip((*jaxpr.constvars, *jaxpr.invars), program.inputs, strict=True)))
    return program


def _called(eqn: Any) -> Jaxpr | None:
    """What a step stands for that calls another program: a jitted function, a checkpoint, a derivative of one's own."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if inner is not None:
            return inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    return None


class _Flow:
    """Which values of a program are buffers, and what a value that is none is made of."""

    def __init__(self, program: Program, sliced: Set[int], written: Set[int]):
        """`sliced`: inputs that are cut out of a stack. `written`: outputs that go straight into their place."""
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
            if self._is_read_whole(i):
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

    def _is_read_whole(self, i: int) -> bool:
        return any(step.name in BUFFERED for step in self._final_readers(i))

    def _ends(self, i: int) -> bool:
        views = (j for s in self.readers.get(i, ()) if s.name in VIEWS for j in s.makes)
        return i in self.ends or any(self._ends(j) for j in views)

    def _is_needed(self, i: int, costly: bool) -> bool:
        return self._ends(i) or self._is_read_whole(i) or (costly and len(self._final_readers(i)) > 1)

    def roots(self, i: int) -> frozenset[int]:
        """The buffers that a value is made of."""
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
    """`in_place`: outputs that take the place of inputs."""
    flow, total = _Flow(program, sliced, written), Cost()
    values, inputs = program.values, set(program.inputs)
    owned = inputs - sliced  # somebody else's
    of = lambda i: frozenset().union(*(flow.roots(j) for j in i)) if i else frozenset()
    last: dict[int, int] = {}
    for t, step in enumerate(program.steps):
        if any(i in flow.buffers for i in step.makes):
            last |= dict.fromkeys(of(step.reads), t)
        last |= {i: t for i in step.makes if i in flow.buffers}
    last |= dict.fromkeys(of([i for i in program.outputs if i not in written]), len(program.steps))
    held = {i: LiveBuffer(values[i], values[i].bytes, False) for i in sliced & flow.buffers}

    for t, step in enumerate(program.steps):
        if step.name == "device_put":
            total.sent_away += sum(values[i].whole for i in step.makes if values[i].away)
        made = [i for i in step.makes if i in flow.buffers]
        if not made:
            continue
        inside = _inside(step, program, rules)
        sources = of(step.reads)
        dying = [i for i in sources if last[i] == t and i in held] if not _is_product(step) else []
        stacked = step.makes[step.params["num_carry"] :] if step.name == "scan" else []
        as_outside = step.name not in BUFFERED or _is_outer(step)
        whole = 0.0
        for i in made:
            size = rules.kept(values[i])
            if i not in stacked and not as_outside:
                whole += max(values[i].bytes - size, 0.0)  # until it is cut, as gradients are
            replaced = next((j for j in dying if held[j].bytes == size > 0), None)
            if replaced is not None:  # elementwise results take the place of what dies with them
                dying.remove(replaced)
                del held[replaced]
            if i not in in_place:
                held[i] = LiveBuffer(values[i], size, i in stacked)
        now = [*held.values(), *inside.held]
        if whole:
            now.append(LiveBuffer(values[made[0]], whole, False))
        if (size := sum(h.bytes for h in now)) > total.peak:
            total.peak, total.held = size, now
        total.add(inside, _trip_count(step, rules))
        if step.name not in LOOPS:
            part = _touched(step)
            touched = [*sources, *made] if part is None else 2 * part
            moved = sum(rules.kept(values[i]) for i in touched)
            total.add(Cost(moved=moved, seconds=rules.seconds(inside.flops, moved)))
        held = {i: h for i, h in held.items() if last.get(i, -1) > t and i not in owned}
    return total


def _touched(step: Step) -> list[int] | None:
    """Of a large array that is cut out of or written into: what says how much of it is read and written."""
    if step.name in ("gather", "dynamic_slice"):
        return step.makes
    if step.name.startswith("scatter"):
        return step.reads[2:3]
    return step.reads[1:2] if step.name == "dynamic_update_slice" else None


def _is_outer(step: Step) -> bool:
    """A loop around loops: over microbatches. What it carries is kept as it lies outside."""
    return step.name == "scan" and any(e.primitive.name == "scan" for e in _every(step.params["jaxpr"].jaxpr))


def _every(jaxpr: Jaxpr) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        inner = _called(eqn)
        if inner is not None:
            yield from _every(inner)


def _is_product(step: Step) -> bool:
    in_place = ("scan", "while", "dynamic_update_slice", "scatter", "scatter-add")
    return step.name in BUFFERED and step.name not in in_place


def _trip_count(step: Step, rules: Rules) -> float:
    """Of a loop; 1 of what is none. Those that end by themselves are of models/grouped_matmul.py: each of their turns looks
    some of all rows up, until each row had its turn."""
    if step.name == "scan":
        return step.params["length"]
    if step.name != "while":
        return 1
    lookups = [e for e in _every(step.params["body_jaxpr"].jaxpr) if e.primitive.name == "gather"]
    rows = lambda var: math.prod(var.aval.shape[:-1])
    return max(1, *(rules.rows_of_groups * rows(e.invars[0]) / rows(e.outvars[0]) for e in lookups))


def _inside(step: Step, program: Program, rules: Rules) -> Cost:
    """What one turn of a loop takes, beside what the loop holds; the worst branch; the flops of a product."""
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
        # Rows meet one group each: [S, K] x [E, K, N] > [S, N], or [S, K] x [S, N] > [E, K, N].
        return Cost(flops=2.0 * a[0] * a[1] * out[-1] * rules.rows_of_groups)
    return Cost()
