"""The device mesh, and which tensor dims lie along which of its axes.

Models name the dims of their tensors by logical axes ('embed', 'heads', ...) and know no mesh.
`ShardingRules` says where each logical axis goes; everything here follows from those two. An *axis* is the
mesh's, a *dim* the tensor's.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from data.batch import ColumnBatch, TokenBatch
from models.config import ModelConfig
from models.logical_axes import NoConstraint, ShardingConstraint

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")  # neighbours along the last are closest
BATCH_DIMS = ("layers", "experts")  # dims over which a stacked parameter is many parameters

LogicalAxes = tuple[str | None, ...]
Batch = TokenBatch | ColumnBatch


@dataclass
class MeshConfig:
    """How many devices lie along each axis. One of them may be -1: all that remain."""

    data: int = -1  # copies of the parameters, each with its own rows of the batch
    fsdp: int = 1  # rows of the batch, too, and the parameters cut in as many pieces
    tensor: int = 1  # heads, mlp and vocabulary cut in as many pieces
    expert: int = 1  # rows of the batch, too, and the experts dealt out in as many parts
    context: int = 1  # each row cut in as many pieces of its length
    stage: int = 1  # layers dealt out in as many parts, through which microbatches go; see model.pipeline
    auto: bool = False  # training chooses all of these by a plan for the devices that are there


@dataclass
class ShardingRules:
    """For each logical axis, the mesh axes along which it is cut. A mesh axis cuts a tensor once: its first
    dim wins.
    """

    batch: list[str] = field(default_factory=lambda: ["data", "fsdp", "expert", "stage"])  # rows of the batch
    length: list[str] = field(default_factory=lambda: ["context"])  # tokens of a row
    residual: list[str] = field(default_factory=lambda: ["context"])  # tokens of a row, between what `tensor` cuts
    positions: list[str] = field(default_factory=list)  # of a learned table; any row looks up any of them
    embed: list[str] = field(default_factory=lambda: ["fsdp"])  # of parameters; activations keep it whole
    heads: list[str] = field(default_factory=lambda: ["tensor"])  # query heads
    kv_heads: list[str] = field(default_factory=lambda: ["tensor"])  # key and value heads
    head_dim: list[str] = field(default_factory=list)  # width of a head
    latent: list[str] = field(default_factory=list)  # the narrow vectors of latent attention
    mlp: list[str] = field(default_factory=lambda: ["tensor"])  # hidden width of the MLP
    vocab: list[str] = field(default_factory=lambda: ["tensor"])  # tokens of the vocabulary
    outputs: list[str] = field(default_factory=list)  # of a model that gives scores in place of logits
    experts: list[str] = field(default_factory=lambda: ["expert"])  # the dim along which experts are stacked
    router: list[str] = field(default_factory=list)  # scores of experts, one for each
    layers: list[str] = field(default_factory=lambda: ["stage"])  # the dim along which layers are stacked

    def axes_of(self, logical: str | None, where: str) -> tuple[str, ...]:
        """The mesh axes of a logical axis. Raises: ValueError where there is no such rule or mesh axis."""
        if logical is None:
            return ()
        known = [f.name for f in fields(self)]
        if logical not in known:
            raise ValueError(f"{where}: no rule for logical axis {logical!r}; known: {', '.join(known)}")
        axes = tuple(getattr(self, logical))
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"sharding.{logical}={list(axes)}: {axis!r} is no mesh axis; valid: {', '.join(AXES)}")
        return axes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all `devices` (default: every device of every process), neighbours along `tensor` closest.

    Slices or nodes, between which the network is slow, are told apart along the first axes: with `data=2 fsdp=8` on two
    of eight, parameters are gathered inside of each, and only gradients go between.
    Raises: ValueError naming the key where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    kinds = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        outer = dcn_shape(sizes, slices)
        inner = [size // slow for size, slow in zip(sizes, outer, strict=True)]
        split = {"allow_split_physical_axes": True}
        return Mesh(mesh_utils.create_hybrid_device_mesh(inner, outer, list(devices), **split), AXES, axis_types=kinds)
    try:
        return jax.make_mesh(sizes, AXES, devices=devices, axis_types=kinds)
    except NotImplementedError:  # an axis that is no product of sides of the TPUs' torus: its neighbours are apart
        laid_out = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
        return Mesh(laid_out, AXES, axis_types=kinds)


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """`fsdp 4 x tensor 2`, or `one device`."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def dcn_shape(sizes: Sequence[int], slices: int) -> list[int]:
    """Of each of `AXES`, the part that lies between slices: of the first ones, until all slices are dealt out."""
    outer = []
    for size in sizes:
        outer.append(math.gcd(size, slices))
        slices //= outer[-1]
    return outer


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """The mesh of `make_mesh` without any devices: enough for shapes and shardings."""
    return AbstractMesh(mesh_sizes(config, num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Devices along each of `AXES`. Raises: ValueError as `make_mesh`."""
    asked = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in asked.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis}={size}: must be at least 1, or -1 for all remaining devices")
    open_axes = [axis for axis, size in asked.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f"mesh.{open_axes[1]}=-1: mesh.{open_axes[0]} is -1 already, and takes all that remains; "
            f"set mesh.{open_axes[1]}=1"
        )
    fixed = math.prod(size for size in asked.values() if size != -1)
    if num_devices % fixed == 0 and (open_axes or fixed == num_devices):
        return tuple(num_devices // fixed if size == -1 else size for size in asked.values())

    def distance(sizes: tuple[int, ...]) -> float:
        return sum(abs(math.log(s / a)) for s, a in zip(sizes, asked.values(), strict=True) if a != -1)

    candidates = itertools.product(_divisors(num_devices), repeat=len(AXES))
    valid = sorted((c for c in candidates if math.prod(c) == num_devices), key=distance)[:3]
    worst = max((axis for axis in AXES if asked[axis] != -1), key=lambda axis: _blame(asked[axis], num_devices))
    product = "*".join(f"{axis}({asked[axis]})" for axis in AXES if asked[axis] != -1)
    relation = "divide" if open_axes else "equal"
    nearest = "; ".join(" ".join(f"mesh.{a}={s}" for a, s in zip(AXES, v, strict=True)) for v in valid)
    raise ValueError(
        f"mesh.{worst}={asked[worst]}: {product} = {fixed} must {relation} the {num_devices} devices; "
        f"nearest valid: {nearest}"
    )


def _blame(size: int, num_devices: int) -> tuple[bool, int]:
    return num_devices % size != 0, size


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _axis_size(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _spec(
    logical: LogicalAxes,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: ShardingRules,
    where: str,
    strict: bool,
    without: Sequence[str] = (),
) -> PartitionSpec:
    """The partition of one tensor. An indivisible dim is refused if `strict`, else kept whole."""
    assert len(logical) == len(shape), f"{where}: axes {logical} for shape {shape}"
    used = set(without)
    entries: list[list[str]] = []
    for dim, (name, size) in enumerate(zip(logical, shape, strict=True)):
        axes = [a for a in rules.axes_of(name, where) if a not in used and mesh.shape[a] > 1]
        if axes and size % _axis_size(mesh, axes):
            if strict and name != "layers":  # `with_pipeline` checks those that train; a few before or after stay whole
                raise ValueError(_indivisible(axes, mesh, where, dim, str(name), size))
            axes = []
        used.update(axes)
        entries.append(axes)
    return partition(*entries)


def partition(*axes: str | Sequence[str] | None) -> PartitionSpec:
    """Which mesh axes cut each dim, in the one spelling: without the dims at the end that nothing cuts."""
    entries = [_names(each) if each else None for each in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _indivisible(axes: list[str], mesh: Mesh | AbstractMesh, where: str, dim: int, name: str, size: int) -> str:
    product = _axis_size(mesh, axes)
    key = "*".join(f"mesh.{axis}" for axis in axes)
    pad = f", or model.vocab_size={-(-size // product) * product}" if name == "vocab" else ""
    possible = _divisors(math.gcd(size, mesh.size))
    valid = sorted(sorted(possible, key=lambda d: abs(d - product))[:2])
    return (
        f"{key}={product}: cannot cut dim {dim} ({name}) of parameter {where}, of size {size}, in {product} "
        f"equal pieces; nearest valid {key}: {', '.join(map(str, valid))}{pad}"
    )


def path_name(path: tuple[Any, ...]) -> str:
    """'layers/attention/query' for a key path of a nested dict."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(
    axes_tree: Any, abstract_params: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules, *, strict: bool = True
) -> Any:
    """The `NamedSharding` of each parameter, in the tree of the parameters.

    Vectors (one dim beside `layers`) that do not divide stay whole on each device: they weigh nothing. So does all that
    does not divide, without `strict`.
    Raises: ValueError naming parameter, dim, size and axis where a matrix does not divide.
    """

    def sharding(path: tuple[Any, ...], param: jax.ShapeDtypeStruct, logical: LogicalAxes) -> NamedSharding:
        is_matrix = sum(name not in BATCH_DIMS for name in logical) > 1
        return NamedSharding(
            mesh, _spec(logical, param.shape, mesh, rules, path_name(path), strict=strict and is_matrix)
        )

    return jax.tree_util.tree_map_with_path(sharding, abstract_params, axes_tree)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh, rules: ShardingRules) -> NamedSharding:
    """Of token fields [B, L]: rows over the axes of `batch`, their tokens over those of `length`.

    Without the latter it fits arrays of any rank; `field_shardings` tells of any batch.
    """
    rows = [axis for axis in rules.axes_of("batch", "sharding") if mesh.shape[axis] > 1]
    return NamedSharding(mesh, partition(rows, _length_axes(mesh, rules)))


def _length_axes(mesh: Mesh | AbstractMesh, rules: ShardingRules) -> list[str]:
    """What cuts tokens of a row: an axis that cuts rows leaves them whole."""
    rows = rules.axes_of("batch", "sharding")
    return [axis for axis in rules.axes_of("length", "sharding") if mesh.shape[axis] > 1 and axis not in rows]


def field_shardings(batch: Batch, sharding: NamedSharding) -> Batch:
    """The `NamedSharding` of each field of a batch, from that of token fields [B, L].

    Token fields may have dims between rows and tokens (pairs: [B, 2, L]), and stay whole where L does not divide;
    columns have rows only.
    """
    rows, length = (*sharding.spec, None, None)[:2]
    pieces = _axis_size(sharding.mesh, _names(length or ()))
    of = lambda *axes: NamedSharding(sharding.mesh, partition(*axes))
    of_tokens = lambda shape: of(rows, *[None] * (len(shape) - 2), None if shape[-1] % pieces else length)
    tokens = TokenBatch(*(of_tokens(field.shape) for field in batch[:5]))
    if not isinstance(batch, ColumnBatch):
        return tokens
    return ColumnBatch(*tokens, columns=jax.tree.map(lambda _: of(rows), batch.columns))


def balanced_token_order(length: int, pieces: int) -> np.ndarray:
    """[L] i64: in which order the tokens of a row lie where each of so many devices shall have as much to do.

    A causal token's work grows with what is before it. Of a row in 2 C stretches device i gets i and 2 C - 1 - i, as
    in Llama 3 [2407.21783], section 3.3.2; Brandon et al. 2023 [2311.09431] balance by single tokens. A length that
    does not cut in 2 C stays in its own order.
    """
    if pieces == 1 or length % (2 * pieces):
        return np.arange(length)
    stretches = np.arange(length).reshape(2 * pieces, -1)
    return np.stack([stretches[:pieces], stretches[: pieces - 1 : -1]], axis=1).reshape(-1)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of arrays or shapes as `jax.ShapeDtypeStruct`s that lie as `shardings` says."""
    put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(put, shapes, shardings)


def check_batch(batch_size: int, num_microbatches: int, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> None:
    """Each microbatch must spread evenly over the mesh. Raises: ValueError with the nearest valid values."""
    axes = rules.axes_of("batch", "sharding")
    factor = _axis_size(mesh, axes) * num_microbatches
    if batch_size > 0 and batch_size % factor == 0:
        return
    parts = [f"mesh.{axis}={mesh.shape[axis]}" for axis in axes] + [
        f"task.gradient_accumulation_steps={num_microbatches}"
    ]
    below, above = batch_size // factor * factor, (batch_size // factor + 1) * factor
    valid = ", ".join(str(v) for v in (below, above) if v > 0)
    raise ValueError(
        f"data.batch_size={batch_size}: must be a multiple of {factor} ({' * '.join(parts)}); nearest valid: {valid}"
    )


MICROBATCHES = 4  # for each stage, where the rows allow: then at most a fifth of the time is waited


def with_pipeline(model: ModelConfig, rows: int, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> ModelConfig:
    """`model` with as many microbatches in its pipeline as there will be. `rows`: of one forward pass.

    Raises: ValueError where layers or rows do not divide, with the nearest valid values.
    """
    axes = [axis for axis in rules.axes_of("layers", "sharding") if mesh.shape[axis] > 1]
    stages, pipeline = _axis_size(mesh, axes), model.pipeline
    if stages == 1:
        return model
    if pipeline.num_repeats < 1 or pipeline.num_microbatches < 0:
        raise ValueError(
            f"model.pipeline: rounds={pipeline.num_repeats} must be at least 1, microbatches={pipeline.num_microbatches} at "
            "least 0"
        )
    key = "*".join(f"mesh.{axis}" for axis in axes)
    layers = model.num_layers - model.layers_before_experts
    if layers % (stages * pipeline.num_repeats):
        sizes = [str(d) for d in _divisors(mesh.size) if layers % (d * pipeline.num_repeats) == 0]
        raise ValueError(
            f"{key}={stages}: does not deal out {layers} layers in model.pipeline.num_repeats={pipeline.num_repeats} rounds of "
            f"equal parts; valid {key} with {mesh.size} devices: {', '.join(sizes) or 'none'}; or other rounds"
        )
    others = [axis for axis in rules.axes_of("batch", "sharding") if axis not in axes]
    share = rows // _axis_size(mesh, others)
    valid = [m for m in range(stages, share + 1, stages) if share % m == 0]
    found = pipeline.num_microbatches or max((m for m in valid if m <= MICROBATCHES * stages), default=0)
    if found not in valid:
        numbers = ", ".join(map(str, valid)) or "none; give more rows"
        raise ValueError(
            f"model.pipeline.num_microbatches={found}: must be a multiple of {key}={stages} that divides the {share} rows "
            f"of one of {_axis_size(mesh, others)} copies; valid: {numbers}"
        )
    return replace(model, pipeline=replace(pipeline, num_microbatches=found))


def check_seq_len(seq_len: int, mesh: Mesh, rules: ShardingRules) -> None:
    """Each row must cut into equal pieces, along axes that cut nothing else of a layer.

    Raises: ValueError with the nearest valid values.
    """
    axes = _length_axes(mesh, rules)
    for name in ("heads", "kv_heads", "mlp", "experts"):
        for axis in rules.axes_of(name, "sharding"):
            if axis in axes:
                raise ValueError(
                    f"sharding.length={rules.length}: mesh axis {axis!r} cuts {name} already, and a device would hold "
                    "some tokens of some of them; use [context]"
                )
    pieces = _axis_size(mesh, axes)
    if seq_len % pieces == 0:
        return
    key = "*".join(f"mesh.{axis}" for axis in axes)
    lengths = [str(v) for v in (seq_len // pieces * pieces, (seq_len // pieces + 1) * pieces) if v > 0]
    possible = _divisors(math.gcd(seq_len, mesh.size))
    sizes = sorted(sorted(possible, key=lambda d: abs(d - pieces))[:2])
    raise ValueError(
        f"data.seq_len={seq_len}: {key}={pieces} cuts each row in {pieces} equal pieces, and does not divide it; "
        f"nearest valid: {', '.join(lengths)}; or {key}={' or '.join(map(str, sizes))}"
    )


def _names(entry: str | Sequence[str]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def make_constrain(mesh: Mesh | AbstractMesh, rules: ShardingRules) -> ShardingConstraint:
    """`constrain(x, ('batch', 'length', 'embed'))` for activations inside a model.

    The rows' axes are taken first, so `embed` of an activation stays whole where `fsdp` already cuts its
    rows. A dim that does not divide stays whole: the batches of generation come in any size.
    """
    return NoConstraint(_platform(mesh)) if mesh.size == 1 else MeshShardingConstraint(mesh, rules)


def _platform(mesh: Mesh | AbstractMesh) -> str:
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


class MeshShardingConstraint:
    """`ShardingConstraint` over a mesh."""

    def __init__(self, mesh: Mesh | AbstractMesh, rules: ShardingRules, *, without: Sequence[str] = ()):
        """`without`: mesh axes that cut nothing here."""
        self.mesh, self.rules, self.without = mesh, rules, without
        self._stage_axes = [axis for axis in rules.axes_of("layers", "sharding") if mesh.shape[axis] > 1]
        self.stages = self.shown_stages = _axis_size(mesh, self._stage_axes)
        self.platform = _platform(mesh)

    def num_shards(self, name: str) -> int:
        """See `models.logical_axes.ShardingConstraint`."""
        axes = self.rules.axes_of(name, "sharding")
        return _axis_size(self.mesh, [axis for axis in axes if axis not in self.without])

    def _spec(self, x: jax.Array, logical: LogicalAxes) -> PartitionSpec:
        # `fsdp` cuts rows of activations and `embed` of parameters; an activation's own width is never cut.
        logical = tuple(None if name == "embed" else name for name in logical)
        return _spec(logical, x.shape, self.mesh, self.rules, "activation", strict=False, without=self.without)

    def __call__(self, x: jax.Array, logical: LogicalAxes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._spec(x, logical)))

    def per_device(
        self, function: Callable[..., jax.Array], axes: Sequence[LogicalAxes | None], *args: jax.Array | None
    ) -> jax.Array:
        """See `models.logical_axes.ShardingConstraint`. An argument that is wanted whole is gathered from its pieces first."""
        specs, cut = [], {}
        for x, logical in zip(args, axes, strict=True):
            spec = PartitionSpec() if x is None or logical is None else self._spec(x, logical)
            cut |= {name: _names(entry) for name, entry in zip(logical or (), spec, strict=False) if entry}
            specs.append(spec)
        run = jax.shard_map(
            lambda *pieces: function(cut, *pieces),
            mesh=self.mesh,
            in_specs=tuple(specs),
            out_specs=specs[0],
            check_vma=False,
        )
        return run(*args)

    def along_stages(self, x: jax.Array) -> jax.Array:
        """See `models.logical_axes.ShardingConstraint`."""
        spec = PartitionSpec(_names(self._stage_axes), *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def vmap_stages(self, function: Callable[..., Any], *args: Any) -> Any:
        """See `models.logical_axes.ShardingConstraint`."""
        one = MeshShardingConstraint(self.mesh, self.rules, without=self._stage_axes)
        run = jax.vmap(partial(function, one), spmd_axis_name=_names(self._stage_axes))
        return jax.tree.map(self.along_stages, run(*args))


def process_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Sorted global indices [R] i64 of the rows of which this process's devices hold anything, each once.

    Where `tensor` or `context` crosses processes, several of them hold the same rows, or pieces of them.
    """
    rows = np.zeros(batch_size, bool)
    of_rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    for index in of_rows.addressable_devices_indices_map((batch_size,)).values():
        assert index is not None
        rows[index[0]] = True
    return np.flatnonzero(rows)


def place_batch(batch: Batch, sharding: NamedSharding, batch_size: int, *, balanced: bool = False) -> Batch:
    """Global arrays [batch_size, ...] from this process's rows, whole and in the order of `process_rows`.

    `sharding`: of token fields, see `batch_sharding`. `balanced`: all token fields in `balanced_token_order`, for losses to which
    the order is nothing.
    """
    if balanced and sharding.spec[1:]:
        order = balanced_token_order(batch.tokens.shape[-1], _axis_size(sharding.mesh, _names(sharding.spec[1])))
        batch = batch._replace(
            **{name: field[..., order] for name, field in zip(TokenBatch._fields, batch[:5], strict=True)}
        )
    shardings = field_shardings(batch, sharding)
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)
    rows = process_rows(sharding, batch_size)

    def place(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        assert len(local) == len(rows), f"{len(local)} rows given, {len(rows)} to place"

        def block(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))  # a device's rows are consecutive among ours
            return local[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, block)

    return jax.tree.map(place, batch, shardings)
