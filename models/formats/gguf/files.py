"""Reads and writes GGUF files, one tensor at a time.

Files are memory-mapped, and only the requested rows are dequantized. Layout, quantization and dequantization are those
of the `gguf` package.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.config import ModelConfig
from models.formats.gguf.metadata import ROPE_TENSORS, Architecture, Header, architecture_of, read_config, write_header
from models.formats.huggingface.checkpoint_files import WeightMap
from models.transformer import Params

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
# general.file_type of llama.cpp for files of mostly this type.
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7, "q4_0": 2}
ENDS = ("token_embd.weight", "output.weight")
ROUTER = "ffn_gate_inp.weight"
Progress = Callable[[int, int], None]  # done, total


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("reading and writing gguf: files needs the extra: pip install -e '.[gguf]'") from None
    return gguf


class Tensor:
    """Lazy tensor: dequantizes only the indexed rows."""

    def __init__(self, found: Any, offset: int):
        self._found, self._offset = found, offset

    def get_shape(self) -> list[int]:
        return [int(size) for size in reversed(self._found.shape)]

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        data = self._found.data
        if data.dtype.kind == "f":
            array = data[index]
        elif data.ndim == 1:
            array = _gguf().quants.dequantize(data, self._found.tensor_type)[index]
        else:
            rows = _gguf().quants.dequantize(data[index[0]], self._found.tensor_type)
            array = rows[(slice(None), *index[1:])]
        return array - self._offset if self._offset else array


class File:
    """A GGUF file: its header, its model config, and slices of its tensors by name."""

    source = "its header"
    mtp_layers = 0

    def __init__(self, path: Path):
        """Raises: ValueError with the reason if it is not a complete GGUF file of a supported model."""
        self.path, self.label = path, f"gguf:{path}"
        gguf = _gguf()
        if not path.is_file():
            raise ValueError(f"{self.label}: file not found")
        with path.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError(f"{self.label}: is not a GGUF file; it does not start with the magic bytes GGUF")
        try:
            reader = gguf.GGUFReader(path)
            fields = {key: found.contents() for key, found in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"{self.label}: is truncated or corrupt ({error}); download it again") from None
        if fields.get("split.count", 1) > 1:
            raise ValueError(f"{self.label}: is one of {fields['split.count']} parts; join them with llama-gguf-split")
        self._tensors = {found.name: found for found in reader.tensors}
        for name, found in self._tensors.items():
            if not self._readable(found):
                raise ValueError(
                    f"{self.label}: {name} has type {found.tensor_type.name}, which the gguf package cannot read; "
                    "use a file of another type, such as Q8_0"
                )
        try:
            self.naming: Architecture = architecture_of(fields)
            if "token_embd.weight" in self._tensors:  # older files do not store vocab_size
                fields[f"{self.naming.name}.vocab_size"] = int(self._tensors["token_embd.weight"].shape[-1])
            factors = {name: self._tensors[name].data for name in ROPE_TENSORS if name in self._tensors}
            self.header = Header(fields, frozenset(self._tensors), factors)
            self.model: ModelConfig = read_config(self.header)
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}") from None

    @staticmethod
    def _readable(found: Any) -> bool:
        if found.data.dtype.kind == "f":
            return True
        quants = _gguf().quants
        size = _gguf().GGML_QUANT_SIZES[found.tensor_type][1]
        try:
            quants.dequantize(np.zeros((1, size), np.uint8), found.tensor_type)
        except NotImplementedError:
            return False
        return found.data.dtype == np.uint8  # otherwise an integer type

    def names(self) -> set[str]:
        return set(self._tensors) - set(ROPE_TENSORS)

    def slice(self, name: str) -> Tensor:
        """Returns a lazy tensor."""
        return Tensor(self._tensors[name], self.naming.offset(name))

    def raw(self, name: str) -> tuple[str, np.ndarray]:
        """Returns the type name of a tensor and its raw bytes."""
        found = self._tensors[name]
        return found.tensor_type.name, np.ascontiguousarray(found.data).view(np.uint8).reshape(-1)


def tensor_type(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Returns the type of a tensor in a file of mostly `dtype`, following the conventions of llama.cpp.

    Vectors, position embeddings and routers stay F32. Rows that are not a multiple of 32 stay F16. The embedding and
    head of a Q4_0 file are Q8_0.
    """
    if len(shape) == 1 or name == "position_embd.weight" or name.endswith(ROUTER):
        return "F32"
    if dtype in ("q8_0", "q4_0") and shape[-1] % 32:
        return "F16"
    return "Q8_0" if dtype == "q4_0" and name in ENDS else DTYPES[dtype]


def _tensors(layout: WeightMap, row: Architecture, params: Params, dtype: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields name, type and encoded data of each tensor.

    Raises: ValueError if a value exceeds the range of float16.
    """
    gguf = _gguf()
    for name, rule, index in layout.tensors():
        kind = tensor_type(name, layout.shape(rule), dtype)
        array = layout.write(params, rule, index).astype(np.float32) + np.float32(row.offset(name))
        if kind == "F16" and np.abs(array).max() > np.finfo(np.float16).max:
            raise ValueError(
                f"task.dtype={dtype}: {name} has values outside the float16 range; use task.dtype=bfloat16"
            )
        yield name, kind, gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])


def save_params(
    path: Path,
    config: ModelConfig,
    params: Params,
    row: Architecture,
    metadata: Mapping[str, Any],
    *,
    dtype: str,
    progress: Progress = lambda *_: None,
) -> None:
    """Writes a file with header, tensors and `metadata`, the header entries not derived from the model.

    All processes call it, process 0 writes. It holds one tensor in memory.
    """
    gguf = _gguf()
    layout, header = WeightMap(config, row), write_header(row, config)
    is_main = jax.process_index() == 0
    writer = gguf.GGUFWriter(path if is_main else None, row.name)
    general = {"general.file_type": FILE_TYPES[dtype], "general.quantization_version": gguf.GGML_QUANT_VERSION}
    for key, value in {**header.metadata, **general, **metadata}.items():
        if key != "general.architecture":
            _add(writer, key, value)
    shapes = {name: layout.shape(rule) for name, rule, _ in layout.tensors()}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[tensor_type(name, shape, dtype)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    for name, factors in header.rope_factors.items():
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    for done, (_, _, data) in enumerate(_tensors(layout, row, params, dtype), 1):
        if is_main:
            writer.write_tensor_data(data)
        progress(done, len(shapes))
    if is_main:
        for factors in header.rope_factors.values():
            writer.write_tensor_data(factors)
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds a header value with the type that llama.cpp expects."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def first_mismatch(
    file: File | None, config: ModelConfig, params: Params, row: Architecture, *, dtype: str
) -> str | None:
    """Returns the first part of a file that differs from what `save_params` writes for `params`, or None.

    All processes call it, because `params` is sharded; a process without access to the file passes None.
    """
    if file is not None and file.model != read_config(write_header(row, config)):
        return "its header"
    wrong = None
    for name, kind, data in _tensors(WeightMap(config, row), row, params, dtype):
        if file is not None and wrong is None:
            stored = file.raw(name) if name in file.names() else ("nothing", np.zeros(0, np.uint8))
            same = stored[0] == kind and np.array_equal(
                stored[1], np.ascontiguousarray(data).view(np.uint8).reshape(-1)
            )
            wrong = None if same else name
    return wrong
