"""Weights that a checkpoint holds in 4 or 8 bits, read as if they were whole: a slice at a time, in bf16.

- MXFP4 (OCP Microscaling Formats 1.0, section 5.3; GPT-OSS): groups of 32 numbers of 4 bits with one power of 2.
- FP8 in blocks (DeepSeek-V3, section 3.3.2): numbers of 8 bits, and a factor for each square of 128 x 128.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

GROUP = 32  # numbers of MXFP4 that share a power of 2
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])  # the first of 4 bits is the sign
BLOCKS, SCALES, FACTORS = "_blocks", "_scales", "_scale_inv"  # what the names of their parts end with


def whole_name(name: str, there: Mapping[str, Any]) -> str | None:
    """Of the tensor that this one is, or is the numbers of; None for what only goes with numbers."""
    if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in there:
        return name.removesuffix(BLOCKS)
    if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in there:
        return None
    return None if name.endswith(FACTORS) and name.removesuffix(FACTORS) in there else name


def _ranges(cut: Any, shape: tuple[int, ...]) -> list[slice]:
    """What a tensor is indexed with, a slice with both ends for each dim."""
    cut = cut if isinstance(cut, tuple) else (cut,)
    ends = [part.indices(size)[:2] for part, size in zip((*cut, *[slice(None)] * len(shape)), shape, strict=False)]
    return [slice(low, high) for low, high in ends]


def _around(part: slice, size: int) -> tuple[slice, slice]:
    """The blocks of `size` that hold a range, and where in them it lies."""
    first = part.start // size
    return slice(first, -(-part.stop // size)), slice(part.start - first * size, part.stop - first * size)


class MXFP4(NamedTuple):
    """Kernels of experts [E, in, out], of which the file holds [E, out, in]."""

    blocks: Any  # [E, out, in / 32, 16] u8: two numbers each, the lower four bits first
    scales: Any  # [E, out, in / 32] u8: exponents, 127 more than they are

    def get_shape(self) -> tuple[int, ...]:
        E, out, groups, _ = self.blocks.get_shape()
        return E, groups * GROUP, out

    def __getitem__(self, cut: Any) -> np.ndarray:
        experts, ins, outs = _ranges(cut, self.get_shape())
        groups, inside = _around(ins, GROUP)
        packed, exponents = (np.asarray(x[experts, outs, groups]) for x in (self.blocks, self.scales))
        numbers = E2M1[np.stack([packed & 15, packed >> 4], -1)].reshape(*packed.shape[:3], GROUP)
        numbers = np.ldexp(numbers, exponents.astype(np.int32)[..., None] - 127)
        numbers = numbers.reshape(*packed.shape[:2], -1)[..., inside]
        return np.ascontiguousarray(numbers.swapaxes(1, 2)).astype(jnp.bfloat16)


class FP8(NamedTuple):
    """A matrix [out, in]."""

    numbers: np.ndarray  # [out, in] e4m3
    factors: Any  # [out / block, in / block] f32, rounded up
    block: tuple[int, int]

    def get_shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def __getitem__(self, cut: Any) -> np.ndarray:
        ranges = _ranges(cut, self.get_shape())
        around = [_around(part, size) for part, size in zip(ranges, self.block, strict=True)]
        factors = np.asarray(self.factors[tuple(blocks for blocks, _ in around)], np.float32)
        for axis, (size, (_, inside)) in enumerate(zip(self.block, around, strict=True)):
            factors = factors.repeat(size, axis).take(range(inside.start, inside.stop), axis)
        return (self.numbers[tuple(ranges)].astype(np.float32) * factors).astype(jnp.bfloat16)


def mapped_fp8(file: Path, name: str) -> np.ndarray:
    """A tensor of e4m3 in a safetensors file, which the library does not hand to NumPy."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        told = json.loads(opened.read(length))[name]
    start = 8 + length + told["data_offsets"][0]
    return np.memmap(file, np.uint8, "r", start, tuple(told["shape"])).view(jnp.float8_e4m3fn)


def refusal(told: Mapping[str, Any] | None) -> str | None:
    """Why weights cannot be read that are quantised as config.json's `quantization_config` says."""
    method = told and told.get("quant_method")
    if not told or method == "mxfp4" or (method == "fp8" and told.get("weight_block_size")):
        return None
    return (
        f"config.json: quantization_config.quant_method={method}: the weights are quantised, not as mxfp4 nor as fp8 "
        "with weight_block_size, which are known; load them in transformers with dequantize=True and save them again"
    )
