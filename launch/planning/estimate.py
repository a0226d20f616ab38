"""Analytical plan: memory, communication and time of one training step, from shapes alone.

The training step is traced with the shapes of one device (`local_shapes.local_shapes`) and its jaxpr is analyzed
(`launch/planning/jaxpr_cost.py`); communication follows from the sharding of parameters and activations.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from configs.schema import RunConfig
from configs.tasks import TrainConfig
from launch.planning.hardware import Hardware, Target
from launch.planning.jaxpr_cost import Cost, LiveBuffer, Rules, jaxpr_cost
from launch.planning.local_shapes import (
    Shapes,
    bytes_on_device,
    frozen_configs,
    gathered_copies,
    local_shapes,
    product,
    shapes_of,
    share_of,
)
from models.attention import kernels
from models.config import AttentionImplementation, Dispatch, ModelConfig, Remat
from models.flops import flops_per_token, num_active_params, num_params
from models.pipeline_parallel import Schedule, schedule_over
from trainer.mesh import AXES, abstract_mesh
from trainer.sharding import with_pipeline

# Achievable fractions of the data sheet figures, for large and well-shaped programs.
MATMUL = {"tpu": 0.85, "cuda": 0.72, "cpu": 0.85}
MEMORY = 0.8
NETWORK = 0.75
PACKED = 1.15  # allocation of XLA's GPU backend for re-laid-out gradients, relative to their total size
USABLE = 0.94  # fraction of device memory available to programs; the runtime uses the rest


class Memory(NamedTuple):
    """Memory use in bytes of the most loaded device."""

    parameters: float
    optimizer: float
    frozen: float  # adapter bases, reference models, teachers
    gradients: float
    activations: float  # saved for the backward pass
    logits: float
    temporary: float
    batch: float

    @property
    def total(self) -> float:
        return sum(self)


class Traffic(NamedTuple):
    """Data sent by one device in a step along one mesh axis."""

    axis: str  # mesh axis; "host": transfers to and from host memory
    kind: str
    what: str
    count: int  # number of collectives
    bytes: float
    seconds: float
    hidden: bool  # may overlap with computation


@dataclass
class Plan:
    """Estimated properties of a run on a target."""

    target: Target
    mesh: dict[str, int]
    remat: str
    batch_size: int
    num_microbatches: int
    schedule: Schedule | None  # pipeline schedule, if the mesh has stages
    tokens_per_step: int
    parameters: dict[str, int]
    active_parameters: int
    trainable_parameters: int
    flops_per_token: float  # model FLOPs, see `models/flops.py`
    memory: Memory
    traffic: list[Traffic]
    compute_seconds: float  # matmuls only, at the achievable FLOP rate
    device_seconds: float  # roofline: the slower of compute and memory bandwidth for each operation
    work: Cost

    @property
    def capacity(self) -> float:
        return self.target.hardware.memory * USABLE

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity

    @property
    def network_seconds(self) -> float:
        return sum(t.seconds for t in self.traffic)

    @property
    def exposed_seconds(self) -> float:
        """Communication time that does not overlap with computation."""
        hidden = sum(t.seconds for t in self.traffic if t.hidden)
        return sum(t.seconds for t in self.traffic if not t.hidden) + max(0.0, hidden - 0.9 * self.device_seconds)

    @property
    def step_seconds(self) -> float:
        return self.device_seconds + self.exposed_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def mfu(self) -> float:
        peak = self.target.hardware.flops * self.target.num_devices
        return self.tokens_per_second * self.flops_per_token / peak


def estimate(config: RunConfig, target: Target, models: Mapping[str, ModelConfig] | None = None) -> Plan:
    """Returns the plan of a run on `target`, whose number of devices must match `config.mesh`.

    Raises: ValueError if mesh, batch and model are incompatible.
    """
    hardware, task = target.hardware, config.task
    assert isinstance(task, TrainConfig)
    mesh = abstract_mesh(config.mesh, target.num_devices)
    sizes = dict(mesh.shape)
    rows = config.data.batch_size // task.gradient_accumulation_steps
    config = replace(config, model=with_pipeline(config.model, rows, mesh, config.sharding))
    models = frozen_configs(config) if models is None else models
    full = shapes_of(config, mesh, models)
    local, jaxpr = _traced(config, mesh, models, hardware.platform)
    found = _walked(config, hardware, full, local, jaxpr, sizes)
    model = full.core.model
    tokens = math.prod(full.batch.tokens.shape)
    remote = _ring_attention_flops(config, model, sizes, tokens) / target.num_devices / hardware.flops
    adaptation = full.core.adaptation
    trainable = sum(leaf.size for leaf in jax.tree.leaves(full.core.abstract.params))
    return Plan(
        target=target,
        mesh=sizes,
        remat=model.remat.name,
        batch_size=config.data.batch_size,
        num_microbatches=task.gradient_accumulation_steps,
        schedule=schedule_over(model.pipeline, full.core.constrain),
        tokens_per_step=tokens,
        parameters=num_params(model),
        active_parameters=num_active_params(model),
        trainable_parameters=trainable,
        flops_per_token=flops_per_token(model, config.data.seq_len, None if adaptation is None else trainable),
        memory=_memory(full, local, found, hardware.platform),
        traffic=[*_traffic(config, target, full, sizes), *_to_host(full, found, hardware)],
        compute_seconds=(found.flops / hardware.flops + remote) / MATMUL[hardware.platform],
        device_seconds=found.seconds + remote / MATMUL[hardware.platform],
        work=found,
    )


def _ring_attention_flops(config: RunConfig, model: ModelConfig, sizes: Mapping[str, int], tokens: int) -> float:
    """Returns the FLOPs of attention to keys of other devices, which the trace of one device does not contain."""
    length = config.data.seq_len
    own = length // product(sizes, config.sharding.length)
    if own == length:
        return 0.0
    return tokens * (flops_per_token(model, length) - flops_per_token(model, own))


def _walked(
    config: RunConfig, hardware: Hardware, full: Shapes, local: Shapes, jaxpr: Any, sizes: Mapping[str, int]
) -> Cost:
    shares = _shares(full, local)
    speed = hardware.flops * MATMUL[hardware.platform]
    bandwidth = hardware.memory_bandwidth * MEMORY
    copies = gathered_copies(config, sizes)
    rules = Rules(
        sharded_bytes=lambda value: value.bytes * shares.get((value.shape, value.dtype), 1.0),
        seconds=lambda flops, moved: max(flops / speed, moved / bandwidth),
        copies_donated=hardware.platform == "cpu",
        rows_of_groups=1 / copies,
    )
    count = [len(jax.tree.leaves(part)) for part in local.arguments]
    return jaxpr_cost(jaxpr, [True] * count[0] + [False] * sum(count[1:]), rules)


_last: dict[str, tuple[Shapes, Any]] = {}


def _traced(config: RunConfig, mesh: Any, models: Mapping[str, ModelConfig], platform: str) -> tuple[Shapes, Any]:
    """Returns the shapes of one device and the jaxpr of its step.

    Cached, because meshes that differ only in how parameters are stored have both in common.
    """
    sizes = dict(mesh.shape)
    rows_cut = sizes["context"] > 1
    if (
        kernels.select_implementation(config.model, config.data.seq_len, platform, rows_cut=rows_cut)
        is not AttentionImplementation.xla
    ):
        # Replaces the attention kernel, which the trace cannot see into, by blockwise XLA attention of equal cost.
        attention = replace(
            config.model.attention, implementation=AttentionImplementation.xla, block_size=kernels.BLOCKS[0]
        )
        config = replace(config, model=replace(config.model, attention=attention))
    key = repr((share_of(config, sizes), models, gathered_copies(config, sizes), platform))
    if key not in _last:
        local = local_shapes(config, mesh, models, platform)
        if len(_last) > 64:
            _last.clear()
        _last[key] = local, local.core.train_step.trace(*local.arguments).jaxpr  # type: ignore[attr-defined]
    return _last[key]


def _shares(full: Shapes, local: Shapes) -> dict[tuple[tuple[int, ...], Any], float]:
    """Returns, by shape and dtype of a gathered parameter, the fraction that one device stores."""
    mine, full_params = local.core.abstract.params, full.core.abstract.params
    stored_size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape))
    shares = {}
    for name, tree in mine.items():
        rounds = full.core.model.pipeline.num_repeats if name == "layers" and full.core.constrain.stages > 1 else 0
        for leaf, full_leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(full_params[name]), strict=True):
            for shape in _pipeline_shapes(leaf.shape, rounds):
                shares[shape, leaf.dtype] = stored_size(full_leaf) / math.prod(leaf.shape)
    return shares


def _pipeline_shapes(shape: tuple[int, ...], rounds: int) -> list[tuple[int, ...]]:
    """Returns all shapes of a layer stack within the pipeline; `rounds` 0: no pipeline."""
    if not rounds:
        return [shape]
    layers, rest = shape[0] // rounds, shape[1:]
    leading = (shape[0],), (rounds, 1, layers), (1, rounds, layers), (rounds, layers), (1, layers), (layers,)
    return [(*dims, *rest) for dims in leading]


def _add_backend_overhead(kinds: dict[str, float], full: Shapes, local: Shapes, platform: str) -> None:
    """Adds memory that XLA's backends allocate during the update, as measured in docs/plan.md.

    CPU: gradients, a second copy of the optimizer state, and the largest parameter unsharded.
    GPU: a second copy of the gradients of sharded parameters, the largest one unsharded, and fragmentation.
    """
    params = jax.tree.leaves(local.core.abstract.params)
    stored = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(full.core.abstract.params)]
    is_sharded = any(math.prod(shape) < math.prod(leaf.shape) for shape, leaf in zip(stored, params, strict=True))
    largest = max((leaf.size * 4.0 for leaf in params if local.core.model.vocab_size in leaf.shape), default=0.0)
    gradients = 4.0 * sum(map(math.prod, stored))
    if platform == "cpu":
        held = gradients + largest + bytes_on_device(full.core.abstract.opt_state)
    elif platform == "cuda" and is_sharded:
        held = PACKED * (2 * gradients + largest)
    else:
        return
    kinds["gradients"] += max(0.0, held - sum(kinds.values()))


def _memory(full: Shapes, local: Shapes, found: Cost, platform: str) -> Memory:
    parameters = {leaf.shape for leaf in jax.tree.leaves(local.core.abstract.params)}
    vocabulary = local.core.model.vocab_size
    kinds = dict.fromkeys(("gradients", "activations", "logits", "temporary"), 0.0)

    def kind(held: LiveBuffer) -> str:
        if held.value.shape in parameters and np.issubdtype(held.value.dtype, np.floating):
            return "gradients"
        if len(held.value.shape) > 2 and vocabulary in held.value.shape:
            return "logits"
        return "activations" if held.stacked else "temporary"

    for held in found.held:
        kinds[kind(held)] += held.bytes
    _add_backend_overhead(kinds, full, local, platform)
    state = full.core.abstract
    return Memory(
        parameters=bytes_on_device(state.params),
        optimizer=bytes_on_device((state.opt_state, state.step, state.rng)),
        frozen=bytes_on_device(full.frozen),
        batch=bytes_on_device(full.batch),
        **kinds,
    )


# Communication


def bandwidth(target: Target, sizes: Mapping[str, int], axis: str) -> float:
    """Returns the send bandwidth of a device along a mesh axis in bytes/s. Later axes use the nearest devices."""
    inner = math.prod(sizes[a] for a in AXES[AXES.index(axis) + 1 :])
    hardware = target.hardware
    node_size = min(hardware.node, target.num_devices // target.num_slices)
    return (hardware.intra_node if inner * sizes[axis] <= node_size else hardware.inter_node) * NETWORK


def _traffic(config: RunConfig, target: Target, full: Shapes, sizes: Mapping[str, int]) -> list[Traffic]:
    model, task, found = full.core.model, config.task, []
    assert isinstance(task, TrainConfig)
    item = 4 if model.dtype.name == "float32" else 2
    stages, pipeline = product(sizes, config.sharding.layers), model.pipeline
    steps = turns = task.gradient_accumulation_steps
    layers, own_layers, at_once, rounds = model.num_layers, model.num_layers / stages, 1.0, 1
    if stages > 1:  # each turn runs the layers of one repeat on a microbatch; dense layers before them are ignored
        rounds, at_once = pipeline.num_repeats, stages / pipeline.num_microbatches
        layers = (layers - model.layers_before_experts) // (stages * rounds)
        turns *= pipeline.num_microbatches * rounds + stages - 1

    def add(axis: str, kind: str, what: str, count: float, size: float, *, hidden: bool) -> None:
        """`size`: unsharded bytes that each collective gathers or reduces."""
        n = sizes[axis]
        if n == 1 or not size or not count:
            return
        sent = size * (n - 1) / n * (2 if kind == "all-reduce" else 1)
        total = sent * count
        found.append(Traffic(axis, kind, what, int(count), total, total / bandwidth(target, sizes, axis), hidden))

    trained, read = full.core.abstract.params, full.frozen
    for axis in AXES:
        sharded = _stored_size(trained, axis, sharded=True) * sizes[axis]  # size when gathered along the axis
        gathered = sharded if full.core.adaptation is None else 0.0
        base = _stored_size(read, axis, sharded=True) * sizes[axis]
        if axis in config.sharding.embed:  # stored sharded, gathered for computation
            per_layer = turns * layers
            add(axis, "all-gather", "parameters", 2 * per_layer, gathered * item / 4 / own_layers, hidden=True)
            add(axis, "all-gather", "frozen parameters", per_layer, base / own_layers, hidden=True)
            add(axis, "reduce-scatter", "gradients", per_layer, sharded / own_layers, hidden=True)
        if axis in (*config.sharding.batch, *config.sharding.length):  # replicas with different tokens
            of_layers = _stored_size(trained.get("layers"), axis, sharded=False)
            ends = _stored_size(trained, axis, sharded=False) - of_layers
            # XLA reduces gradients in every iteration of the loop, not once after it.
            add(axis, "all-reduce", "gradients of layers", turns, of_layers / rounds, hidden=True)
            add(axis, "all-reduce", "gradients of the ends", steps, ends, hidden=True)
    tokens = at_once * math.prod(full.batch.tokens.shape) / product(sizes, config.sharding.batch) / steps
    row = tokens * model.embed_dim * item
    activation = row / product(sizes, config.sharding.length)
    passes = 2 if model.remat is Remat.none else 3  # forward, backward and recomputation
    for axis in config.sharding.heads:
        # Sequence parallelism replaces it by reduce-scatter and all-gather, which send the same number of bytes.
        count = turns * layers * 2 * (2 if model.remat is Remat.save_dots else passes)
        add(axis, "all-reduce", "activations", count, activation, hidden=False)
    for axis in config.sharding.layers:
        n = sizes[axis]
        moved = activation * n / max(n - 1, 1)  # each stage sends its full activation forward, and gradients back
        add(axis, "collective-permute", "activations", 2 * turns, moved, hidden=False)
        add(axis, "all-gather", "activations", 4 * steps, activation / at_once * n, hidden=False)
        if rounds > 1:  # moves weights from the devices that store layers to those that run them, and gradients back
            moved = bytes_on_device(trained.get("layers"))
            add(axis, "all-to-all", "weights and gradients", 2 * steps, moved, hidden=False)
    a = model.attention
    for axis in config.sharding.length:
        # Keys and values rotate around the ring; in the backward pass also their gradients, in f32.
        wide = row / model.embed_dim * a.num_kv_heads * (a.head_dim + (a.v_head_dim or a.head_dim))
        wide /= product(sizes, config.sharding.kv_heads)
        add(axis, "collective-permute", "keys and values", turns * layers * (passes - 1), wide, hidden=True)
        add(axis, "collective-permute", "and their gradients", turns * layers, wide * (1 + 4 / item), hidden=True)
    experts = model.moe
    if experts.num_experts:
        with_experts = layers if stages > 1 else layers - model.layers_before_experts
        for axis in config.sharding.experts:
            if experts.dispatch is Dispatch.dropless:
                count, size = turns * with_experts * passes, activation * sizes[axis]
                add(axis, "all-gather", "tokens", count, size, hidden=False)
                add(axis, "reduce-scatter", "tokens", count, size * 4 / item, hidden=False)
            else:
                sent = activation * experts.experts_per_token * experts.capacity_factor
                add(axis, "all-to-all", "tokens", 2 * turns * with_experts * passes, sent, hidden=False)
    return found


def _to_host(full: Shapes, found: Cost, hardware: Hardware) -> list[Traffic]:
    """Returns the transfers between device and host memory, in both directions."""
    optimizer = bytes_on_device(full.core.abstract.opt_state, on_host=True)
    both = ("optimizer", 2 * optimizer, False), ("activations", 2 * found.sent_away, True)
    speed = hardware.host * NETWORK
    return [Traffic("host", "copy", what, 2, size, size / speed, hidden) for what, size, hidden in both if size]


def _axes_of(leaf: Any) -> set[str]:
    entries = [e if isinstance(e, tuple) else (e,) for e in leaf.sharding.spec if e]
    return {axis for entry in entries for axis in entry}


def _stored_size(tree: Any, axis: str, *, sharded: bool) -> float:
    """Returns the bytes on one device of the parameters that are, or are not, sharded along `axis`."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if (axis in _axes_of(leaf)) == sharded
    )
