"""What a model weighs and costs, by formula: parameters, FLOPs, bytes of its cache.

Convention of FLOPs, for one token of training (forward and backward, so three times the forward pass; what remat
computes again is not counted): two for each weight of a matrix product that the token meets (of experts, those that it
is sent to), the output head included and the embedding look-up not; and for attention two products, as wide as all
heads together, over the keys that a query sees: in a causal model on average half of the row, or fewer in a window.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from models.config import AttentionMask, LayerKind, ModelConfig
from models.mtp import MTP
from models.transformer import abstract_params, param_axes

PARTS = ("embedding", "attention", "mlp", "router", "experts", "norms", "head", MTP)


class Sized(NamedTuple):
    """A parameter."""

    path: str
    part: str
    size: int
    active: int  # how many of its numbers one token meets


def num_params(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, and `total`; from shapes alone."""
    counts = dict.fromkeys(PARTS, 0)
    for parameter in _sizes(config):
        counts[parameter.part] += parameter.size
    return counts | {"total": sum(counts.values())}


def num_active_params(config: ModelConfig) -> int:
    """Parameters that one token meets: all, but of the experts those that it is sent to."""
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
    """Training FLOPs of one token in a row of `seq_len`; see the convention above.

    With so many numbers in `adapters`, all else is frozen, and of its products the one for their gradient is not made.
    """
    matrices = sum(p.active for p in _sizes(config) if p.path.endswith("/kernel"))
    head, a = config.embed_dim * (config.outputs or config.vocab_size), config.attention
    width = a.num_heads * (a.head_dim + (a.v_head_dim or a.head_dim))
    attention = sum(2 * width * k for k in _keys(config, seq_len))
    attention += config.mtp_num_layers * width * seq_len  # each module has a layer, and reads the head once more
    head *= 1 + config.mtp_num_layers
    if adapters is not None:
        return 2.0 * 2 * (matrices + head) + 3.0 * (attention + 2 * adapters)
    return 3.0 * (2 * (matrices + head) + attention)


def _keys(config: ModelConfig, seq_len: int) -> list[float]:
    """Keys that a query of each layer sees, on average over a row."""
    pattern = config.attention.layer_types
    seen = []
    for layer in range(config.num_layers):
        sliding = pattern[layer % len(pattern)] is LayerKind.sliding
        window = min(config.attention.sliding_window if sliding else seq_len, seq_len)
        # Query i sees min(i + 1, window) keys; the usual half of the row where the window covers it. An encoder's sees
        # as many after it. What a prompt's tokens see of what follows them is not counted.
        before = window - window**2 / (2 * seq_len)
        seen.append(2 * before if config.attention.mask is AttentionMask.bidirectional else before)
    return seen


def cache_bytes(config: ModelConfig, batch_size: int, num_slots: int) -> int:
    """Keys and values of all layers."""
    a = config.attention
    width = np.dtype("float32").itemsize if config.dtype.name == "float32" else 2
    both = a.head_dim + (a.v_head_dim or a.head_dim)
    return config.num_layers * batch_size * num_slots * a.num_kv_heads * both * width


def params_bytes(params: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
