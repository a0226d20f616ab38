"""Parameter counts, training FLOPs and cache sizes of a model, by formula.

Convention for FLOPs of one training token (forward and backward, three times the forward pass; recomputation by remat
is not counted): two per weight of each matmul applied to the token (only the experts it is routed to), including the
output head and excluding the embedding look-up; plus two attention matmuls over the visible keys of a query, with the
total width of all heads: on average half of the row in a causal model, fewer with a window.
"""

import math
from typing import Any, NamedTuple

import jax

from models.config import ModelConfig
from models.logical_axes import no_constraint
from models.mixers.mixer_registry import mixer_class, mixer_flops
from models.mtp import MTP
from models.transformer import abstract_params, param_axes

PARTS = ("embedding", "attention", "mlp", "router", "experts", "norms", "head", MTP)


class Sized(NamedTuple):
    """Size of a parameter."""

    path: str
    part: str
    size: int
    active: int  # elements used per token


def num_params(config: ModelConfig) -> dict[str, int]:
    """Returns parameter counts by part, and `total`, from shapes only."""
    counts = dict.fromkeys(PARTS, 0)
    for parameter in _sizes(config):
        counts[parameter.part] += parameter.size
    return counts | {"total": sum(counts.values())}


def num_active_params(config: ModelConfig) -> int:
    """Returns the active parameters per token: all, with only the experts that a token is routed to."""
    return sum(parameter.active for parameter in _sizes(config))


def _sizes(config: ModelConfig) -> list[Sized]:
    axes = jax.tree.leaves(param_axes(config), is_leaf=lambda x: isinstance(x, tuple))
    leaves, found = jax.tree_util.tree_leaves_with_path(abstract_params(config)), []
    for (path, leaf), names in zip(leaves, axes, strict=True):
        size = active = math.prod(leaf.shape)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        part = _part(name.split("/"))
        if "experts" in names:
            active = size // config.moe.num_experts * config.moe.experts_per_token
            part = "experts"
        part = MTP if name.startswith(MTP) else part
        found.append(Sized(name, part, size, active))
    return found


def _part(names: list[str]) -> str:
    if any(name.endswith("norm") for name in names):
        return "norms"
    if "router" in names or "balance_bias" in names:
        return "router"
    if "score" in names:
        return "head"
    for part in ("attention", "mlp", "head"):
        if part in names:
            return part
    return "embedding"


def flops_per_token(config: ModelConfig, seq_len: int, adapters: int | None = None) -> float:
    """Returns training FLOPs per token in rows of `seq_len` tokens; see the convention above.

    `adapters`: number of adapter parameters; all other weights are frozen and their gradients are not computed.
    """
    matrices = sum(p.active for p in _sizes(config) if p.path.endswith("/kernel"))
    head = config.embed_dim * (config.num_labels or config.vocab_size)
    head *= 1 + config.mtp_num_layers  # each MTP module applies the head once
    mixers = mixer_flops(config, seq_len)
    if adapters is not None:
        return 2.0 * 2 * (matrices + head) + 3.0 * (mixers + 2 * adapters)
    return 3.0 * (2 * (matrices + head) + mixers)


def cache_bytes(config: ModelConfig, batch_size: int, num_slots: int) -> int:
    """Returns the bytes of the decoding cache of all layers, for `num_slots` tokens per row of a batch."""
    one = lambda i: mixer_class(config, i).init_cache(config, batch_size, num_slots, no_constraint)
    return params_bytes(jax.eval_shape(lambda: [one(i) for i in range(config.num_layers)]))


def params_bytes(params: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
