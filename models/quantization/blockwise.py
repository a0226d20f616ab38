"""Weights in 4 or 8 bits: codes in blocks of 64, each block with its largest magnitude (Dettmers et al. 2021, 2023).

A matrix [in..., out...] is cut into blocks along what it sums over, so that codes and magnitudes are those that
bitsandbytes makes of a published weight [out, in]: its blocks lie along the flattened weight. Dims keep their names,
and lie on the mesh as those of the weight do, where the last dim of the input is a multiple of 64; else a matrix is one
flat row of codes, whole on each device.
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
from models.weight_views import Kernel

BLOCK = 64
SCALES_BLOCK = 256  # scales that share one of their own, where they are quantised too

# Dettmers et al. 2023, appendix E: equal shares of a normal distribution between neighbours, scaled to [-1, 1], with 0.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def dynamic_levels() -> np.ndarray:
    """[256] f32: 0, 1, and for each power of ten the middles of ever more equal parts of [0.1, 1], of both signs: 8-bit
    dynamic tree quantisation (Dettmers et al. 2021, section 1.3)."""
    found = [0.0, 1.0]
    for exponent in range(7):
        borders = np.linspace(0.1, 1, 2**exponent + 1)
        middles = 10.0 ** (exponent - 6) * (borders[1:] + borders[:-1]) / 2
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


DYNAMIC = dynamic_levels()


class Bits(enum.Enum):
    nf4 = "nf4"
    int8 = "int8"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scales:
    """Scales of one stack of matrices in 8 bits each, less their mean ("double quantisation", Dettmers et al. 2023,
    section 3); in the order of bitsandbytes, those of a matrix [out, in] one after the other.
    """

    codes: jax.Array  # u8 [lead..., groups, SCALES_BLOCK], the last group filled up
    tops: jax.Array  # f32 [lead..., groups]: the largest magnitude of each group
    mean: jax.Array  # f32 [lead...]
    shape: tuple[int, ...] = field(metadata={"static": True})  # of the scales of one matrix, out first
    num_out: int = field(metadata={"static": True})  # dims of `shape` that are out

    def array(self) -> jax.Array:
        """[lead..., in..., out...] f32."""
        values = jnp.asarray(DYNAMIC)[self.codes] * self.tops[..., None] + self.mean[..., None, None]
        lead, size = self.mean.ndim, math.prod(self.shape)
        scales = values.reshape(*self.mean.shape, -1)[..., :size].reshape(*self.mean.shape, *self.shape)
        order = (*range(lead), *range(lead + self.num_out, scales.ndim), *range(lead, lead + self.num_out))
        return scales.transpose(order)


def quantize_scales(scales: jax.Array, num_lead: int, num_out: int) -> Scales:
    """Of scales [lead..., in..., out...]."""
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
class Quantized(Kernel):
    """A stack of matrices [lead..., in..., out...]; leading dims may be cut off, as a scan over layers does."""

    codes: jax.Array  # u8, two to a byte, the first in its upper half (nf4); i8 (int8)
    scales: jax.Array | Scales  # f32, one for each block
    bits: Bits = field(metadata={"static": True})
    dim: int | None = field(metadata={"static": True})  # counted from the end: along which blocks lie; None: flat
    shape: tuple[int, ...] = field(metadata={"static": True})  # of a flat one: of one matrix, its input last
    num_out: int = field(metadata={"static": True})  # of a flat one: the dims of `shape` before the input

    def array(self) -> jax.Array:
        """f32."""
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
        # Else the backward pass would find every layer's whole weight among what the forward pass has kept.
        return jax.checkpoint(lambda x, kernel: einsum_f32(spec, x, kernel.array(), dtype), prevent_cse=False)(x, self)

    def view_axes(self, axes: Axes, num_lead: int) -> "Quantized":
        names = axes if self.dim is not None else (*axes[:num_lead], None)
        scales, lead = names, axes[:num_lead]
        if isinstance(self.scales, Scales):  # a hundredth of the weight: groups cross all borders, and lie whole
            scales = Scales((*lead, None, None), (*lead, None), lead, self.scales.shape, self.scales.num_out)
        return Quantized(names, scales, self.bits, self.dim, self.shape, self.num_out)


def _encode(blocks: jax.Array, bits: Bits) -> tuple[jax.Array, jax.Array]:
    """[..., BLOCK] to codes [..., BLOCK] and scales [...]."""
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    shares = blocks / jnp.where(scales > 0, scales, 1.0)[..., None]
    if bits is Bits.int8:
        return jnp.round(shares * 127).astype(jnp.int8), scales
    borders = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
    return jnp.searchsorted(borders, shares, side="left").astype(jnp.uint8), scales


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def quantize(weight: jax.Array, num_lead: int, num_in: int, bits: Bits, double: bool = False) -> Quantized:
    """A stack of matrices, whose first `num_lead` dims are the stack's and the next `num_in` are summed over.

    `double`: the scales are quantised, too.
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
    """Whether blocks end where the last dim of the input does."""
    return shape[num_lead + num_in - 1] % BLOCK == 0
