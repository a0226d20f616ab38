"""Blockwise quantization of weights to 4 or 8 bits: blocks of 64 with an absmax scale (Dettmers et al. 2021, 2023).

A matrix [in..., out...] is split into blocks along its input dims, so that codes and scales equal those of bitsandbytes
for a published weight [out, in], whose blocks follow the flattened weight. If the last input dim is a multiple of 64,
dims keep their logical axes and the codes are sharded as the weight; otherwise a matrix is stored as one flat row of
codes, replicated on each device.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.logical_axes import Axes
from models.matmul import einsum_f32
from models.weight_views import WeightView

BLOCK = 64
SCALES_BLOCK = 256  # scales per block in double quantization

# NF4 levels (Dettmers et al. 2023, appendix E): quantiles of a normal distribution, scaled to [-1, 1], including 0.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def dynamic_levels() -> np.ndarray:
    """Returns the levels of 8-bit dynamic tree quantization, [256] f32 (Dettmers et al. 2021, section 1.3).

    These are 0, 1 and, for each power of ten, the midpoints of 2^i equal parts of [0.1, 1] with both signs.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        borders = np.linspace(0.1, 1, 2**exponent + 1)
        middles = 10.0 ** (exponent - 6) * (borders[1:] + borders[:-1]) / 2
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


DYNAMIC = dynamic_levels()


class Bits(enum.Enum):
    """Quantization formats."""

    nf4 = "nf4"
    int8 = "int8"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scales:
    """Double quantization (Dettmers et al. 2023, section 3): scales of matrices, minus their mean, in 8 bits.

    The order is that of bitsandbytes: row by row of a matrix [out, in].
    """

    codes: jax.Array  # u8 [lead..., groups, SCALES_BLOCK], the last group padded
    tops: jax.Array  # f32 [lead..., groups]: absmax of each group
    mean: jax.Array  # f32 [lead...]
    shape: tuple[int, ...] = field(metadata={"static": True})  # shape of the scales of one matrix, out first
    num_out: int = field(metadata={"static": True})  # output dims of `shape`

    def array(self) -> jax.Array:
        """Dequantizes the scales: [lead..., in..., out...] f32."""
        values = jnp.asarray(DYNAMIC)[self.codes] * self.tops[..., None] + self.mean[..., None, None]
        lead, size = self.mean.ndim, math.prod(self.shape)
        scales = values.reshape(*self.mean.shape, -1)[..., :size].reshape(*self.mean.shape, *self.shape)
        order = (*range(lead), *range(lead + self.num_out, scales.ndim), *range(lead, lead + self.num_out))
        return scales.transpose(order)


def quantize_scales(scales: jax.Array, num_lead: int, num_out: int) -> Scales:
    """Quantizes scales [lead..., in..., out...] to 8 bits."""
    first_out = scales.ndim - num_out
    order = (*range(num_lead), *range(first_out, scales.ndim), *range(num_lead, first_out))
    turned = scales.transpose(order)
    lead, shape = turned.shape[:num_lead], turned.shape[num_lead:]
    flat = turned.reshape(*lead, -1)
    mean = flat.mean(-1)
    spread = jnp.pad(flat - mean[..., None], [(0, 0)] * num_lead + [(0, -flat.shape[-1] % SCALES_BLOCK)])
    groups = spread.reshape(*lead, -1, SCALES_BLOCK)
    tops = jnp.max(jnp.abs(groups), axis=-1)
    borders = jnp.asarray((DYNAMIC[1:] + DYNAMIC[:-1]) / 2)
    shares = groups / jnp.where(tops > 0, tops, 1.0)[..., None]
    return Scales(jnp.searchsorted(borders, shares).astype(jnp.uint8), tops, mean, shape, num_out)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized(WeightView):
    """A quantized stack of matrices [lead..., in..., out...]; leading dims can be indexed away, as by a layer scan."""

    codes: jax.Array  # u8 with two codes per byte, the first in the upper half (nf4); i8 (int8)
    scales: jax.Array | Scales  # f32, one per block
    bits: Bits = field(metadata={"static": True})
    dim: int | None = field(metadata={"static": True})  # dim of the blocks, counted from the end; None: flat
    shape: tuple[int, ...] = field(metadata={"static": True})  # flat: shape of one matrix, input dims last
    num_out: int = field(metadata={"static": True})  # flat: number of output dims in `shape`

    def array(self) -> jax.Array:
        """Dequantizes the weight to f32."""
        dim = -1 if self.dim is None else self.dim
        scales = self.scales.array() if isinstance(self.scales, Scales) else self.scales
        codes, scales = jnp.moveaxis(self.codes, dim, -1), jnp.moveaxis(scales, dim, -1)
        if self.bits is Bits.nf4:
            both = jnp.stack([codes >> 4, codes & 15], axis=-1)
            values = jnp.asarray(NF4)[both.reshape(*codes.shape[:-1], -1)]
        else:
            values = codes.astype(jnp.float32) / 127
        blocks = values.reshape(*scales.shape, BLOCK) * scales[..., None]
        weight = blocks.reshape(values.shape)
        if self.dim is not None:
            return jnp.moveaxis(weight, -1, dim)
        lead, size = weight.ndim - 1, math.prod(self.shape)
        weight = weight[..., :size].reshape(*weight.shape[:-1], *self.shape)
        order = (*range(lead), *range(lead + self.num_out, weight.ndim), *range(lead, lead + self.num_out))
        return weight.transpose(order)

    def product(self, spec: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # Otherwise the dequantized weights of all layers would be saved for the backward pass.
        return jax.checkpoint(lambda x, kernel: einsum_f32(spec, x, kernel.array(), dtype), prevent_cse=False)(x, self)

    def view_axes(self, axes: Axes, num_lead: int) -> "Quantized":
        names = axes if self.dim is not None else (*axes[:num_lead], None)
        scales, lead = names, axes[:num_lead]
        if isinstance(self.scales, Scales):  # 1 % of the weight; groups cross shard boundaries, so they are replicated
            scales = Scales((*lead, None, None), (*lead, None), lead, self.scales.shape, self.scales.num_out)
        return Quantized(names, scales, self.bits, self.dim, self.shape, self.num_out)


def _encode(blocks: jax.Array, bits: Bits) -> tuple[jax.Array, jax.Array]:
    """Quantizes [..., BLOCK] to codes [..., BLOCK] and scales [...]."""
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    shares = blocks / jnp.where(scales > 0, scales, 1.0)[..., None]
    if bits is Bits.int8:
        return jnp.round(shares * 127).astype(jnp.int8), scales
    borders = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
    return jnp.searchsorted(borders, shares, side="left").astype(jnp.uint8), scales


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def quantize(weight: jax.Array, num_lead: int, num_in: int, bits: Bits, double: bool = False) -> Quantized:
    """Quantizes a stack of matrices with `num_lead` stack dims, followed by `num_in` input dims.

    `double`: also quantize the scales (double quantization).
    """
    last = num_lead + num_in - 1
    weight, shape, dim = weight.astype(jnp.float32), (), None
    if blocked(weight.shape, num_lead, num_in):
        rows, dim = jnp.moveaxis(weight, last, -1), last - weight.ndim
    else:
        order = (*range(num_lead), *range(last + 1, weight.ndim), *range(num_lead, last + 1))
        turned = weight.transpose(order)
        shape = turned.shape[num_lead:]
        rows = turned.reshape(*turned.shape[:num_lead], -1)
        rows = jnp.pad(rows, [(0, 0)] * num_lead + [(0, -rows.shape[-1] % BLOCK)])
    codes, scales = _encode(rows.reshape(*rows.shape[:-1], -1, BLOCK), bits)
    codes = codes.reshape(rows.shape)
    if bits is Bits.nf4:
        codes = codes[..., 0::2] << 4 | codes[..., 1::2]
    if dim is not None:
        codes, scales = jnp.moveaxis(codes, -1, dim), jnp.moveaxis(scales, -1, dim)
    num_out = weight.ndim - last - 1
    if double:
        scales = quantize_scales(scales, num_lead, 0 if dim is None else num_out)
    return Quantized(codes, scales, bits, dim, shape, num_out)


def blocked(shape: Sequence[int], num_lead: int, num_in: int) -> bool:
    """Returns whether the last input dim is a multiple of the block size."""
    return shape[num_lead + num_in - 1] % BLOCK == 0
