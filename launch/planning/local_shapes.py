"""Abstract shapes of a run, globally and for one device, without data, weights or devices."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from configs.schema import RunConfig
from data.tokenizers.kinds import SentencePieceConfig
from launch.build import Core, build_core
from launch.weights_source import resolve_weights
from models.attention.kernels import without_kernel
from models.config import Dispatch, ModelConfig
from models.logical_axes import RESIDUAL, TOKENS, NoConstraint, ShardingConstraint
from models.transformer import abstract_params, make_apply, param_axes
from trainer.adapters import BASE
from trainer.host_offload import HOST
from trainer.mesh import MeshConfig, abstract_mesh
from trainer.objective import FrozenModel
from trainer.reliability.loss_spikes import NO_LIMITS
from trainer.sharding import ShardingRules, param_shardings, replicated, with_shardings

AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Arguments of the training step as shapes with shardings."""

    core: Core
    frozen: dict[str, Any]
    batch: Any

    @property
    def arguments(self) -> tuple[Any, Any, Any, Any]:
        limits = jax.ShapeDtypeStruct(NO_LIMITS.shape, NO_LIMITS.dtype, sharding=replicated(self.core.mesh))
        return self.core.abstract, self.frozen, self.batch, limits


def with_vocabulary(config: RunConfig) -> RunConfig:
    """Returns the config with the vocabulary size of its tokenizer.

    Raises: ValueError if the size is unknown before the tokenizer is trained.
    """
    if config.model.vocab_size:
        return config
    if not isinstance(config.tokenizer, SentencePieceConfig):
        raise ValueError(
            f"model.vocab_size=0: the vocabulary size of tokenizer={config.tokenizer.kind} is unknown until it is "
            "trained; set model.vocab_size"
        )
    model = dataclasses.replace(config.model, vocab_size=config.tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)


def shapes_of(
    config: RunConfig,
    mesh: AnyMesh,
    models: Mapping[str, ModelConfig] | None = None,
    constrain: ShardingConstraint | None = None,
) -> Shapes:
    """Returns the shapes of the run on a mesh. `models`: its `frozen_configs`. Raises: ValueError as `build_core`."""
    core = build_core(config, None, mesh, constrain)
    frozen: dict[str, Any] = {}
    if core.adaptation is not None:
        frozen[BASE] = core.adaptation.stored
    for role, needed in config.objective.frozen_needs.loaded.items():
        if needed.source is None:
            shared = core.adaptation is not None and config.adapter.quantize_base.name == "none"
            full_params = core.own if core.adaptation is None else core.adaptation.full_params
            if not needed.precompute:
                frozen[role] = frozen[BASE] if shared else full_params
        elif (model := (models or {}).get(role)) is not None:
            shardings = param_shardings(param_axes(model), abstract_params(model), mesh, config.sharding)
            params = {} if needed.precompute else with_shardings(abstract_params(model), shardings)
            frozen[role] = FrozenModel(params, make_apply(without_kernel(model), core.constrain), model.vocab_size)
    return Shapes(core, frozen, core.batch_spec(config.data.seq_len))


def frozen_configs(config: RunConfig) -> dict[str, ModelConfig]:
    """Returns the config of each frozen model with a separate source, by role. Reads no weights."""
    specs = config.objective.frozen_needs.loaded
    find = lambda source, key: resolve_weights(source, config.output_dir, lambda text: None, key=key).model
    return {role: find(spec.source, spec.key) for role, spec in specs.items() if spec.source is not None}


def share_of(config: RunConfig, sizes: Mapping[str, int]) -> RunConfig:
    """Returns the computation of one device as a config: its tokens, heads, hidden units, experts and vocabulary.

    The embedding dimension stays unsharded, because `fsdp` shards only storage and parameters are gathered for
    computation. The layers are those of one pipeline stage.
    """
    cut = lambda logical, size: _share(config.sharding, logical, sizes, size)
    batch_size, seq_len = cut("batch", config.data.batch_size), cut("length", config.data.seq_len)
    return dataclasses.replace(
        config,
        model=model_share(config.model, config.sharding, sizes),
        data=dataclasses.replace(config.data, batch_size=batch_size, seq_len=seq_len),
        mesh=MeshConfig(**{axis: 1 for axis in sizes}),
    )


def model_share(model: ModelConfig, rules: ShardingRules, sizes: Mapping[str, int]) -> ModelConfig:
    cut = lambda logical, size: _share(rules, logical, sizes, size)
    model = copy.deepcopy(model)
    model.attention.num_heads = cut("heads", model.attention.num_heads)
    model.attention.num_kv_heads = min(cut("kv_heads", model.attention.num_kv_heads), model.attention.num_heads)
    model.mlp.intermediate_dim = cut("mlp", model.mlp.intermediate_dim)
    model.vocab_size = cut("vocab", model.vocab_size)
    experts, first = model.moe, model.layers_before_experts
    model.num_layers = first + cut("layers", model.num_layers - first)
    if experts.num_experts:
        experts.intermediate_dim = cut("mlp", experts.intermediate_dim)
        experts.shared_intermediate_dim = (
            cut("mlp", experts.shared_intermediate_dim) if experts.shared_intermediate_dim else 0
        )
        experts.num_experts = max(cut("experts", experts.num_experts), experts.experts_per_token)
        experts.num_groups = experts.topk_groups = 1
    return model


def _share(rules: ShardingRules, logical: str, sizes: Mapping[str, int], size: int) -> int:
    """Returns the largest shard size of a dimension."""
    return -(-size // product(sizes, rules.axes_of(logical, "sharding")))


def product(sizes: Mapping[str, int], axes: Iterable[str]) -> int:
    """Returns the number of devices along these mesh axes."""
    return math.prod(sizes[axis] for axis in axes)


class OneShare(NoConstraint):
    """Emulates the sharded computation of one device of the mesh."""

    def __init__(
        self, copies: int, *, gathers: bool, length: int, pieces: int, stages: int, experts: int, platform: str
    ):
        """Sets the sharding to emulate.

        Args:
            copies: number of devices whose tokens are gathered for the experts of each device.
            gathers: whether parameters are gathered.
            length: tokens per row.
            pieces: number of shards of a row between layers (sequence parallelism).
            stages: number of pipeline stages.
            experts: number of expert shards.
            platform: cpu, cuda or tpu.
        """
        self.copies, self.gathers, self.length, self.stages = copies, gathers, length, stages
        self.experts, self._platform = experts, platform
        self.pieces = 1 if length % pieces else pieces  # as in the trainer, indivisible rows stay unsharded

    @property
    def platform(self) -> str:
        return self._platform

    def num_shards(self, name: str) -> int:
        return self.experts if name == "experts" else 1

    def __call__(self, x: jax.Array, axes: Any) -> jax.Array:
        if axes == RESIDUAL and x.shape[1] == self.length:
            return x[:, : self.length // self.pieces]
        if axes == TOKENS and x.shape[1] != self.length:
            return jnp.concatenate([x] * self.pieces, axis=1)
        if not self.gathers or "vocab" not in axes or "batch" in axes:
            return x
        return jax.lax.copy_p.bind(x[None])[0]  # unsharded embedding or head: a buffer distinct from the parameter

    def per_device(self, function: Any, axes: Any, *args: Any) -> jax.Array:
        if self.copies == 1 or not any("experts" in names for names in axes if names):
            return function({}, *args)
        gathered = lambda x, names: jnp.concatenate([x] * self.copies) if names and names[0] == "batch" else x
        rows = args[0].shape[0]
        return function({}, *(gathered(x, names) for x, names in zip(args, axes, strict=True)))[:rows]


def gathered_copies(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Returns the number of devices whose tokens are gathered for the experts: all along `experts` if dropless."""
    experts, rules = config.model.moe, config.sharding
    if not experts.num_experts or experts.dispatch is not Dispatch.dropless:
        return 1
    rows = rules.axes_of("batch", "sharding")
    return product(sizes, [axis for axis in rules.axes_of("experts", "sharding") if axis in rows])


def local_shapes(config: RunConfig, mesh: AnyMesh, models: Mapping[str, ModelConfig], platform: str) -> Shapes:
    """Returns the shapes of `share_of` the run on one device of the platform."""
    sizes, rules = dict(mesh.shape), config.sharding
    shares = {role: model_share(model, rules, sizes) for role, model in models.items()}
    local = share_of(config, sizes)
    pieces = product(sizes, [axis for axis in rules.residual if axis not in rules.length])
    alone = OneShare(
        gathered_copies(config, sizes),
        gathers=product(sizes, rules.embed) > 1,
        length=local.data.seq_len,
        pieces=pieces,
        stages=product(sizes, rules.layers),
        experts=product(sizes, rules.experts),
        platform=platform,
    )
    return shapes_of(local, abstract_mesh(MeshConfig(), 1), shares, alone)


def bytes_on_device(tree: Any, *, on_host: bool = False) -> float:
    """Returns the bytes of a tree of sharded shapes in the memory of one device, or of its host.

    A leaf that occurs more than once is counted once.
    """
    seen, total = set(), 0.0
    for leaf in jax.tree.leaves(tree):
        if id(leaf) in seen or (leaf.sharding.memory_kind == HOST) != on_host:
            continue
        seen.add(id(leaf))
        shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf.sharding, NamedSharding) else leaf.shape
        size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.dtype.itemsize
        total += math.prod(shape) * size
    return total
