"""The mesh, the microbatches, the remat and the offload under which a run is fastest and fits, by arithmetic."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from configs.schema import RunConfig
from configs.tasks import TrainConfig
from launch.planning.estimate import Plan, estimate
from launch.planning.hardware import Target, present
from launch.planning.local_shapes import frozen_configs, product
from models.config import ActivationOffload, ModelConfig, Remat
from trainer.mesh import AXES, MeshConfig, mesh_sizes

REMATS = (Remat.none, Remat.save_dots, Remat.full)  # the less is computed again, the faster
LOOKED_INTO = 3  # meshes of which every setting is tried: those that begin best
ROWS = (1, 2, 4, 8)  # of a batch for each device that has rows of its own, where the batch is free
MICROBATCHES = (1, 2, 4, 8, 16)

Tell = Callable[[int, int], None]


class Choice(NamedTuple):
    """A config and what it gives."""

    config: RunConfig
    plan: Plan


class Free(NamedTuple):
    """What a search may change."""

    mesh: bool = True
    remat: bool = False  # and what goes to the memory of the host
    turns: bool = False  # the microbatches that a batch is cut in
    batch: bool = False  # the batch size


def search(config: RunConfig, target: Target, free: Free, tell: Tell = lambda done, of: None) -> list[Choice]:
    """The best meshes, each with the lightest remat and the fewest microbatches under which it fits, the fastest first;
    where none fits, with what can lie on the host there; and if none fits even so, the smallest.

    Raises: ValueError where no mesh goes together with model and batch, with the last reason.
    """
    models, refused = frozen_configs(config), ValueError("no mesh")
    if free.mesh:
        meshes = list(candidates(config, target))
    else:
        meshes = [MeshConfig(**dict(zip(AXES, mesh_sizes(config.mesh, target.num_devices), strict=True)))]
    fitting: list[Choice] = []
    begun: list[Choice] = []  # each mesh as small as it goes
    ways = [(config, free)]
    if free.remat:
        ways.append((offloading(config), free._replace(remat=False)))
    for config, free in ways:
        for done, mesh in enumerate(meshes):
            tell(done, len(meshes) + LOOKED_INTO)
            try:
                begun.append(_smallest(config, target, mesh, free, models))
            except ValueError as error:
                refused = error
        fitting = sorted((c for c in begun if c.plan.fits), key=lambda choice: -choice.plan.tokens_per_second)
        if fitting:
            break
    if not begun:
        raise refused
    if not fitting:
        return sorted(begun, key=lambda choice: choice.plan.memory.total)
    found = fitting[LOOKED_INTO:]
    for done, choice in enumerate(fitting[:LOOKED_INTO]):
        tell(len(meshes) + done, len(meshes) + LOOKED_INTO)
        found += _with_mesh(config, target, choice.config.mesh, free, models)
    tell(1, 1)
    return sorted(found, key=lambda choice: -choice.plan.tokens_per_second)


def candidates(config: RunConfig, target: Target) -> Iterator[MeshConfig]:
    """Meshes worth a look: `tensor` within the fast links, `expert` where there are experts, `stage` between nodes or
    slices, `fsdp` for all that is left or for one node or slice of it, with copies in `data`.
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
        inside = math.gcd(rest, max(1, fast // (tensor * expert)))
        for fsdp in sorted({rest, inside, 1}, reverse=True):
            yield MeshConfig(**{axis: 1 for axis in AXES} | {
                "stage": stage, "data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "expert": expert
            })  # fmt: skip


def _sharing(config: RunConfig, mesh: MeshConfig) -> int:
    """Devices that have rows of their own."""
    return product(vars(mesh), config.sharding.batch)


def _smallest(
    config: RunConfig, target: Target, mesh: MeshConfig, free: Free, models: Mapping[str, ModelConfig]
) -> Choice:
    sharing = _sharing(config, mesh)
    batch = sharing if free.batch else config.data.batch_size
    turns, remat = list(_settings(config, batch // sharing, free))[-1]
    chosen = with_mesh(config, mesh, batch, turns, remat)
    return Choice(chosen, estimate(chosen, target, models))


def _with_mesh(
    config: RunConfig, target: Target, mesh: MeshConfig, free: Free, models: Mapping[str, ModelConfig]
) -> Iterator[Choice]:
    """For each size of the batch that fits the least work: the first remat that does, then microbatches."""
    sharing = _sharing(config, mesh)
    for batch in [rows * sharing for rows in ROWS] if free.batch else [config.data.batch_size]:
        for turns, remat in _settings(config, batch // sharing, free):
            chosen = with_mesh(config, mesh, batch, turns, remat)
            choice = Choice(chosen, estimate(chosen, target, models))
            if choice.plan.fits:
                yield choice
                break
        else:
            return  # nor will more rows


def _settings(config: RunConfig, rows: int, free: Free) -> Iterator[tuple[int, Remat]]:
    """Microbatches and remat, the fastest first, the smallest last."""
    assert isinstance(config.task, TrainConfig)
    remats = REMATS if free.remat else (config.model.remat,)
    # A free batch is made smaller instead of being cut.
    turns = [n for n in MICROBATCHES if rows and rows % n == 0] if free.turns and not free.batch else []
    yield from ((n, remat) for n in turns or [config.task.gradient_accumulation_steps] for remat in remats)


def offloading(config: RunConfig) -> RunConfig:
    """The config with full remat, the optimizer's state and the borders of layers in the memory of the host."""
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
    """The config with the mesh that `mesh=auto` stands for, for `model` on the devices of this job.

    Raises: ValueError where none goes together with model and batch.
    """
    if not config.mesh.auto:
        return config
    best = search(replace(config, model=model), present(), Free())[0]
    shape = " ".join(f"mesh.{axis}={size}" for axis, size in best.plan.mesh.items() if size > 1) or "one device"
    about = f"about {best.plan.memory.total / 1e9:.2f} GB a device"
    say(
        f"mesh=auto: {shape}; {about}"
        + ("" if best.plan.fits else f", of {best.plan.capacity / 1e9:.2f} GB: it may not fit")
    )
    return replace(config, mesh=best.config.mesh)
