"""Searches for the fastest mesh, microbatch count, remat policy and offloading that fit into memory."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from configs.schema import RunConfig
from configs.tasks import TrainConfig
from launch.planning.estimate import Plan, estimate
from launch.planning.hardware import Target, local_target
from launch.planning.local_shapes import frozen_configs, product
from models.config import ActivationOffload, ModelConfig, Remat
from trainer.mesh import AXES, MeshConfig, mesh_sizes

REMATS = (Remat.none, Remat.save_dots, Remat.full)  # fastest first
REFINED = 3  # number of best meshes for which all settings are tried
ROWS = (1, 2, 4, 8)  # rows per data-parallel device to try if the batch size is free
MICROBATCHES = (1, 2, 4, 8, 16)

Progress = Callable[[int, int], None]  # called with steps done and total


class Choice(NamedTuple):
    """A config and its plan."""

    config: RunConfig
    plan: Plan


class Free(NamedTuple):
    """Settings that a search may change."""

    mesh: bool = True
    remat: bool = False  # remat policy and host offloading
    turns: bool = False  # number of microbatches (gradient accumulation steps)
    batch: bool = False  # the batch size


def search(
    config: RunConfig, target: Target, free: Free, progress: Progress = lambda done, total: None
) -> list[Choice]:
    """Returns the best choices, fastest first.

    Each mesh gets the lightest remat and the fewest microbatches that fit. If nothing fits, tries host offloading; if
    still nothing fits, returns the choices by memory, smallest first.

    Raises: ValueError with the last reason if no mesh is compatible with model and batch.
    """
    models, refused = frozen_configs(config), ValueError("no mesh")
    if free.mesh:
        meshes = list(candidates(config, target))
    else:
        meshes = [MeshConfig(**dict(zip(AXES, mesh_sizes(config.mesh, target.num_devices), strict=True)))]
    fitting: list[Choice] = []
    smallest: list[Choice] = []  # each mesh with the settings that use the least memory
    variants = [(config, free)]
    if free.remat:
        variants.append((offloading(config), free._replace(remat=False)))
    for config, free in variants:
        for done, mesh in enumerate(meshes):
            progress(done, len(meshes) + REFINED)
            try:
                smallest.append(_smallest(config, target, mesh, free, models))
            except ValueError as error:
                refused = error
        fitting = sorted((c for c in smallest if c.plan.fits), key=lambda choice: -choice.plan.tokens_per_second)
        if fitting:
            break
    if not smallest:
        raise refused
    if not fitting:
        return sorted(smallest, key=lambda choice: choice.plan.memory.total)
    found = fitting[REFINED:]
    for done, choice in enumerate(fitting[:REFINED]):
        progress(len(meshes) + done, len(meshes) + REFINED)
        found += _refine(config, target, choice.config.mesh, free, models)
    progress(1, 1)
    return sorted(found, key=lambda choice: -choice.plan.tokens_per_second)


def candidates(config: RunConfig, target: Target) -> Iterator[MeshConfig]:
    """Yields candidate meshes.

    `tensor` stays within the fast interconnect, `expert` is used for MoE models, `stage` spans nodes or slices, and
    `fsdp` takes all remaining devices, or those of one node or slice with replicas along `data`.
    """
    model, n = config.model, target.num_devices
    fast = min(target.hardware.node, n // target.num_slices)
    layers = model.num_layers - model.layers_before_experts
    stages = [s for s in (1, 2, 4) if layers % s == 0 and n % s == 0 and (s == 1 or n // s >= fast)]
    most = math.gcd(model.attention.num_kv_heads, model.attention.num_heads)
    tensors = [t for t in (1, 2, 4, 8, 16) if n % t == 0 and t <= fast and most % t == 0]
    count = model.moe.num_experts or 1
    dividing = [e for e in (1, 2, 4, 8, 16, 32, 64) if count % e == 0 and n % e == 0]
    experts = [e for e in dividing if count // e <= 32] or dividing[-1:]
    for stage, tensor, expert in itertools.product(stages, tensors, experts):
        if n % (stage * tensor * expert):
            continue
        rest = n // (stage * tensor * expert)
        in_node = math.gcd(rest, max(1, fast // (tensor * expert)))
        for fsdp in sorted({rest, in_node, 1}, reverse=True):
            yield MeshConfig(**{axis: 1 for axis in AXES} | {
                "stage": stage, "data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "expert": expert
            })  # fmt: skip


def _data_parallel_size(config: RunConfig, mesh: MeshConfig) -> int:
    """Returns the number of shards of the batch."""
    return product(vars(mesh), config.sharding.batch)


def _smallest(
    config: RunConfig, target: Target, mesh: MeshConfig, free: Free, models: Mapping[str, ModelConfig]
) -> Choice:
    shards = _data_parallel_size(config, mesh)
    batch = shards if free.batch else config.data.batch_size
    turns, remat = list(_settings(config, batch // shards, free))[-1]
    chosen = with_mesh(config, mesh, batch, turns, remat)
    return Choice(chosen, estimate(chosen, target, models))


def _refine(
    config: RunConfig, target: Target, mesh: MeshConfig, free: Free, models: Mapping[str, ModelConfig]
) -> Iterator[Choice]:
    """Yields, for each batch size that fits, the first fitting setting in order of speed."""
    shards = _data_parallel_size(config, mesh)
    for batch in [rows * shards for rows in ROWS] if free.batch else [config.data.batch_size]:
        for turns, remat in _settings(config, batch // shards, free):
            chosen = with_mesh(config, mesh, batch, turns, remat)
            choice = Choice(chosen, estimate(chosen, target, models))
            if choice.plan.fits:
                yield choice
                break
        else:
            return  # larger batches do not fit either


def _settings(config: RunConfig, rows: int, free: Free) -> Iterator[tuple[int, Remat]]:
    """Yields microbatch counts and remat policies, fastest first, lowest memory last."""
    assert isinstance(config.task, TrainConfig)
    remats = REMATS if free.remat else (config.model.remat,)
    # A free batch size is reduced instead of splitting the batch.
    turns = [n for n in MICROBATCHES if rows and rows % n == 0] if free.turns and not free.batch else []
    yield from ((n, remat) for n in turns or [config.task.gradient_accumulation_steps] for remat in remats)


def offloading(config: RunConfig) -> RunConfig:
    """Returns the config with full remat, and optimizer state and layer inputs offloaded to host memory."""
    config = copy.deepcopy(config)
    config.optimizer.offload_state, config.model.activation_offload, config.model.remat = (
        True,
        [ActivationOffload.layer_input],
        Remat.full,
    )
    return config


def with_mesh(config: RunConfig, mesh: MeshConfig, batch: int, turns: int, remat: Remat) -> RunConfig:
    config = copy.deepcopy(config)
    assert isinstance(config.task, TrainConfig)
    config.mesh, config.data.batch_size, config.task.gradient_accumulation_steps = mesh, batch, turns
    config.model.remat = remat
    return config


def resolve_auto_mesh(config: RunConfig, model: ModelConfig, say: Callable[[str], None]) -> RunConfig:
    """Resolves `mesh=auto` for `model` on the devices of this job. Returns the updated config.

    Raises: ValueError if no mesh is compatible with model and batch.
    """
    if not config.mesh.auto:
        return config
    best = search(replace(config, model=model), local_target(), Free())[0]
    shape = " ".join(f"mesh.{axis}={size}" for axis, size in best.plan.mesh.items() if size > 1) or "one device"
    memory = f"about {best.plan.memory.total / 1e9:.2f} GB per device"
    say(
        f"mesh=auto: {shape}; {memory}"
        + ("" if best.plan.fits else f" of {best.plan.capacity / 1e9:.2f} GB available: it may not fit")
    )
    return replace(config, mesh=best.config.mesh)
