"""Weight views: drop-in replacements of weight arrays for quantization, adapters, pruning and storage layouts.

A layer reads `self.kernel[...]` and multiplies with `models.matmul.einsum_f32`, regardless of whether its parameter is
an array or a view. To add a view, for example one that rounds or masks a weight:

1. Subclass `Kernel` as a frozen dataclass registered with `jax.tree_util.register_dataclass`. Arrays are fields,
   everything else is static. Leading dims can be indexed away, as the layer scan does.
2. Define `product` and `array`, and override other methods if their default does not fit. `product` can be
   `einsum_f32(spec, x, self.array(), dtype)`, in `jax.checkpoint` if the array should not be saved for the backward
   pass.
3. Replace arrays in the parameter tree, as `quantized_base` and `bind_adapters` in `models.adapters.lora` and
   `decoding_params` in `models.decode.engine` do. `jax.tree.map` needs `is_leaf=is_view` to treat a view as a leaf.

Views in this module: `TransposedWeight` and `Table` (decoding on CPUs). In other modules:
`models.quantization.blockwise.Quantized` (NF4, int8) and `models.adapters.lora.LoRAWeight` (LoRA, on any other view).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from models.cpu_workarounds import matrix_first_product, transposed_weight
from models.logical_axes import Axes


class WeightView:
    """View of a weight [lead..., in..., out...], read like a parameter."""

    def __getitem__(self, _: object) -> "WeightView":
        return self

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Computes `models.matmul.einsum_f32(spec, x, weight, dtype)`, differentiable."""
        raise NotImplementedError

    def array(self) -> jax.Array:
        """Returns the weight as an array, for layers that do not only multiply with it."""
        raise NotImplementedError

    def transposed(self) -> "jax.Array | WeightView":
        """Returns [V, D] as [D, V], for a tied embedding."""
        return transposed_weight(self.array())

    def as_head(self) -> "jax.Array | WeightView":
        """Returns the weight for the output head; an array by default, because a loss reads it for each chunk."""
        return self.array()

    def view_axes(self, axes: Axes, num_lead: int) -> "WeightView":
        """Returns this view with logical axes in place of its arrays, for a weight with logical axes `axes`.

        Required for views that are checkpointed or sharded. `num_lead`: leading dims of the stack of matrices.
        """
        raise NotImplementedError


def is_view(weight: Any) -> bool:
    return isinstance(weight, WeightView)


def as_array(weight: jax.Array | WeightView) -> jax.Array:
    return weight.array() if isinstance(weight, WeightView) else weight


def transposed(weight: jax.Array | WeightView) -> jax.Array | WeightView:
    return weight.transposed() if isinstance(weight, WeightView) else transposed_weight(weight)


def as_head(weight: jax.Array | WeightView) -> jax.Array | WeightView:
    return weight.as_head() if isinstance(weight, WeightView) else weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransposedWeight(WeightView):
    """A kernel [in..., out...] stored as a matrix [OUT, IN], multiplied from the left; not differentiable."""

    matrix: jax.Array
    num_in: int = field(metadata={"static": True})  # number of contracted dims of x, its last dims
    out_shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, kernel: jax.Array, num_out: int) -> "TransposedWeight":
        shape = kernel.shape[-num_out:]
        return cls(kernel.reshape(-1, math.prod(shape)).T, kernel.ndim - num_out, shape)

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        y = matrix_first_product(self.matrix, x.reshape(-1, self.matrix.shape[1]))
        return y.astype(dtype).T.reshape(*x.shape[: x.ndim - self.num_in], *self.out_shape)

    def as_head(self) -> "TransposedWeight":
        return self  # decoding reads it once per token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TiedEmbedding(WeightView):
    """Tied embedding [V, D], whose head is a `TransposedWeight`; not differentiable."""

    table: jax.Array

    def array(self) -> jax.Array:
        return self.table

    def transposed(self) -> TransposedWeight:
        return TransposedWeight(self.table, 1, self.table.shape[:1])
