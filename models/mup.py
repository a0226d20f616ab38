"""Width transfer (muP): what follows from a model's width, so that what was tuned at one width holds at others.

Yang, Hu et al. 2022 [2203.03466], table 3, the form without multipliers in the forward pass, so that a trained model is
a plain one to everything that reads it. m is `embed_dim / base_width`, and all widths are taken to grow by it: heads in
number, feed-forward layers, experts, latent ranks. Factors on `init_std` and on the learning rate, 1 at m = 1:

    weights                                                  init_std     Adam, Lion    SGD    Muon (its matrices)
    input: from tokens or positions to the width                 1            1          m
    hidden: from width to width                               m ** -1/2     1 / m        1     m ** -1/2, or 1
    output: from the width to words, experts or scores          1 / m       1 / m      1 / m   1 / m, or m ** -1/2
    vector: biases and norm scales                               1            1          m
    finite: vectors that no width lengthens (a router's)         1            1          1

Muon's follow from the spectral norm that an update is to have, sqrt(fan-out / fan-in) (Yang, Simon & Bernstein 2023
[2310.17813], condition 1): the first with `consistent_rms`, whose updates grow by sqrt(m), the second without.

Two models need more, as one table serves both ends or is multiplied by sqrt(width). A weight that is kept as c times
what the table speaks of begins at c times that, and goes down by c times its Adam rate, c^2 times its SGD rate:

- tied embeddings: logits are to be m times smaller than the table makes them (the paper's table 8 has a multiplier
  there). The scale of the last norm holds that factor instead; a head of scores, which reads it too, makes up for it.
- `scale_embeddings`: the table itself is kept by c = m ** -1/2.

Attention scores are to shrink as 1 / head_dim. Where heads grow in number only, they do; where `head_dim` grows from
H0, `attention.scale = H0 ** 0.5 / head_dim` says it. Depth is not in it.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from models.config import ModelConfig

WIDE = ("embed", "heads", "kv_heads", "mlp", "latent")  # logical axes that grow with the width
STACKED = ("layers", "experts")


class Kind(enum.Enum):
    """What a weight is to the table."""

    input = "input"
    hidden = "hidden"
    output = "output"
    vector = "vector"
    finite = "finite"


def kind_of(axes: Sequence[str], *, vector: bool = False) -> Kind:
    """Of a weight with these logical axes. `vector`: a bias or a norm scale, of however many dims."""
    names = [name for name in axes if name not in STACKED]
    wide = [name in WIDE for name in names]
    if vector or len(names) < 2:
        return Kind.vector if any(wide) else Kind.finite
    reads, writes = wide[0], any(wide[1:])
    return {(False, True): Kind.input, (True, True): Kind.hidden, (True, False): Kind.output}.get(
        (reads, writes), Kind.finite
    )


def init_factor(config: ModelConfig, axes: Sequence[str]) -> float:
    """On the standard deviation of a matrix with these logical axes."""
    m = config.width_ratio
    if tuple(axes) == ("vocab", "embed"):
        return table_factor(config)
    return {Kind.hidden: m**-0.5, Kind.output: 1 / m}.get(kind_of(axes), 1.0)


def table_factor(config: ModelConfig) -> float:
    """c of the token table."""
    return config.width_ratio**-0.5 if config.scale_embeddings else 1.0


def final_norm_factor(config: ModelConfig) -> float:
    """c of the last norm, whose scale begins at it."""
    return 1 / (config.width_ratio * table_factor(config)) if config.tied_embeddings else 1.0


def kept_by(config: ModelConfig, path: str) -> float:
    """c of the parameter at `path` ('final_norm/scale')."""
    if path == "embedding":
        return table_factor(config)
    if "final_norm" in path.split("/"):
        return final_norm_factor(config)
    return 1 / final_norm_factor(config) if path == "score" else 1.0


# Sizes ------------------------------------------------------------------------------------------------------------

COUNTS = ("attention.num_heads", "attention.num_kv_heads")
WIDTHS = ("mlp.intermediate_dim", "moe.intermediate_dim", "moe.shared_intermediate_dim")
RANKS = ("attention.mla.kv_lora_rank", "attention.mla.q_lora_rank")
ROUNDED = 8  # other widths than that of the stream are rounded to a multiple of it


def width_keys(config: ModelConfig, embed_dim: int) -> dict[str, int]:
    """`key: value` of a model like `config` of that width: all widths in proportion, and heads as wide as before.

    Raises: ValueError where heads cannot be so many, with the widths that can be.
    """
    counts = [_at(config, key) for key in COUNTS]
    unit = config.embed_dim // math.gcd(config.embed_dim, *counts)
    if embed_dim < 1 or embed_dim % unit:
        raise ValueError(
            f"model.embed_dim={embed_dim}: like {config.embed_dim} with {counts[0]} heads and {counts[1]} of keys and "
            f"values, a width has whole heads; valid: multiples of {unit}"
        )
    found = {"embed_dim": embed_dim}
    for key in (*COUNTS, *WIDTHS, *RANKS):
        value = _at(config, key)
        unused = key.startswith("experts.") and not config.moe.num_experts
        if not value or unused or embed_dim == config.embed_dim:
            continue
        scaled = value * embed_dim / config.embed_dim
        found[key] = round(scaled) if key in COUNTS else max(1, round(scaled / ROUNDED)) * ROUNDED
    return found


def at_width(config: ModelConfig, embed_dim: int) -> ModelConfig:
    """`config` with the `width_keys`. Raises: as they do."""
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
