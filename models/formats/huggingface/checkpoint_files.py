"""Published checkpoints on disk: safetensors straight onto the mesh and back, a slice at a time.

No pickle is ever opened, and no process holds more of a checkpoint than its own shards and one tensor.
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
from models.formats.huggingface.dequantize import BLOCKS, FACTORS, FP8, MXFP4, SCALES, mapped_fp8, whole_name
from models.formats.huggingface.families import Family, family_of, write_config
from models.formats.huggingface.weight_map import LETTERS, TensorMapping
from models.transformer import Params, abstract_params, param_axes, stacks

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # of older files: constants, not weights
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
Progress = Callable[[int, int], None]  # done, in all


class WeightNames(Protocol):
    """How a format spells the tensors of a model."""

    @property
    def rules(self) -> Callable[[ModelConfig], list[TensorMapping]]: ...


class Checkpoint(Protocol):
    """A published checkpoint that is there, whatever its format."""

    label: str  # for people: hf:FOLDER, gguf:FILE
    source: str  # what in it tells the shapes
    further_layers: int  # beyond the decoder's, which are let be

    @property
    def naming(self) -> WeightNames: ...

    def names(self) -> set[str]: ...

    def slice(self, name: str) -> Any:
        """Has `get_shape()`, and reads what it is indexed with."""
        ...


def safetensors_library() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ValueError("reading and writing hf: folders needs the extra: pip install -e '.[safetensors]'") from None
    return safetensors


class Folder:
    """A checkpoint that is there: its config, and slices of its tensors by name."""

    source = "config.json"

    def __init__(self, path: Path):
        """Raises: ValueError where there is no config.json or no safetensors, naming the way out."""
        self.path, self.label = path, f"hf:{path}"
        if not (path / "config.json").is_file():
            raise ValueError(f"hf:{path}: there is no config.json; give the folder of a downloaded checkpoint")
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        if (path / INDEX).exists():
            named: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
            missing = sorted({file for file in named.values() if not (path / file).is_file()})
            if missing:
                raise ValueError(f"hf:{path}: {missing[0]} is not there; the download is not whole")
            self._files = {name: path / file for name, file in named.items()}
        elif (path / SINGLE).exists():
            self._files = dict.fromkeys(self._open(path / SINGLE).keys(), path / SINGLE)
        else:
            pickled = sorted(p.name for p in path.glob("*.bin"))
            way_out = (
                f"{pickled[0]} is a pickle, which can run code and is never opened: save it again as safetensors with "
                "transformers (model.save_pretrained(folder))"
                if pickled
                else f"neither {SINGLE} nor {INDEX} is there"
            )
            raise ValueError(f"hf:{path}: {way_out}")

    @property
    def naming(self) -> Family:
        return family_of(self.config)

    @property
    def further_layers(self) -> int:
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
        whole = {whole_name(name, self._files) for name in self._files if not name.endswith(BUFFERS)}
        return {name for name in whole if name is not None}

    def slice(self, name: str) -> Any:
        """Something to index: reads what is asked for and nothing else."""
        if name + BLOCKS in self._files:
            return MXFP4(self._slice(name + BLOCKS), self._slice(name + SCALES))
        if name + FACTORS in self._files:
            rows, columns = (self.config.get("quantization_config") or {}).get("weight_block_size", (128, 128))
            return FP8(mapped_fp8(self._files[name], name), self._slice(name + FACTORS), (rows, columns))
        return self._slice(name)

    def _slice(self, name: str) -> Any:
        return self._handles[self._files[name]].get_slice(name)


# From rules to arrays


def groups_of(pattern: str) -> list[str]:
    """`(NH)D` to [NH, D]."""
    groups, rest = [], pattern
    while rest:
        end = rest.index(")") + 1 if rest[0] == "(" else 1
        groups.append(rest[:end].strip("()"))
        rest = rest[end:]
    return groups


def _paired(pattern: str) -> tuple[str, bool]:
    """`(Nh)D` to `(NH)D`, and whether there was an h: heads whose rotary pairs lie side by side."""
    return pattern.replace("h", "H"), "h" in pattern


def _at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


class WeightMap:
    """Where each array of ours stands in the tensors of a format."""

    def __init__(self, config: ModelConfig, naming: WeightNames):
        self.config, self.rules = config, naming.rules(config)
        self._stacks = {stack.name: stack for stack in stacks(config)}
        self._axes, self._abstract = param_axes(config), abstract_params(config)
        self.places = {self._path(r, path): (r, path) for r in self.rules for path, _ in r.parts}

    def _path(self, rule: TensorMapping, path: str) -> str:
        return f"{rule.stack}.{path}" if "{i}" in rule.name else path

    def sizes(self, rule: TensorMapping, path: str) -> dict[str, int]:
        """Of our dims, by letter, in our order; without those that the name of their tensor numbers."""
        path = self._path(rule, path)
        numbered = ("layers", "experts") if "{e}" in rule.name else ("layers",)
        named = zip(_at(self._axes, path), _at(self._abstract, path).shape, strict=True)
        return {LETTERS[axis]: size for axis, size in named if axis not in numbered}

    def shape(self, rule: TensorMapping) -> tuple[int, ...]:
        """Of their tensor."""
        whole: list[int] = []
        for path, pattern in rule.parts:
            sizes = self.sizes(rule, path)
            shape = [int(np.prod([sizes[d] for d in group])) for group in groups_of(_paired(pattern)[0])]
            if whole:
                whole[rule.axis] += shape[rule.axis]
            else:
                whole = shape
        return tuple(whole)

    def tensors(self) -> Iterator[tuple[str, TensorMapping, tuple[int, ...]]]:
        """Their names, each with its rule and where it lies in the leading dims of ours."""
        for rule in self.rules:
            for index in np.ndindex(*self.numbered(rule)):
                yield self.name(rule, index), rule, index

    def numbered(self, rule: TensorMapping) -> tuple[int, ...]:
        """Sizes of the leading dims of ours that the name of their tensor numbers."""
        if "{i}" not in rule.name:
            return ()
        stack = self._stacks[rule.stack]
        layers = (stack.stop - stack.start,)
        return (*layers, self.config.moe.num_experts) if "{e}" in rule.name else layers

    def name(self, rule: TensorMapping, index: tuple[int, ...]) -> str:
        """Of their tensor at `index` of our leading dims."""
        if not index:
            return rule.name
        return rule.name.format(i=self._stacks[rule.stack].start + index[0], e=index[-1])

    def read(self, tensor: Any, rule: TensorMapping, path: str, wanted: Mapping[str, slice]) -> np.ndarray:
        """A slice of one layer (and expert) of an array of ours, out of their tensor, in our order of dims."""
        start, number, paired, turns = 0, 0, False, len(rule.parts) if rule.interleaved else 1
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
            offset, step = (start, turns) if axis == rule.axis else (0, 1)
            ranges.append(slice(offset + low * rest * step, offset + high * rest * step))
            dims += [high - low, *(sizes[d] for d in group[1:])]
        letters = "".join(groups)
        array = np.asarray(tensor[tuple(ranges)])
        if rule.interleaved:
            array = array[(*[slice(None)] * rule.axis, slice(number, None, turns))]
        array = array.reshape(dims)
        if paired:  # H is never the first of its brackets, so heads are whole here
            array = array.take(np.arange(sizes["H"]).reshape(-1, 2).T.ravel(), letters.index("H"))
        return array.transpose([letters.index(d) for d in sizes])[tuple(left[d] for d in sizes)]

    def write(self, params: Params, rule: TensorMapping, index: tuple[int, ...]) -> np.ndarray:
        """One tensor of theirs, whole, on this host."""
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
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _names_there(folder: Checkpoint, layout: WeightMap) -> dict[str, str]:
    """Our spelling of each name to that in the files. Raises: ValueError where the two do not match, naming tensors."""
    there = folder.names()
    wanted = {name: layout.shape(rule) for name, rule, _ in layout.tensors()}
    bare = lambda name: name.partition(".")[2]  # GPT-2's files leave the name of the whole out
    spelt = {name: name if name in there or bare(name) not in there else bare(name) for name in wanted}
    missing = sorted(name for name, found in spelt.items() if found not in there)
    unmapped = sorted(there - set(spelt.values()))
    # Layers past the last predict further tokens (DeepSeek-V3, section 2.2); the decoder itself is whole without them.
    last, more = layout.config.num_layers, folder.further_layers
    further = tuple(f"model.layers.{n}." for n in range(last, last + more))
    unmapped = [name for name in unmapped if not name.startswith(further)]
    if layout.config.tied_embeddings:
        unmapped = [name for name in unmapped if name != "lm_head.weight"]  # a copy of the embedding
    problems = [f"{name} is missing" for name in missing] + [f"{name} has no place here" for name in unmapped]
    for name, found in spelt.items():
        if found in there and (shape := tuple(folder.slice(found).get_shape())) != wanted[name]:
            problems.append(f"{found} is {list(shape)}, and {folder.source} says {list(wanted[name])}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{folder.label}: {'; '.join(problems[:5])}{more}")
    return spelt


def load_params(
    folder: Checkpoint, config: ModelConfig, abstract: Params, progress: Progress = lambda *_: None
) -> Params:
    """Parameters onto the shardings and dtypes of `abstract`; each process reads its own slices, in parallel.

    Raises: ValueError naming each tensor that is missing, unmapped or of another shape.
    """
    layout = WeightMap(config, folder.naming)
    spelt = _names_there(folder, layout)
    done = [0]

    def load(path: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        rule, part = layout.places[path]
        letters, numbered = list(layout.sizes(rule, part)), layout.numbered(rule)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            leading, wanted = index[: len(numbered)], dict(zip(letters, index[len(numbered) :], strict=True))
            ranges = [range(*cut.indices(size)) for cut, size in zip(leading, numbered, strict=True)]
            one = lambda at: layout.read(folder.slice(spelt[layout.name(rule, at)]), rule, part, wanted)
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
    """The name of the first tensor there that is not, bit for bit, the one that `params` would write; None if none."""
    layout = WeightMap(config, folder.naming)
    spelt = _names_there(folder, layout)
    for name, rule, index in layout.tensors():
        there = np.asarray(folder.slice(spelt[name])[:])
        ours = layout.write(params, rule, index).astype(there.dtype)
        if not np.array_equal(ours.view(np.uint8), there.view(np.uint8)):
            return spelt[name]
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
    """Writes config.json and the tensors, in files of at most `shard_bytes` where no tensor is larger.

    Every process calls it, process 0 writes, and holds one file's tensors at a time.
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
    chief = jax.process_index() == 0
    path.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: layout.write(params, rule, index).astype(numpy_dtype) for name, rule, index in shard}
        if chief:
            safetensors_library().numpy.save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        progress(number, len(shards))
    if chief:
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        written = write_config(family, config) | {"dtype": dtype, "torch_dtype": dtype}
        (path / "config.json").write_text(json.dumps(written, indent=2) + "\n")
