"""Structured width pruning: keeps the most important heads, feed-forward units and residual dims.

Units are pruned in groups as in Minitron (Muralidharan et al. 2024 [2407.14679], section 2): a key-value head with its
queries, a feed-forward unit with its gate, and a residual dim in every layer, the embedding and the head. Importance
needs no data: it is the squared L2 norm of all weights that read or write a unit (Li et al. 2016 [1608.08710], section
3.1), in f64 on the host, so the selection does not depend on the mesh. Ties keep the first unit; order is preserved.

Shape letters: n layers, k kept units, and those of `models.transformer`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig, Norm
from models.transformer import Params, param_axes

WIDTHS = {"embed": "embed_dim", "mlp": "intermediate_dim", "heads": "num_heads", "kv_heads": "num_kv_heads"}
KEY = "prune.width"


@dataclass
class WidthConfig:
    """Widths to prune to; null keeps the width of the source model."""

    embed_dim: int | None = None  # Dims of the residual stream to keep; null: all
    intermediate_dim: int | None = None  # Hidden dims of each feed-forward layer to keep; null: all
    num_heads: int | None = None  # Query heads to keep; null: all
    num_kv_heads: int | None = None  # Key-value heads to keep; null: all

    @property
    def active(self) -> bool:
        return any(getattr(self, f.name) is not None for f in fields(self))


@dataclass
class PruneConfig:
    """Layers and widths of `init_from` to keep."""

    layers: list[int] = field(default_factory=list)  # Indices of the layers to keep, in this order; empty: all
    width: WidthConfig = field(default_factory=WidthConfig)  # Sizes to prune to, by weight norm


def widths(model: ModelConfig) -> dict[str, int]:
    """Returns the sizes of all prunable dims by logical axis."""
    a = model.attention
    sizes = (model.embed_dim, model.mlp.intermediate_dim, a.num_heads, a.num_kv_heads)
    return dict(zip(WIDTHS, sizes, strict=True))


def pruned_config(model: ModelConfig, width: WidthConfig) -> ModelConfig:
    """Returns `model` pruned to `width`. Raises: ValueError naming an invalid key."""
    if model.moe.num_experts or model.attention.mla.kv_lora_rank:
        raise ValueError(f"{KEY}: width pruning does not support models with experts or latent attention; remove it")
    before, now = widths(model), {}
    for axis, key in WIDTHS.items():
        wanted = getattr(width, key)
        now[axis] = before[axis] if wanted is None else wanted
        if not 1 <= now[axis] <= before[axis]:
            raise ValueError(f"{KEY}.{key}={wanted}: the model has {before[axis]}; valid: 1 to {before[axis]}")
    group, groups = before["heads"] // before["kv_heads"], now["kv_heads"]
    if now["heads"] % groups or now["heads"] // groups > group:
        valid = [groups * size for size in range(1, group + 1)]
        raise ValueError(
            f"{KEY}.num_heads={now['heads']}: {groups} key-value heads need equal numbers of queries, at most "
            f"{group} each; valid: {valid}, or another {KEY}.num_kv_heads"
        )
    if now["embed"] < before["embed"] and (model.scale_embeddings or model.norm is Norm.layer):
        which = (
            "embeddings are scaled by its square root" if model.scale_embeddings else "layer norm subtracts its mean"
        )
        raise ValueError(
            f"{KEY}.embed_dim={now['embed']}: cannot be pruned in this model, because {which}; prune other widths"
        )
    attention = replace(model.attention, num_heads=now["heads"], num_kv_heads=now["kv_heads"])
    mlp = replace(model.mlp, intermediate_dim=now["mlp"])
    return replace(model, embed_dim=now["embed"], attention=attention, mlp=mlp)


@dataclass(frozen=True)
class Choice:
    """Units to keep."""

    indices: dict[str, np.ndarray]  # kept units by axis: [k] for the residual stream, [n, k] for layers
    norm_factor: float  # correction of RMS norm scales for the removed share of the residual stream


def select_units(model: ModelConfig, thin: ModelConfig, params: Params, on_host: Callable[[Any], np.ndarray]) -> Choice:
    """Selects the units of `params` to keep; `on_host` fetches one array at a time."""
    before, now, axes = widths(model), widths(thin), param_axes(model)
    energy: dict[str, Any] = dict.fromkeys(WIDTHS, 0.0)
    written = np.zeros(before["embed"])
    flat = zip(jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True)
    for leaf, names in flat:
        if len(names) - ("layers" in names) < 2:  # vectors have one entry per unit and do not rank units
            continue
        square = np.square(on_host(leaf).astype(np.float64))
        for axis in WIDTHS:
            if axis in names:
                dims = (axis,) if axis == "embed" else ("layers", axis)
                energy[axis] = energy[axis] + square.sum(tuple(i for i, n in enumerate(names) if n not in dims))
        if names[-1] == "embed":
            written += square.sum(tuple(range(len(names) - 1)))
    indices = {axis: _largest(energy[axis], now[axis]) for axis in ("embed", "mlp")}
    indices |= _heads(energy["heads"], energy["kv_heads"], now["heads"], now["kv_heads"])
    share = written[indices["embed"]].sum() / max(written.sum(), 1e-300)
    unpruned = now["embed"] == before["embed"]
    return Choice(indices, 1.0 if unpruned else float(np.sqrt(share * before["embed"] / now["embed"])))


def _heads(heads_nN: np.ndarray, kv_nK: np.ndarray, num_heads: int, num_kv_heads: int) -> dict[str, np.ndarray]:
    """Selects the best queries of each key-value head, then the best key-value heads with these queries."""
    layers, K = kv_nK.shape
    of_kv_nKG = heads_nN.reshape(layers, K, -1)
    best_nKg = _largest(of_kv_nKG, num_heads // num_kv_heads)
    kv_nk = _largest(kv_nK + np.take_along_axis(of_kv_nKG, best_nKg, -1).sum(-1), num_kv_heads)
    chosen_nkg = np.take_along_axis(best_nKg, kv_nk[..., None], 1) + kv_nk[..., None] * of_kv_nKG.shape[-1]
    return {"heads": chosen_nkg.reshape(layers, -1), "kv_heads": kv_nk}


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the largest values along the last dim, ascending; ties keep the first."""
    return np.sort(np.argsort(-values, axis=-1, kind="stable")[..., :count], axis=-1)


def prune_params(model: ModelConfig, choice: Choice, params: Params) -> Params:
    """Returns `params` reduced to the selected units.

    An RMS norm divides by a mean over the residual stream, including the pruned dims. Norm scales are corrected by the
    kept share of the squared weights written to the stream, which is exact up to epsilon if the pruned dims were 0.
    """
    lift = 1.0 if model.norm_unit_offset else 0.0

    def take(path: Any, leaf: jax.Array, names: tuple[str, ...]) -> jax.Array:
        for dim, name in enumerate(names):
            if name == "embed":
                leaf = jnp.take(leaf, choice.indices[name], axis=dim)
            elif name in choice.indices:
                at = choice.indices[name].reshape([len(leaf), *[1] * (dim - 1), -1, *[1] * (leaf.ndim - dim - 1)])
                leaf = jnp.take_along_axis(leaf, jnp.asarray(at), axis=dim)
        is_norm = names[-1] == "embed" and path[-1].key == "scale"
        return (leaf + lift) * choice.norm_factor - lift if is_norm and choice.norm_factor != 1 else leaf

    return jax.tree_util.tree_map_with_path(take, params, param_axes(model))
