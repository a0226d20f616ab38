"""Weights in another form than their array: the seam for quantization, adapters, pruning and storage layouts.

A layer reads `self.kernel[...]` and multiplies with `models.matmul.einsum_f32`; it does not see whether its parameter
is an array or a view. To add a view, as one that rounds or masks a weight:

1. Subclass `Kernel` as a frozen dataclass registered with `jax.tree_util.register_dataclass`: arrays are fields, all
   else is static. Leading dims may be cut off, as the scan over layers does.
2. Define `product` and `array`; the others where their default does not fit. `product` may be
   `einsum_f32(spec, x, self.array(), dtype)`, in `jax.checkpoint` where the array should not be saved for the backward
   pass.
3. Put it into the tree of parameters in the place of the array, as `models.adapters.lora.quantized_base`, `models.adapters.lora.bind_adapters` and
   `models.decode.engine.decoding_params` do. `jax.tree.map` needs `is_leaf=is_view` to see a view instead of its arrays.

Views here: `TransposedWeight` and `Table` (decoding on CPUs). Elsewhere: `models.quantization.blockwise.Quantized` (NF4, int8) and
`models.adapters.lora.LoRAWeight` (LoRA, on any other view).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from models.cpu_workarounds import matrix_first_product, transposed_weight
from models.logical_axes import Axes


class Kernel:
    """A view of a weight [lead..., in..., out...]; read as a parameter is."""

    def __getitem__(self, _: object) -> "Kernel":
        return self

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """`models.products.einsum_f32(spec, x, weight, dtype)`, with its gradients."""
        raise NotImplementedError

    def array(self) -> jax.Array:
        """The weight itself, for layers that do more with it than multiply."""
        raise NotImplementedError

    def transposed(self) -> "jax.Array | Kernel":
        """[V, D] as [D, V]: an embedding that is the head, too."""
        return transposed_weight(self.array())

    def as_head(self) -> "jax.Array | Kernel":
        """What the output head multiplies by. An array by default: a loss reads the head once for each chunk."""
        return self.array()

    def view_axes(self, axes: Axes, num_lead: int) -> "Kernel":
        """This view with the names of dims in place of its arrays, of a weight whose dims have the names `axes`.

        Needed by views that are stored or lie on a mesh. `num_lead`: leading dims that count matrices.
        """
        raise NotImplementedError


def is_view(weight: Any) -> bool:
    return isinstance(weight, Kernel)


def as_array(weight: jax.Array | Kernel) -> jax.Array:
    return weight.array() if isinstance(weight, Kernel) else weight


def transposed(weight: jax.Array | Kernel) -> jax.Array | Kernel:
    return weight.transposed() if isinstance(weight, Kernel) else transposed_weight(weight)


def as_head(weight: jax.Array | Kernel) -> jax.Array | Kernel:
    return weight.as_head() if isinstance(weight, Kernel) else weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransposedWeight(Kernel):
    """A kernel [in..., out...] as a matrix [OUT, IN], to be multiplied from the left; without a gradient."""

    matrix: jax.Array
    num_in: int = field(metadata={"static": True})  # dims of x that are summed over: its last ones
    out_shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, kernel: jax.Array, num_out: int) -> "TransposedWeight":
        shape = kernel.shape[-num_out:]
        return cls(kernel.reshape(-1, math.prod(shape)).T, kernel.ndim - num_out, shape)

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        y = matrix_first_product(self.matrix, x.reshape(-1, self.matrix.shape[1]))
        return y.astype(dtype).T.reshape(*x.shape[: x.ndim - self.num_in], *self.out_shape)

    def as_head(self) -> "TransposedWeight":
        return self  # decoding reads it once a token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table(Kernel):
    """Embeddings [V, D] that are the head as well, which is then `TransposedWeight`; without a gradient."""

    table: jax.Array

    def array(self) -> jax.Array:
        return self.table

    def transposed(self) -> TransposedWeight:
        return TransposedWeight(self.table, 1, self.table.shape[:1])
