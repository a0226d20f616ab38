"""Prunes initial weights: fewer layers, a smaller width."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from configs.schema import RunConfig
from launch.weights_source import WeightsSource
from models.pruning import WidthConfig, prune_params, pruned_config, select_units, widths
from models.transformer import abstract_params, stacks
from trainer.checkpoint.checksums import on_host
from trainer.objective import Params
from trainer.sharding import replicated, with_shardings


def prune_source(source: WeightsSource, config: RunConfig) -> WeightsSource:
    """Prunes the weights to `prune.layers`, in this order, and to `prune.width`.

    Raises: ValueError for layers or a width that the model does not have.
    """
    source = _with_layers(source, config.prune.layers)
    return _with_width(source, config.prune.width) if config.prune.width.active else source


def _with_width(source: WeightsSource, width: WidthConfig) -> WeightsSource:
    wide = source.model
    pruned = pruned_config(wide, width)

    def params(abstract: Params, *progress: Any) -> Params:
        onto = jax.tree.leaves(abstract)[0].sharding.mesh
        sized = abstract_params(replace(wide, vocab_size=abstract["embedding"].shape[0]))
        # Sharded like the pruned parameters where the sizes allow it.
        sharded = lambda shape, leaf: _divisible(shape.shape, leaf.sharding, replicated(onto))
        full = source.params(with_shardings(sized, jax.tree.map(sharded, sized, abstract)), *progress)
        choice = select_units(wide, pruned, full, on_host)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(lambda params: prune_params(wide, choice, params), out_shardings=shardings)(full)

    sizes = ", ".join(f"{name} {now} of {widths(wide)[name]}" for name, now in widths(pruned).items())
    return replace(source, name=f"{source.name}, pruned to {sizes}", model=pruned, params=params, checkpoint=None)


def _divisible(shape: tuple[int, ...], sharding: Any, otherwise: Any) -> Any:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return otherwise
    return sharding


def _with_layers(source: WeightsSource, layers: list[int]) -> WeightsSource:
    """Keeps only these layers, in this order; an empty list keeps all.

    Raises: ValueError for layers that the model does not have.
    """
    if not layers:
        return source
    model, n = source.model, source.model.num_layers
    wrong = [i for i in layers if not 0 <= i < n]
    if wrong:
        raise ValueError(f"prune.layers={layers}: {source.name} has layers 0 to {n - 1}, not {wrong[0]}")
    if len(stacks(model)) > 1:
        raise ValueError(f"prune.layers={layers}: {source.name} has two kinds of layers, which cannot be pruned")
    cut = lambda pattern: [pattern[i % len(pattern)] for i in layers]
    pruned = replace(
        model,
        num_layers=len(layers),
        attention=replace(model.attention, layer_types=cut(model.attention.layer_types)),
        rope=replace(model.rope, layer_pattern=cut(model.rope.layer_pattern)),
    )

    def params(abstract: Params, *progress: Any) -> Params:
        deep = lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
        full = source.params({**abstract, "layers": jax.tree.map(deep, abstract["layers"])}, *progress)
        take = lambda tree: {**tree, "layers": jax.tree.map(lambda x: x[np.array(layers)], tree["layers"])}
        return jax.jit(take, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(full)

    name = f"{source.name}, {len(layers)} of its {n} layers"
    return replace(source, name=name, model=pruned, params=params, checkpoint=None)
