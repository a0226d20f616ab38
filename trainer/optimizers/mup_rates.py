"""Learning rates across widths (muP): the factor of each parameter, by the table in `models/mup.py`."""

from typing import Any, NamedTuple, Protocol

import jax

from models.config import ModelConfig
from models.mup import Kind, kept_by, kind_of
from trainer.mesh import path_name
from trainer.optimizers.param_groups import ParamGroup, param_group_of

Tree = Any  # a tree in the shape of the parameters'


class Weight(NamedTuple):
    """What a parameter is to the rules below."""

    kind: Kind
    role: ParamGroup
    kept_by: float  # c: it is c times what the table speaks of


class Rule(Protocol):
    """The factor on the learning rate of a weight where the model is `m` times as wide as where it was tuned."""

    def __call__(self, weight: Weight, m: float) -> float: ...


def like_adam(weight: Weight, m: float) -> float:
    """Updates whose entries are as large whatever the gradient: AdamW, Lion, and their kin."""
    return (1 / m if weight.kind in (Kind.hidden, Kind.output) else 1.0) * weight.kept_by


def like_sgd(weight: Weight, m: float) -> float:
    """Updates in proportion to the gradient."""
    factors = {Kind.input: m, Kind.vector: m, Kind.output: 1 / m}
    return factors.get(weight.kind, 1.0) * weight.kept_by**2


def like_muon(weight: Weight, m: float, *, consistent: bool) -> float:
    """Orthogonal updates of the layers' matrices, which `consistent_rms` makes larger by the root of their longer side;
    all else goes by Adam.
    """
    if weight.role is not ParamGroup.matrix:
        return like_adam(weight, m)
    wanted = m**-0.5 if weight.kind is Kind.output else 1.0
    return wanted * m**-0.5 if consistent else wanted


def rate_factors(model: ModelConfig, param_axes: Tree, rule: Rule) -> Tree:
    """The tree of parameters with a float at each leaf."""

    def factor(path: Any, axes: tuple[str, ...]) -> float:
        name = path_name(path)
        role = param_group_of(name, axes)
        vector = role in (ParamGroup.vector, ParamGroup.balance)
        return rule(Weight(kind_of(axes, vector=vector), role, kept_by(model, name)), model.width_ratio)

    return jax.tree_util.tree_map_with_path(factor, param_axes, is_leaf=lambda x: isinstance(x, tuple))
