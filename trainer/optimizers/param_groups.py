"""Parameter groups of optimizers, derived from logical axes.

Shapes are ambiguous: with stacked layers, a norm scale [layers, embed] looks like a matrix, and a matrix
[layers, embed, heads, head_dim] does not.
"""

import enum
import math
from typing import Any, NamedTuple

import jax

from trainer.sharding import BATCH_DIMS, LogicalAxes, path_name


class ParamGroup(enum.Enum):
    """Group of parameters that optimizers treat alike."""

    embedding = "embedding"  # token and position embedding tables
    head = "head"  # output matrix, unless tied to the token embedding
    matrix = "matrix"  # weight matrices inside the layers
    vector = "vector"  # biases and norm scales
    balance = "balance"  # router biases for expert load balancing, updated by the sign of their gradient


def param_group_of(path: str, axes: LogicalAxes) -> ParamGroup:
    """Returns the group of the parameter at `path` ('layers/attention/query') with these logical axes."""
    names = [name for name in axes if name not in BATCH_DIMS]
    parts = path.split("/")
    if parts[-1] == "balance_bias":
        return ParamGroup.balance
    if len(names) < 2 or parts[-1] in ("bias", "scale", "magnitude") or parts[-1].endswith(("_bias", "_scale")):
        return ParamGroup.vector
    if "outputs" in names:
        return ParamGroup.head
    if "vocab" in names:
        return ParamGroup.head if any("head" in part for part in parts) else ParamGroup.embedding
    return ParamGroup.embedding if "positions" in names else ParamGroup.matrix


def param_groups(param_axes: Any) -> Any:
    """Returns the tree of parameters with a `ParamGroup` at each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, axes: param_group_of(path_name(path), axes), param_axes, is_leaf=lambda x: isinstance(x, tuple)
    )


class MatrixDims(NamedTuple):
    """View of a parameter of any rank as a stack of matrices with dims [batch..., rows..., cols...]."""

    num_batch: int
    num_rows: int

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns [batch, rows, cols], each the product of its dims."""
        split = self.num_batch + self.num_rows
        return (
            math.prod(shape[: self.num_batch]),
            math.prod(shape[self.num_batch : split]),
            math.prod(shape[split:]),
        )

    def row_axes(self) -> tuple[int, ...]:
        return tuple(range(self.num_batch, self.num_batch + self.num_rows))

    def col_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(self.num_batch + self.num_rows, ndim))

    def row_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `shape` with column dims reduced to 1, so sharding carries over dim by dim."""
        split = self.num_batch + self.num_rows
        return (*shape[:split], *[1] * (len(shape) - split))

    def col_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `shape` with row dims reduced to 1."""
        split = self.num_batch + self.num_rows
        return (*shape[: self.num_batch], *[1] * self.num_rows, *shape[split:])


def matrix_dims(axes: LogicalAxes) -> MatrixDims:
    """Returns the matrix view: ('layers', 'embed', 'heads', 'head_dim') is a batch of embed x (heads * head_dim).

    A vector has row dims only.
    """
    num_batch = sum(name in BATCH_DIMS for name in axes)
    assert all(name in BATCH_DIMS for name in axes[:num_batch]), f"stacked dims must come first: {axes}"
    # Rows: the first dim, with its head_dim if it has one (input of a query matrix, heads of an output matrix).
    num_rows = 2 if axes[num_batch + 1 : num_batch + 2] == ("head_dim",) else 1
    return MatrixDims(num_batch, num_rows)
