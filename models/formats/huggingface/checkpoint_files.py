"""Loads safetensors checkpoints directly onto the mesh and saves them, one slice or tensor at a time.

Pickle files are never opened. A process holds only its own shards and one tensor of a checkpoint in memory.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.formats.huggingface.dequantize import BLOCKS, FACTORS, FP8, MXFP4, SCALES, dequantized_name, mapped_fp8
from models.formats.huggingface.families import Family, family_of, write_config
from models.formats.huggingface.weight_map import LETTERS, TensorMapping
from models.transformer import Params, abstract_params, param_axes, stacks

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # constants in older files, not weights
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
Progress = Callable[[int, int], None]  # done, total


class WeightNames(Protocol):
    """Tensor names and layouts of a format."""

    @property
    def rules(self) -> Callable[[ModelConfig], list[TensorMapping]]:
        """Returns the mapping of all tensors of a model."""
        ...


class Checkpoint(Protocol):
    """A published checkpoint on disk, in any format."""

    label: str  # name in messages: hf:FOLDER, gguf:FILE
    source: str  # file or header that defines the shapes, for messages
    mtp_layers: int  # multi-token prediction layers after the decoder, which are ignored

    @property
    def naming(self) -> WeightNames: ...

    def names(self) -> set[str]:
        """Returns the names of all weights."""
        ...

    def slice(self, name: str) -> Any:
        """Returns a lazy tensor with `get_shape()` that reads the indexed part."""
        ...


def safetensors_library() -> Any:
    """Imports safetensors. Raises: ValueError if it is not installed."""
    try:
        import safetensors.numpy
    except ImportError:
        raise ValueError("reading and writing hf: folders needs the extra: pip install -e '.[safetensors]'") from None
    return safetensors


class Folder:
    """A Hugging Face checkpoint folder: its config.json, and slices of its tensors by name."""

    source = "config.json"

    def __init__(self, path: Path):
        """Raises: ValueError if config.json or safetensors files are missing, with the fix."""
        self.path, self.label = path, f"hf:{path}"
        if not (path / "config.json").is_file():
            raise ValueError(f"hf:{path}: config.json not found; pass the folder of a downloaded checkpoint")
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        if (path / INDEX).exists():
            named: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
            missing = sorted({file for file in named.values() if not (path / file).is_file()})
            if missing:
                raise ValueError(f"hf:{path}: {missing[0]} not found; the download is incomplete")
            self._files = {name: path / file for name, file in named.items()}
        elif (path / SINGLE).exists():
            self._files = dict.fromkeys(self._open(path / SINGLE).keys(), path / SINGLE)
        else:
            pickled = sorted(p.name for p in path.glob("*.bin"))
            way_out = (
                f"{pickled[0]} is a pickle, which can execute code and is never opened; save the model as safetensors "
                "with transformers (model.save_pretrained(folder))"
                if pickled
                else f"neither {SINGLE} nor {INDEX} found"
            )
            raise ValueError(f"hf:{path}: {way_out}")

    @property
    def naming(self) -> Family:
        return family_of(self.config)

    @property
    def mtp_layers(self) -> int:
        return self.config.get("num_nextn_predict_layers") or 0

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {file: self._open(file) for file in set(self._files.values())}

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safetensors_library().safe_open(file, framework="numpy")
        except OSError as error:
            raise ValueError(f"hf:{file}: cannot be read: {error}") from None

    def names(self) -> set[str]:
        names = {dequantized_name(name, self._files) for name in self._files if not name.endswith(BUFFERS)}
        return {name for name in names if name is not None}

    def slice(self, name: str) -> Any:
        """Returns a lazy tensor, dequantized if necessary; only the indexed part is read."""
        if name + BLOCKS in self._files:
            return MXFP4(self._slice(name + BLOCKS), self._slice(name + SCALES))
        if name + FACTORS in self._files:
            rows, columns = (self.config.get("quantization_config") or {}).get("weight_block_size", (128, 128))
            return FP8(mapped_fp8(self._files[name], name), self._slice(name + FACTORS), (rows, columns))
        return self._slice(name)

    def _slice(self, name: str) -> Any:
        return self._handles[self._files[name]].get_slice(name)


# Mappings to arrays


def groups_of(pattern: str) -> list[str]:
    """Splits a pattern into dims: `(NH)D` to [NH, D]."""
    groups, rest = [], pattern
    while rest:
        end = rest.index(")") + 1 if rest[0] == "(" else 1
        groups.append(rest[:end].strip("()"))
        rest = rest[end:]
    return groups


def _paired(pattern: str) -> tuple[str, bool]:
    """Converts `(Nh)D` to `(NH)D`, and returns whether rotary pairs are interleaved (h)."""
    return pattern.replace("h", "H"), "h" in pattern


def _at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


class WeightMap:
    """Location of each parameter in the tensors of a format."""

    def __init__(self, config: ModelConfig, naming: WeightNames):
        self.config, self.rules = config, naming.rules(config)
        self._stacks = {stack.name: stack for stack in stacks(config)}
        self._axes, self._abstract = param_axes(config), abstract_params(config)
        self.places = {self._path(r, path): (r, path) for r in self.rules for path, _ in r.parts}

    def _path(self, rule: TensorMapping, path: str) -> str:
        return f"{rule.stack}.{path}" if "{i}" in rule.name else path

    def sizes(self, rule: TensorMapping, path: str) -> dict[str, int]:
        """Returns the dim sizes of a parameter by letter, without layer and expert dims indexed by tensor names."""
        path = self._path(rule, path)
        numbered = ("layers", "experts") if "{e}" in rule.name else ("layers",)
        named = zip(_at(self._axes, path), _at(self._abstract, path).shape, strict=True)
        return {LETTERS[axis]: size for axis, size in named if axis not in numbered}

    def shape(self, rule: TensorMapping) -> tuple[int, ...]:
        """Returns the shape of a checkpoint tensor."""
        total: list[int] = []
        for path, pattern in rule.parts:
            sizes = self.sizes(rule, path)
            shape = [int(np.prod([sizes[d] for d in group])) for group in groups_of(_paired(pattern)[0])]
            if total:
                total[rule.axis] += shape[rule.axis]
            else:
                total = shape
        return tuple(total)

    def tensors(self) -> Iterator[tuple[str, TensorMapping, tuple[int, ...]]]:
        """Yields (tensor name, mapping, index in the leading dims of the parameter)."""
        for rule in self.rules:
            for index in np.ndindex(*self.numbered(rule)):
                yield self.name(rule, index), rule, index

    def numbered(self, rule: TensorMapping) -> tuple[int, ...]:
        """Returns the sizes of the leading parameter dims that are indexed by tensor names."""
        if "{i}" not in rule.name:
            return ()
        stack = self._stacks[rule.stack]
        layers = (stack.stop - stack.start,)
        return (*layers, self.config.moe.num_experts) if "{e}" in rule.name else layers

    def name(self, rule: TensorMapping, index: tuple[int, ...]) -> str:
        """Returns the tensor name for `index` in the leading dims of the parameter."""
        if not index:
            return rule.name
        return rule.name.format(i=self._stacks[rule.stack].start + index[0], e=index[-1])

    def read(self, tensor: Any, rule: TensorMapping, path: str, wanted: Mapping[str, slice]) -> np.ndarray:
        """Reads a slice of a parameter, for one layer and expert, from a tensor; in parameter dim order."""
        start, number, paired, stride = 0, 0, False, len(rule.parts) if rule.interleaved else 1
        for number, (part, pattern) in enumerate(rule.parts):  # noqa: B007
            pattern, paired = _paired(pattern)
            sizes, groups = self.sizes(rule, part), groups_of(pattern)
            if part == path:
                break
            start += 0 if rule.interleaved else int(np.prod([sizes[d] for d in groups[rule.axis]]))
        ranges, left, dims = [], dict(wanted), []
        for axis, group in enumerate(groups):
            major, rest = group[0], int(np.prod([sizes[d] for d in group[1:]]))
            low, high, _ = wanted[major].indices(sizes[major])
            left[major] = slice(None)
            offset, step = (start, stride) if axis == rule.axis else (0, 1)
            ranges.append(slice(offset + low * rest * step, offset + high * rest * step))
            dims += [high - low, *(sizes[d] for d in group[1:])]
        letters = "".join(groups)
        array = np.asarray(tensor[tuple(ranges)])
        if rule.interleaved:
            array = array[(*[slice(None)] * rule.axis, slice(number, None, stride))]
        array = array.reshape(dims)
        if paired:  # H is never first in its parentheses, so it is not sliced here
            array = array.take(np.arange(sizes["H"]).reshape(-1, 2).T.ravel(), letters.index("H"))
        return array.transpose([letters.index(d) for d in sizes])[tuple(left[d] for d in sizes)]

    def write(self, params: Params, rule: TensorMapping, index: tuple[int, ...]) -> np.ndarray:
        """Returns one full checkpoint tensor on this host."""
        parts = []
        for path, pattern in rule.parts:
            array, sizes = to_host(_at(params, self._path(rule, path))[index]), self.sizes(rule, path)
            order = list(sizes)
            pattern, paired = _paired(pattern)
            groups = groups_of(pattern)
            if paired:
                array = array.take(np.arange(sizes["H"]).reshape(2, -1).T.ravel(), order.index("H"))
            array = array.transpose([order.index(d) for d in "".join(groups)])
            parts.append(array.reshape([int(np.prod([sizes[d] for d in group])) for group in groups]))
        if rule.interleaved:
            joined = np.stack(parts, rule.axis + 1).reshape(self.shape(rule))
        else:
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts, rule.axis)
        return np.ascontiguousarray(joined)


def to_host(array: jax.Array) -> np.ndarray:
    """Gathers a sharded array on the host; all processes call it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _stored_names(folder: Checkpoint, layout: WeightMap) -> dict[str, str]:
    """Maps expected to stored tensor names. Raises: ValueError naming tensors that do not match."""
    stored = folder.names()
    wanted = {name: layout.shape(rule) for name, rule, _ in layout.tensors()}
    bare = lambda name: name.partition(".")[2]  # GPT-2 files omit the "transformer." prefix
    renamed = {name: name if name in stored or bare(name) not in stored else bare(name) for name in wanted}
    missing = sorted(name for name, found in renamed.items() if found not in stored)
    unmapped = sorted(stored - set(renamed.values()))
    # Layers after the last are multi-token prediction modules (DeepSeek-V3, section 2.2), not used by the decoder.
    last = layout.config.num_layers
    mtp = tuple(f"model.layers.{n}." for n in range(last, last + folder.mtp_layers))
    unmapped = [name for name in unmapped if not name.startswith(mtp)]
    if layout.config.tied_embeddings:
        unmapped = [name for name in unmapped if name != "lm_head.weight"]  # a copy of the embedding
    problems = [f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in unmapped]
    for name, found in renamed.items():
        if found in stored and (shape := tuple(folder.slice(found).get_shape())) != wanted[name]:
            problems.append(f"{found} has shape {list(shape)}, but {folder.source} requires {list(wanted[name])}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{folder.label}: {'; '.join(problems[:5])}{more}")
    return renamed


def load_params(
    folder: Checkpoint, config: ModelConfig, abstract: Params, progress: Progress = lambda *_: None
) -> Params:
    """Loads parameters with the shardings and dtypes of `abstract`; each process reads its own slices, in parallel.

    Raises: ValueError naming tensors that are missing, unexpected or of another shape.
    """
    layout = WeightMap(config, folder.naming)
    renamed = _stored_names(folder, layout)
    done = [0]

    def load(path: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        rule, part = layout.places[path]
        letters, numbered = list(layout.sizes(rule, part)), layout.numbered(rule)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            leading, wanted = index[: len(numbered)], dict(zip(letters, index[len(numbered) :], strict=True))
            ranges = [range(*cut.indices(size)) for cut, size in zip(leading, numbered, strict=True)]
            one = lambda at: layout.read(folder.slice(renamed[layout.name(rule, at)]), rule, part, wanted)
            pieces = [one(at).astype(spec.dtype) for at in itertools.product(*ranges)]
            return np.stack(pieces).reshape(*map(len, ranges), *pieces[0].shape)

        sharding = spec.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        array = jax.make_array_from_callback(spec.shape, sharding, read)
        done[0] += 1
        progress(done[0], len(leaves))
        return array

    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    named = [(".".join(str(key.key) for key in path), spec) for path, spec in leaves]
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda item: load(*item), named))
    return jax.tree.unflatten(structure, arrays)


def first_difference(folder: Checkpoint, config: ModelConfig, params: Params) -> str | None:
    """Returns the name of the first stored tensor that is not bitwise equal to `params`, or None."""
    layout = WeightMap(config, folder.naming)
    renamed = _stored_names(folder, layout)
    for name, rule, index in layout.tensors():
        stored = np.asarray(folder.slice(renamed[name])[:])
        ours = layout.write(params, rule, index).astype(stored.dtype)
        if not np.array_equal(ours.view(np.uint8), stored.view(np.uint8)):
            return renamed[name]
    return None


def save_params(
    path: Path,
    config: ModelConfig,
    params: Params,
    family: Family,
    *,
    dtype: str,
    shard_bytes: int,
    progress: Progress = lambda *_: None,
) -> None:
    """Writes config.json and the tensors, in files of at most `shard_bytes` unless a tensor is larger.

    All processes call it, process 0 writes. It holds the tensors of one file in memory.
    """
    layout, numpy_dtype = WeightMap(config, family), np.dtype(jnp.dtype(dtype))
    shards: list[list[tuple[str, TensorMapping, tuple[int, ...]]]] = [[]]
    filled, total = 0, 0
    for name, rule, index in layout.tensors():
        size = int(np.prod(layout.shape(rule))) * numpy_dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, rule, index))
        filled, total = filled + size, total + size
    is_main = jax.process_index() == 0
    path.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: layout.write(params, rule, index).astype(numpy_dtype) for name, rule, index in shard}
        if is_main:
            safetensors_library().numpy.save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        progress(number, len(shards))
    if is_main:
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        written = write_config(family, config) | {"dtype": dtype, "torch_dtype": dtype}
        (path / "config.json").write_text(json.dumps(written, indent=2) + "\n")
