"""muP learning rates: factor of each parameter for a given width, from the table in `models/mup.py`."""

from typing import Any, NamedTuple, Protocol

import jax

from models.config import ModelConfig
from models.mup import Kind, stored_scale, weight_kind
from trainer.optimizers.param_groups import ParamGroup, param_group_of
from trainer.sharding import path_name

Tree = Any  # a tree in the shape of the parameters'


class Weight(NamedTuple):
    """A parameter as seen by the rules below."""

    kind: Kind
    role: ParamGroup
    scale: float  # c: the stored parameter is c times the weight of the muP table


class Rule(Protocol):
    """Returns the learning rate factor of a weight of a model `m` times as wide as the base model."""

    def __call__(self, weight: Weight, m: float) -> float: ...


def like_adam(weight: Weight, m: float) -> float:
    """Rule for optimizers whose update size is independent of the gradient scale: AdamW, Lion and similar."""
    return (1 / m if weight.kind in (Kind.hidden, Kind.output) else 1.0) * weight.scale


def like_sgd(weight: Weight, m: float) -> float:
    """Rule for updates proportional to the gradient."""
    factors = {Kind.input: m, Kind.vector: m, Kind.output: 1 / m}
    return factors.get(weight.kind, 1.0) * weight.scale**2


def like_muon(weight: Weight, m: float, *, consistent: bool) -> float:
    """Rule for orthogonal updates of matrices of layers; all other parameters follow `like_adam`.

    `consistent`: updates are scaled by the root of the longer side of the matrix (`consistent_rms`).
    """
    if weight.role is not ParamGroup.matrix:
        return like_adam(weight, m)
    wanted = m**-0.5 if weight.kind is Kind.output else 1.0
    return wanted * m**-0.5 if consistent else wanted


def rate_factors(model: ModelConfig, param_axes: Tree, rule: Rule) -> Tree:
    """Returns a tree of learning rate factors, one float per parameter."""

    def factor(path: Any, axes: tuple[str, ...]) -> float:
        name = path_name(path)
        role = param_group_of(name, axes)
        vector = role in (ParamGroup.vector, ParamGroup.balance)
        return rule(Weight(weight_kind(axes, vector=vector), role, stored_scale(model, name)), model.width_ratio)

    return jax.tree_util.tree_map_with_path(factor, param_axes, is_leaf=lambda x: isinstance(x, tuple))
