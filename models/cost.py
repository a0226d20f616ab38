"""What a model weighs and costs, by formula: parameters, FLOPs, bytes of its cache.

Convention of FLOPs, for one token of training (forward and backward, so three times the forward pass; what remat
computes again is not counted): two for each weight of a matrix product, the output head included and the embedding
look-up not; and for attention two products of width N H over the keys that a causal query sees, on average half of
the row, or fewer in a sliding window.
"""

import math
from typing import Any

import jax
import numpy as np

from models.config import LayerKind, ModelConfig
from models.transformer import abstract_params

PARTS = ("embedding", "attention", "mlp", "norms", "head")


def num_params(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, and `total`; from shapes alone."""
    counts = dict.fromkeys(PARTS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        counts[_part(jax.tree_util.keystr(path, simple=True, separator="/"))] += math.prod(leaf.shape)
    return counts | {"total": sum(counts.values())}


def _part(path: str) -> str:
    names = path.split("/")
    if any(name.endswith("norm") for name in names):
        return "norms"
    for part in ("attention", "mlp", "head"):
        if part in names:
            return part
    return "embedding"


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs of one token in a row of `seq_len`; see the convention above."""
    matrices = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)["layers"]):
        if str(getattr(path[-1], "key", "")) == "kernel":
            matrices += math.prod(leaf.shape)
    head = config.embed_dim * config.vocab_size
    attention = sum(2 * 2 * config.attention.num_heads * config.attention.head_dim * k for k in _keys(config, seq_len))
    return 3.0 * (2 * (matrices + head) + attention)


def _keys(config: ModelConfig, seq_len: int) -> list[float]:
    """Keys that a query of each layer sees, on average over a row."""
    pattern = config.attention.pattern
    seen = []
    for layer in range(config.num_layers):
        sliding = pattern[layer % len(pattern)] is LayerKind.sliding
        window = min(config.attention.sliding_window if sliding else seq_len, seq_len)
        # Query i sees min(i + 1, window) keys; the usual half of the row where the window covers it.
        seen.append(window - window**2 / (2 * seq_len))
    return seen


def cache_bytes(config: ModelConfig, batch_size: int, num_slots: int) -> int:
    """Keys and values of all layers."""
    a = config.attention
    width = np.dtype("float32").itemsize if config.dtype.name == "float32" else 2
    return 2 * config.num_layers * batch_size * num_slots * a.num_kv_heads * a.head_dim * width


def params_bytes(params: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
