"""muP: scales initialization and learning rates with width, so that hyperparameters transfer across widths.

Yang, Hu et al. 2022 [2203.03466], table 3, in the form without forward multipliers, so that a trained model is a
standard model for all other code. m is `embed_dim / mup_base_width`; all widths are assumed to scale with it: number of
heads, feed-forward layers, experts, latent ranks. Factors of `init_std` and of the learning rate, 1 at m = 1:

    weights                                                  init_std     Adam, Lion    SGD    Muon (its matrices)
    input: tokens or positions to width                          1            1          m
    hidden: width to width                                    m ** -1/2     1 / m        1     m ** -1/2, or 1
    output: width to vocabulary, experts or scores              1 / m       1 / m      1 / m   1 / m, or m ** -1/2
    vector: biases and norm scales                               1            1          m
    finite: vectors of fixed size (router bias)                  1            1          1

The factors of Muon follow from the target spectral norm of an update, sqrt(fan-out / fan-in) (Yang, Simon & Bernstein
2023 [2310.17813], condition 1): the first with `consistent_rms`, whose updates grow by sqrt(m), the second without.

Two options need a stored scale c, because one embedding is used at both ends or is multiplied by sqrt(width). A weight
stored as c times the weight of the table is initialized at c times its init, with c times its Adam learning rate and
c^2 times its SGD learning rate:

- tied embeddings: logits must be m times smaller than the embedding makes them (the paper's table 8 uses a multiplier).
  The scale of the final norm holds that factor instead; a score head, which also reads the final norm, compensates.
- `scale_embeddings`: the embedding is stored with c = m ** -1/2.

Attention scores must shrink as 1 / head_dim. They do if only the number of heads grows; if `head_dim` grows from H0,
set `attention.scale = H0 ** 0.5 / head_dim`. Depth is not scaled.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from models.config import ModelConfig

WIDE = ("embed", "heads", "kv_heads", "mlp", "latent")  # logical axes that scale with width
STACKED = ("layers", "experts")


class Kind(enum.Enum):
    """Rows of the table: the class of a weight."""

    input = "input"
    hidden = "hidden"
    output = "output"
    vector = "vector"
    finite = "finite"


def weight_kind(axes: Sequence[str], *, vector: bool = False) -> Kind:
    """Returns the kind of a weight with these logical axes. `vector`: a bias or norm scale of any rank."""
    names = [name for name in axes if name not in STACKED]
    wide = [name in WIDE for name in names]
    if vector or len(names) < 2:
        return Kind.vector if any(wide) else Kind.finite
    reads, writes = wide[0], any(wide[1:])
    return {(False, True): Kind.input, (True, True): Kind.hidden, (True, False): Kind.output}.get(
        (reads, writes), Kind.finite
    )


def init_factor(config: ModelConfig, axes: Sequence[str]) -> float:
    """Returns the init_std factor of a matrix with these logical axes."""
    m = config.width_ratio
    if tuple(axes) == ("vocab", "embed"):
        return table_factor(config)
    return {Kind.hidden: m**-0.5, Kind.output: 1 / m}.get(weight_kind(axes), 1.0)


def table_factor(config: ModelConfig) -> float:
    """Returns the stored scale c of the token embedding."""
    return config.width_ratio**-0.5 if config.scale_embeddings else 1.0


def final_norm_factor(config: ModelConfig) -> float:
    """Returns the stored scale c of the final norm, which is its initial value."""
    return 1 / (config.width_ratio * table_factor(config)) if config.tied_embeddings else 1.0


def stored_scale(config: ModelConfig, path: str) -> float:
    """Returns the stored scale c of the parameter at `path` ('final_norm/scale')."""
    if path == "embedding":
        return table_factor(config)
    if "final_norm" in path.split("/"):
        return final_norm_factor(config)
    return 1 / final_norm_factor(config) if path == "score" else 1.0


# Sizes ------------------------------------------------------------------------------------------------------------

COUNTS = ("attention.num_heads", "attention.num_kv_heads")
WIDTHS = ("mlp.intermediate_dim", "moe.intermediate_dim", "moe.shared_intermediate_dim")
RANKS = ("attention.mla.kv_lora_rank", "attention.mla.q_lora_rank")
ROUNDED = 8  # widths other than embed_dim are rounded to a multiple of it


def width_keys(config: ModelConfig, embed_dim: int) -> dict[str, int]:
    """Returns the config keys that scale `config` to `embed_dim`: all widths in proportion, head_dim unchanged.

    Raises: ValueError with the valid widths if the number of heads would not be an integer.
    """
    counts = [_at(config, key) for key in COUNTS]
    unit = config.embed_dim // math.gcd(config.embed_dim, *counts)
    if embed_dim < 1 or embed_dim % unit:
        raise ValueError(
            f"model.embed_dim={embed_dim}: scaled from {config.embed_dim} with {counts[0]} heads and {counts[1]} "
            f"key-value heads, the number of heads must be an integer; valid: multiples of {unit}"
        )
    found = {"embed_dim": embed_dim}
    for key in (*COUNTS, *WIDTHS, *RANKS):
        value = _at(config, key)
        unused = key.startswith("moe.") and not config.moe.num_experts
        if not value or unused or embed_dim == config.embed_dim:
            continue
        scaled = value * embed_dim / config.embed_dim
        found[key] = round(scaled) if key in COUNTS else max(1, round(scaled / ROUNDED)) * ROUNDED
    return found


def scale_to_width(config: ModelConfig, embed_dim: int) -> ModelConfig:
    """Returns `config` scaled by `width_keys`. Raises: ValueError as `width_keys`."""
    for key, value in width_keys(config, embed_dim).items():
        config = _with(config, key, value)
    return config


def _at(config: Any, key: str) -> int:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _with(config: Any, key: str, value: int) -> Any:
    first, _, rest = key.partition(".")
    return replace(config, **{first: _with(getattr(config, first), rest, value) if rest else value})
