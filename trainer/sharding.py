"""Sharding rules: logical axes to mesh axes, and the shardings of parameters, batches and activations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from data.batch import ColumnBatch, TokenBatch
from models.config import ModelConfig
from models.logical_axes import NoConstraint, ShardingConstraint
from trainer.mesh import AXES, divisors

BATCH_DIMS = ("layers", "experts")  # dims along which a parameter stacks independent parameters

LogicalAxes = tuple[str | None, ...]
Batch = TokenBatch | ColumnBatch


@dataclass
class ShardingRules:
    """Mesh axes over which each logical axis is sharded. A mesh axis shards only the first matching dim of a tensor."""

    batch: list[str] = field(default_factory=lambda: ["data", "fsdp", "expert", "stage"])  # rows of the batch
    length: list[str] = field(default_factory=lambda: ["context"])  # tokens of a row
    residual: list[str] = field(default_factory=lambda: ["context"])  # tokens of a row, between attention and MLP
    positions: list[str] = field(default_factory=list)  # entries of a learned position table
    embed: list[str] = field(default_factory=lambda: ["fsdp"])  # model width of parameters; unsharded in activations
    heads: list[str] = field(default_factory=lambda: ["tensor"])  # query heads
    kv_heads: list[str] = field(default_factory=lambda: ["tensor"])  # key and value heads
    head_dim: list[str] = field(default_factory=list)  # width of a head
    latent: list[str] = field(default_factory=list)  # latent vectors of multi-head latent attention (MLA)
    mlp: list[str] = field(default_factory=lambda: ["tensor"])  # hidden width of the MLP
    vocab: list[str] = field(default_factory=lambda: ["tensor"])  # tokens of the vocabulary
    outputs: list[str] = field(default_factory=list)  # outputs of a score or classification head
    experts: list[str] = field(default_factory=lambda: ["expert"])  # dim along which experts are stacked
    router: list[str] = field(default_factory=list)  # router scores, one per expert
    layers: list[str] = field(default_factory=lambda: ["stage"])  # dim along which layers are stacked

    def axes_of(self, logical: str | None, where: str) -> tuple[str, ...]:
        """Returns the mesh axes of a logical axis. Raises: ValueError for an unknown logical or mesh axis."""
        if logical is None:
            return ()
        known = [f.name for f in fields(self)]
        if logical not in known:
            raise ValueError(f"{where}: no rule for logical axis {logical!r}; known: {', '.join(known)}")
        axes = tuple(getattr(self, logical))
        for axis in axes:
            if axis not in AXES:
                raise ValueError(
                    f"sharding.{logical}={list(axes)}: {axis!r} is not a mesh axis; valid: {', '.join(AXES)}"
                )
        return axes


def _spec(
    logical: LogicalAxes,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: ShardingRules,
    where: str,
    strict: bool,
    without: Sequence[str] = (),
) -> PartitionSpec:
    """Returns the partition of one tensor. An indivisible dim raises if `strict`, otherwise stays unsharded."""
    assert len(logical) == len(shape), f"{where}: axes {logical} for shape {shape}"
    used = set(without)
    entries: list[list[str]] = []
    for dim, (name, size) in enumerate(zip(logical, shape, strict=True)):
        axes = [a for a in rules.axes_of(name, where) if a not in used and mesh.shape[a] > 1]
        if axes and size % _axis_size(mesh, axes):
            # `with_pipeline` checks the pipelined layers; a few layers before or after them stay unsharded.
            if strict and name != "layers":
                raise ValueError(_indivisible(axes, mesh, where, dim, str(name), size))
            axes = []
        used.update(axes)
        entries.append(axes)
    return partition(*entries)


def partition(*axes: str | Sequence[str] | None) -> PartitionSpec:
    """Returns the canonical `PartitionSpec` for the mesh axes of each dim, without trailing unsharded dims."""
    entries = [_names(each) if each else None for each in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _indivisible(axes: list[str], mesh: Mesh | AbstractMesh, where: str, dim: int, name: str, size: int) -> str:
    product = _axis_size(mesh, axes)
    key = "*".join(f"mesh.{axis}" for axis in axes)
    pad = f", or model.vocab_size={-(-size // product) * product}" if name == "vocab" else ""
    possible = divisors(math.gcd(size, mesh.size))
    valid = sorted(sorted(possible, key=lambda d: abs(d - product))[:2])
    return (
        f"{key}={product}: cannot shard dim {dim} ({name}) of parameter {where}, of size {size}, into {product} "
        f"equal shards; nearest valid {key}: {', '.join(map(str, valid))}{pad}"
    )


def path_name(path: tuple[Any, ...]) -> str:
    """Formats a key path of a nested dict as 'layers/attention/query'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(
    axes_tree: Any, abstract_params: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules, *, strict: bool = True
) -> Any:
    """Returns the `NamedSharding` of each parameter, as a tree of the same structure.

    Indivisible vectors (one dim in addition to `layers`) are replicated, because they are small. With `strict=False`,
    so are all indivisible parameters.
    Raises: ValueError naming parameter, dim, size and axis of an indivisible matrix.
    """

    def sharding(path: tuple[Any, ...], param: jax.ShapeDtypeStruct, logical: LogicalAxes) -> NamedSharding:
        is_matrix = sum(name not in BATCH_DIMS for name in logical) > 1
        return NamedSharding(
            mesh, _spec(logical, param.shape, mesh, rules, path_name(path), strict=strict and is_matrix)
        )

    return jax.tree_util.tree_map_with_path(sharding, abstract_params, axes_tree)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns a fully replicated sharding."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh, rules: ShardingRules) -> NamedSharding:
    """Returns the sharding of token fields [B, L]: B over the mesh axes of `batch`, L over those of `length`.

    If `length` is unsharded, it fits arrays of any rank; `field_shardings` handles any batch.
    """
    rows = [axis for axis in rules.axes_of("batch", "sharding") if mesh.shape[axis] > 1]
    return NamedSharding(mesh, partition(rows, _length_axes(mesh, rules)))


def _length_axes(mesh: Mesh | AbstractMesh, rules: ShardingRules) -> list[str]:
    """Returns the mesh axes that shard tokens of a row: those of `length` that do not already shard `batch`."""
    rows = rules.axes_of("batch", "sharding")
    return [axis for axis in rules.axes_of("length", "sharding") if mesh.shape[axis] > 1 and axis not in rows]


def field_shardings(batch: Batch, sharding: NamedSharding) -> Batch:
    """Returns the `NamedSharding` of each field of a batch, given that of token fields [B, L].

    Token fields may have dims between B and L (pairs: [B, 2, L]); an indivisible L stays unsharded. Columns are
    sharded along B only.
    """
    rows, length = (*sharding.spec, None, None)[:2]
    num_shards = _axis_size(sharding.mesh, _names(length or ()))
    named = lambda *axes: NamedSharding(sharding.mesh, partition(*axes))
    of_tokens = lambda shape: named(rows, *[None] * (len(shape) - 2), None if shape[-1] % num_shards else length)
    tokens = TokenBatch(*(of_tokens(field.shape) for field in batch[:5]))
    if not isinstance(batch, ColumnBatch):
        return tokens
    return ColumnBatch(*tokens, columns=jax.tree.map(lambda _: named(rows), batch.columns))


def balanced_token_order(length: int, num_shards: int) -> np.ndarray:
    """Returns the token permutation [L] i64 that balances causal attention over context-parallel devices.

    The cost of a causal token grows with its position. The row is split into 2 C chunks, and device i gets chunks i and
    2 C - 1 - i, as in Llama 3 [2407.21783], section 3.3.2; Brandon et al. 2023 [2311.09431] balance single tokens. A
    length that is not divisible by 2 C keeps its order.
    """
    if num_shards == 1 or length % (2 * num_shards):
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * num_shards, -1)
    return np.stack([chunks[:num_shards], chunks[: num_shards - 1 : -1]], axis=1).reshape(-1)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns a tree of arrays or shapes as `jax.ShapeDtypeStruct`s with `shardings`."""
    put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(put, shapes, shardings)


def check_batch(batch_size: int, num_microbatches: int, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> None:
    """Checks that each microbatch divides evenly over the mesh. Raises: ValueError with the nearest valid values."""
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


MICROBATCHES = 4  # default per pipeline stage, if divisible: limits the pipeline bubble to a fifth of the time


def with_pipeline(model: ModelConfig, rows: int, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> ModelConfig:
    """Returns `model` with the number of pipeline microbatches resolved. `rows`: rows of one forward pass.

    Raises: ValueError with the nearest valid values if layers or rows are indivisible.
    """
    axes = [axis for axis in rules.axes_of("layers", "sharding") if mesh.shape[axis] > 1]
    stages, pipeline = _axis_size(mesh, axes), model.pipeline
    if stages == 1:
        return model
    if pipeline.num_repeats < 1 or pipeline.num_microbatches < 0:
        raise ValueError(
            f"model.pipeline: num_repeats={pipeline.num_repeats} must be at least 1 and "
            f"num_microbatches={pipeline.num_microbatches} at least 0"
        )
    key = "*".join(f"mesh.{axis}" for axis in axes)
    layers = model.num_layers - model.layers_before_experts
    if layers % (stages * pipeline.num_repeats):
        sizes = [str(d) for d in divisors(mesh.size) if layers % (d * pipeline.num_repeats) == 0]
        raise ValueError(
            f"{key}={stages}: {layers} layers cannot be split evenly over {stages} pipeline stages with "
            f"model.pipeline.num_repeats={pipeline.num_repeats}; valid {key} with {mesh.size} devices: "
            f"{', '.join(sizes) or 'none'}; or change num_repeats"
        )
    others = [axis for axis in rules.axes_of("batch", "sharding") if axis not in axes]
    replicas = _axis_size(mesh, others)
    local_rows = rows // replicas
    valid = [m for m in range(stages, local_rows + 1, stages) if local_rows % m == 0]
    found = pipeline.num_microbatches or max((m for m in valid if m <= MICROBATCHES * stages), default=0)
    if found not in valid:
        numbers = ", ".join(map(str, valid)) or "none; increase data.batch_size"
        raise ValueError(
            f"model.pipeline.num_microbatches={found}: must be a multiple of {key}={stages} that divides the "
            f"{local_rows} rows of each of {replicas} data-parallel replicas; valid: {numbers}"
        )
    return replace(model, pipeline=replace(pipeline, num_microbatches=found))


def check_seq_len(seq_len: int, mesh: Mesh, rules: ShardingRules) -> None:
    """Checks that rows divide evenly over the mesh axes of `length`, and that these shard no other dim of a layer.

    Raises: ValueError with the nearest valid values.
    """
    axes = _length_axes(mesh, rules)
    for name in ("heads", "kv_heads", "mlp", "experts"):
        for axis in rules.axes_of(name, "sharding"):
            if axis in axes:
                raise ValueError(
                    f"sharding.length={rules.length}: mesh axis {axis!r} already shards {name!r} and cannot also shard "
                    "'length'; use sharding.length=[context]"
                )
    num_shards = _axis_size(mesh, axes)
    if seq_len % num_shards == 0:
        return
    key = "*".join(f"mesh.{axis}" for axis in axes)
    lengths = [str(v) for v in (seq_len // num_shards * num_shards, (seq_len // num_shards + 1) * num_shards) if v > 0]
    possible = divisors(math.gcd(seq_len, mesh.size))
    sizes = sorted(sorted(possible, key=lambda d: abs(d - num_shards))[:2])
    raise ValueError(
        f"data.seq_len={seq_len}: not divisible by {key}={num_shards}, which shards each row into {num_shards} equal "
        f"parts; nearest valid: {', '.join(lengths)}; or {key}={' or '.join(map(str, sizes))}"
    )


def _names(entry: str | Sequence[str]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def make_constrain(mesh: Mesh | AbstractMesh, rules: ShardingRules) -> ShardingConstraint:
    """Returns `constrain(x, ('batch', 'length', 'embed'))` for activations inside a model.

    `batch` is sharded first, so `embed` of an activation stays unsharded if `fsdp` already shards its rows. Indivisible
    dims stay unsharded, because generation uses batches of any size.
    """
    return NoConstraint(_platform(mesh)) if mesh.size == 1 else MeshShardingConstraint(mesh, rules)


def _platform(mesh: Mesh | AbstractMesh) -> str:
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


class MeshShardingConstraint:
    """A `ShardingConstraint` over a mesh."""

    def __init__(self, mesh: Mesh | AbstractMesh, rules: ShardingRules, *, without: Sequence[str] = ()):
        """`without`: mesh axes to leave unused."""
        self.mesh, self.rules, self.without = mesh, rules, without
        self._stage_axes = [axis for axis in rules.axes_of("layers", "sharding") if mesh.shape[axis] > 1]
        self.stages = self.shown_stages = _axis_size(mesh, self._stage_axes)
        self.platform = _platform(mesh)

    def num_shards(self, name: str) -> int:
        """See `models.logical_axes.ShardingConstraint`."""
        axes = self.rules.axes_of(name, "sharding")
        return _axis_size(self.mesh, [axis for axis in axes if axis not in self.without])

    def _spec(self, x: jax.Array, logical: LogicalAxes) -> PartitionSpec:
        # `fsdp` shards rows of activations and `embed` of parameters; the width of activations is never sharded.
        logical = tuple(None if name == "embed" else name for name in logical)
        return _spec(logical, x.shape, self.mesh, self.rules, "activation", strict=False, without=self.without)

    def __call__(self, x: jax.Array, logical: LogicalAxes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._spec(x, logical)))

    def per_device(
        self, function: Callable[..., jax.Array], axes: Sequence[LogicalAxes | None], *args: jax.Array | None
    ) -> jax.Array:
        """See `models.logical_axes.ShardingConstraint`. Arguments without logical axes are all-gathered first."""
        specs, sharded = [], {}
        for x, logical in zip(args, axes, strict=True):
            spec = PartitionSpec() if x is None or logical is None else self._spec(x, logical)
            sharded |= {name: _names(entry) for name, entry in zip(logical or (), spec, strict=False) if entry}
            specs.append(spec)
        run = jax.shard_map(
            lambda *shards: function(sharded, *shards),
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
        within_stage = MeshShardingConstraint(self.mesh, self.rules, without=self._stage_axes)
        run = jax.vmap(partial(function, within_stage), spmd_axis_name=_names(self._stage_axes))
        return jax.tree.map(self.along_stages, run(*args))


def process_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Returns the sorted global indices [R] i64 of the rows with any shard on this process's devices.

    If `tensor` or `context` spans processes, several of them hold the same rows or parts of them.
    """
    rows = np.zeros(batch_size, bool)
    of_rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    for index in of_rows.addressable_devices_indices_map((batch_size,)).values():
        assert index is not None
        rows[index[0]] = True
    return np.flatnonzero(rows)


def place_batch(batch: Batch, sharding: NamedSharding, batch_size: int, *, balanced: bool = False) -> Batch:
    """Builds global arrays [batch_size, ...] from this process's full rows, in the order of `process_rows`.

    `sharding`: of token fields, see `batch_sharding`. `balanced`: permutes all token fields by `balanced_token_order`,
    for losses that do not depend on token order.
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
        assert len(local) == len(rows), f"{len(local)} rows given, {len(rows)} expected"

        def block(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))  # rows of one device are consecutive in `rows`
            return local[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, block)

    return jax.tree.map(place, batch, shardings)


def _axis_size(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
