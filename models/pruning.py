"""Narrower models out of wider ones: the most important heads, feed-forward units and dims of the residual stream.

What is cut together is that of Minitron (Muralidharan et al. 2024 [2407.14679], section 2): a key-value head goes with
its queries, a unit of the feed-forward layer with its gate, and a dim of the residual stream leaves every layer, the
embedding and the head at once. Importance needs no data: the squared L2 norm of all weights that read or write a unit
(after Li et al. 2016 [1608.08710], section 3.1), in f64 on the host, so that every mesh chooses the same; of equals the
first stays, and what stays keeps its order.

Shape letters: n layers, k kept, and those of `models.transformer`.
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
    """Of the student; null: as wide as where its weights come from."""

    embed_dim: int | None = None  # Dims of the residual stream to keep; null: all
    intermediate_dim: int | None = None  # Hidden dims of each feed-forward layer to keep; null: all
    num_heads: int | None = None  # Query heads to keep; null: all
    num_kv_heads: int | None = None  # Key-value heads to keep; null: all

    @property
    def active(self) -> bool:
        return any(getattr(self, f.name) is not None for f in fields(self))


@dataclass
class PruneConfig:
    """What a run keeps of the weights of `init_from`."""

    layers: list[int] = field(default_factory=list)  # Indices of the layers to keep, in this order; empty: all
    width: WidthConfig = field(default_factory=WidthConfig)  # Sizes to prune to, by weight norm


def widths(model: ModelConfig) -> dict[str, int]:
    """Of each dim that can be thinned, by its logical axis."""
    a = model.attention
    sizes = (model.embed_dim, model.mlp.intermediate_dim, a.num_heads, a.num_kv_heads)
    return dict(zip(WIDTHS, sizes, strict=True))


def pruned_config(model: ModelConfig, width: WidthConfig) -> ModelConfig:
    """`model` of that width. Raises: ValueError naming the key of one that cannot be."""
    if model.moe.num_experts or model.attention.mla.kv_lora_rank:
        raise ValueError(f"{KEY}: a model with experts or latent attention cannot be thinned out; leave it out")
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
            f"{KEY}.num_heads={now['heads']}: {groups} key-value heads have equally many queries each, at most "
            f"{group}; valid: {valid}, or another {KEY}.num_kv_heads"
        )
    if now["embed"] < before["embed"] and (model.scale_embeddings or model.norm is Norm.layer):
        which = "embeddings are multiplied by its root" if model.scale_embeddings else "layer norms take its mean"
        raise ValueError(
            f"{KEY}.embed_dim={now['embed']}: of this model all dims are needed, as {which}; thin the others"
        )
    attention = replace(model.attention, num_heads=now["heads"], num_kv_heads=now["kv_heads"])
    mlp = replace(model.mlp, intermediate_dim=now["mlp"])
    return replace(model, embed_dim=now["embed"], attention=attention, mlp=mlp)


@dataclass(frozen=True)
class Choice:
    """What stays."""

    indices: dict[str, np.ndarray]  # by axis: [k] of the residual stream, [n, k] of layers
    norm_factor: float  # of RMS norms: of the energy that is written to the stream, a share stays


def select_units(model: ModelConfig, thin: ModelConfig, params: Params, on_host: Callable[[Any], np.ndarray]) -> Choice:
    """What stays of `params`, of which `on_host` gives one array at a time."""
    before, now, axes = widths(model), widths(thin), param_axes(model)
    energy: dict[str, Any] = dict.fromkeys(WIDTHS, 0.0)
    written = np.zeros(before["embed"])
    flat = zip(jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True)
    for leaf, names in flat:
        if len(names) - ("layers" in names) < 2:  # of vectors every unit has one like any other
            continue
        square = np.square(on_host(leaf).astype(np.float64))
        for axis in WIDTHS:
            if axis in names:
                kept = (axis,) if axis == "embed" else ("layers", axis)
                energy[axis] = energy[axis] + square.sum(tuple(i for i, n in enumerate(names) if n not in kept))
        if names[-1] == "embed":
            written += square.sum(tuple(range(len(names) - 1)))
    indices = {axis: _largest(energy[axis], now[axis]) for axis in ("embed", "mlp")}
    indices |= _heads(energy["heads"], energy["kv_heads"], now["heads"], now["kv_heads"])
    share = written[indices["embed"]].sum() / max(written.sum(), 1e-300)
    whole = now["embed"] == before["embed"]
    return Choice(indices, 1.0 if whole else float(np.sqrt(share * before["embed"] / now["embed"])))


def _heads(heads_nN: np.ndarray, kv_nK: np.ndarray, num_heads: int, num_kv_heads: int) -> dict[str, np.ndarray]:
    """The best queries of each key-value head, and the best of these with them."""
    layers, K = kv_nK.shape
    of_kv_nKG = heads_nN.reshape(layers, K, -1)
    best_nKg = _largest(of_kv_nKG, num_heads // num_kv_heads)
    kv_nk = _largest(kv_nK + np.take_along_axis(of_kv_nKG, best_nKg, -1).sum(-1), num_kv_heads)
    chosen_nkg = np.take_along_axis(best_nKg, kv_nk[..., None], 1) + kv_nk[..., None] * of_kv_nKG.shape[-1]
    return {"heads": chosen_nkg.reshape(layers, -1), "kv_heads": kv_nk}


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest along the last dim, ascending; of equals the first."""
    return np.sort(np.argsort(-values, axis=-1, kind="stable")[..., :count], axis=-1)


def prune_params(model: ModelConfig, choice: Choice, params: Params) -> Params:
    """What stays of `params`.

    An RMS norm divides by a mean over the stream, which what was cut off had a part in: scales make up for it by the
    share of the squared weights written to the stream that stay. But for epsilon, exact where what is cut off was 0.
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
