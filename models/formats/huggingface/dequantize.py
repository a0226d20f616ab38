"""Dequantizes 4- and 8-bit weights of checkpoints to bf16 on load, one slice at a time.

- MXFP4 (OCP Microscaling Formats 1.0, section 5.3; GPT-OSS): 4-bit values with one power-of-2 scale per 32 values.
- Block-scaled FP8 (DeepSeek-V3, section 3.3.2): 8-bit values with one scale per 128 x 128 block.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

GROUP = 32  # MXFP4 values per scale
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])  # the highest bit is the sign
BLOCKS, SCALES, FACTORS = "_blocks", "_scales", "_scale_inv"  # name suffixes of the stored tensors


def dequantized_name(name: str, stored: Mapping[str, Any]) -> str | None:
    """Returns the name of the dequantized tensor; None for tensors of scales."""
    if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in stored:
        return name.removesuffix(BLOCKS)
    if name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in stored:
        return None
    return None if name.endswith(FACTORS) and name.removesuffix(FACTORS) in stored else name


def _ranges(cut: Any, shape: tuple[int, ...]) -> list[slice]:
    """Normalizes an index to one slice with explicit ends per dim."""
    cut = cut if isinstance(cut, tuple) else (cut,)
    ends = [part.indices(size)[:2] for part, size in zip((*cut, *[slice(None)] * len(shape)), shape, strict=False)]
    return [slice(low, high) for low, high in ends]


def _around(part: slice, size: int) -> tuple[slice, slice]:
    """Returns the range of blocks of `size` that cover `part`, and the range of `part` within them."""
    first = part.start // size
    return slice(first, -(-part.stop // size)), slice(part.start - first * size, part.stop - first * size)


class MXFP4(NamedTuple):
    """MXFP4 kernels of experts [E, in, out], stored as [E, out, in]."""

    blocks: Any  # [E, out, in / 32, 16] u8: two values per byte, lower half first
    scales: Any  # [E, out, in / 32] u8: exponents with bias 127

    def get_shape(self) -> tuple[int, ...]:
        E, out, groups, _ = self.blocks.get_shape()
        return E, groups * GROUP, out

    def __getitem__(self, cut: Any) -> np.ndarray:
        experts, ins, outs = _ranges(cut, self.get_shape())
        groups, offsets = _around(ins, GROUP)
        packed, exponents = (np.asarray(x[experts, outs, groups]) for x in (self.blocks, self.scales))
        values = E2M1[np.stack([packed & 15, packed >> 4], -1)].reshape(*packed.shape[:3], GROUP)
        values = np.ldexp(values, exponents.astype(np.int32)[..., None] - 127)
        values = values.reshape(*packed.shape[:2], -1)[..., offsets]
        return np.ascontiguousarray(values.swapaxes(1, 2)).astype(jnp.bfloat16)


class FP8(NamedTuple):
    """Block-scaled FP8 matrix [out, in]."""

    numbers: np.ndarray  # [out, in] e4m3
    factors: Any  # scales [out / block, in / block] f32, sizes rounded up
    block: tuple[int, int]

    def get_shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def __getitem__(self, cut: Any) -> np.ndarray:
        ranges = _ranges(cut, self.get_shape())
        around = [_around(part, size) for part, size in zip(ranges, self.block, strict=True)]
        factors = np.asarray(self.factors[tuple(blocks for blocks, _ in around)], np.float32)
        for axis, (size, (_, offsets)) in enumerate(zip(self.block, around, strict=True)):
            factors = factors.repeat(size, axis).take(range(offsets.start, offsets.stop), axis)
        return (self.numbers[tuple(ranges)].astype(np.float32) * factors).astype(jnp.bfloat16)


def mapped_fp8(file: Path, name: str) -> np.ndarray:
    """Memory-maps an e4m3 tensor of a safetensors file, which the library does not return as NumPy."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(length))[name]
    start = 8 + length + entry["data_offsets"][0]
    return np.memmap(file, np.uint8, "r", start, tuple(entry["shape"])).view(jnp.float8_e4m3fn)


def refusal(quantization: Mapping[str, Any] | None) -> str | None:
    """Returns the error for an unsupported `quantization_config` of config.json, or None."""
    method = quantization and quantization.get("quant_method")
    if not quantization or method == "mxfp4" or (method == "fp8" and quantization.get("weight_block_size")):
        return None
    return (
        f"config.json: quantization_config.quant_method={method}: not supported; supported are mxfp4, and fp8 with "
        "weight_block_size; load the model in transformers with dequantize=True and save it again"
    )
