"""Model sizes of a scaling ladder, and the size that a law recommends for a compute budget."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from configs.schema import RunConfig
from configs.tasks import ScalingLadderConfig
from launch.scaling.law import Law, spread
from models.config import ModelConfig
from models.flops import flops_per_token, num_params
from models.mup import width_keys

GROWTH = 1.15  # ratio between the widths considered for a recommendation


class Rung(NamedTuple):
    """A planned run of the ladder."""

    run: str  # run name
    keys: dict[str, int]  # model keys that differ from the config
    parameters: int  # excluding embeddings and head
    num_steps: int
    tokens: int


class Size(NamedTuple):
    """Model keys, parameters and cost of one size of the family."""

    keys: dict[str, int]
    parameters: int
    flops_per_token: float


class Recommendation(NamedTuple):
    keys: dict[str, int]
    parameters: int
    tokens: float
    flops: float
    loss: float
    parameters_spread: tuple[float, float] | None  # over the laws with one run left out
    loss_spread: tuple[float, float] | None


def model_keys(model: ModelConfig, embed_dim: int, aspect: float | None) -> dict[str, int]:
    """Returns the model keys for a width. Raises: ValueError if the width is invalid for the model."""
    keys = width_keys(model, embed_dim)
    return keys if aspect is None else keys | {"num_layers": max(1, round(embed_dim / aspect))}


def with_keys(model: ModelConfig, keys: dict[str, int]) -> ModelConfig:
    for key, value in keys.items():
        first, _, rest = key.partition(".")
        model = replace(model, **{first: with_keys(getattr(model, first), {rest: value}) if rest else value})
    return model


def counted_params(model: ModelConfig) -> int:
    """Returns the number of parameters excluding embeddings and head, which does not require the vocabulary size."""
    counts = num_params(replace(model, vocab_size=1))
    return counts["total"] - counts["embedding"] - counts["head"]


def rungs(config: RunConfig) -> list[Rung]:
    """Returns the runs of the ladder, smallest first. Raises: ValueError with the invalid key."""
    task = config.task
    assert isinstance(task, ScalingLadderConfig)
    found, tokens_per_step = [], config.data.batch_size * config.data.seq_len
    for width in sorted(task.widths):
        keys = model_keys(config.model, width, task.aspect_ratio)
        model = with_keys(config.model, keys)
        model.validate()
        parameters = counted_params(model)
        for ratio in sorted(task.tokens_per_param):
            steps = max(1, round(ratio * parameters / tokens_per_step))
            name = f"{config.run}-w{width}-t{ratio:g}"
            found.append(Rung(name, keys, parameters, steps, steps * tokens_per_step))
    return found


def sizes(config: RunConfig, model: ModelConfig, budget: float) -> list[Size]:
    """Returns the sizes that `budget` FLOPs can train on at least one token per parameter.

    `model` must have its final vocabulary size.
    """
    task = config.task
    assert isinstance(task, ScalingLadderConfig)
    found, width = [], 1.0
    while True:
        try:
            keys = model_keys(model, round(width), task.aspect_ratio)
        except ValueError:  # width not divisible into heads: try the next one
            width = round(width) + 1
            continue
        grown = with_keys(model, keys)
        size = Size(keys, counted_params(grown), flops_per_token(grown, config.data.seq_len))
        if found and budget / size.flops_per_token < size.parameters:
            return found
        found.append(size)
        width = max(width * GROWTH, width + 1)


def recommend(
    law: Law, others: Sequence[Law], family: Sequence[Size], budget: float, ratio: float | None = None
) -> Recommendation:
    """Returns the size with the lowest predicted loss for `budget` FLOPs.

    `others`: laws with one run left out, for the spread. `ratio`: tokens per parameter, for a law of compute.

    Raises: ValueError if the fitted loss does not decrease with size and tokens.
    """
    if law.alpha <= 0 or (not law.is_compute_law and law.beta <= 0):
        raise ValueError(
            f"the fitted law (alpha {law.alpha:.3g}, beta {law.beta:.3g}) does not decrease with size and tokens; the "
            "runs are too few, too similar or too noisy: add values to task.widths and task.tokens_per_param"
        )
    valid = [other for other in others if other.alpha > 0 and (other.is_compute_law or other.beta > 0)]
    size, loss = _best(law, family, budget, ratio)
    return Recommendation(
        size.keys,
        size.parameters,
        budget / size.flops_per_token,
        budget,
        loss,
        spread(valid, lambda other: float(_best(other, family, budget, ratio)[0].parameters)),
        spread(valid, lambda other: _best(other, family, budget, ratio)[1]),
    )


def _best(law: Law, family: Sequence[Size], budget: float, ratio: float | None) -> tuple[Size, float]:
    parameters = np.array([size.parameters for size in family], float)
    tokens = budget / np.array([size.flops_per_token for size in family])
    if law.is_compute_law:
        assert ratio is not None
        nearest = int(np.argmin(np.abs(np.log(tokens / parameters / ratio))))
        return family[nearest], float(law.loss(budget))
    losses = law.loss(parameters, tokens)
    at = int(np.argmin(losses))
    return family[at], float(losses[at])
