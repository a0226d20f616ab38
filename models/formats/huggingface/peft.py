"""Reads and writes PEFT adapters: a folder with adapter_config.json and adapter_model.safetensors.

PEFT stores A as [rank, in] and B as [out, rank] for a weight [out, in] of one layer. The rows are ordered as in the
weight, heads first, so parameters are flattened and transposed but not permuted.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.adapters.lora import AdapterConfig, Method, find_targets, matrices, short_name, split
from models.config import ModelConfig
from models.formats.huggingface.checkpoint_files import WeightMap, groups_of, safetensors_library, to_host
from models.formats.huggingface.families import Family
from models.transformer import param_axes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Options of PEFT that change the adapters and are not supported.
OTHER_METHODS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication", "lora_bias",
    "megatron_config", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters",
    "trainable_token_indices", "layers_to_transform", "exclude_modules", "kasa_config", "monteclora_config",
    "velora_config",
)  # fmt: skip


class Module(NamedTuple):
    """A parameter matrix and the corresponding PEFT module."""

    path: str  # parameter path, e.g. layers/attention/query/kernel
    name: str  # module name, e.g. model.layers.0.self_attn.q_proj
    index: tuple[int, ...]  # index in the leading dims of the parameter
    in_first: bool  # the module's weight is [in, out], as in the Conv1D of GPT-2


def modules(config: ModelConfig, adapter: AdapterConfig, family: Family) -> list[Module]:
    """Returns the PEFT modules of all targets. Raises: ValueError if a matrix is only a part of a tensor."""
    layout, found, axes = WeightMap(config, family), [], param_axes(config)
    for path, names in find_targets(adapter, axes).items():
        rule, part = layout.places[path.replace("/", ".")]
        if len(rule.parts) > 1 or "experts" in names:
            tensor = "a tensor of experts" if "experts" in names else f"{rule.name}, a fused tensor"
            raise ValueError(
                f"adapter.target_modules: {path}: PEFT has no adapter for a part of {tensor}; export the merged model, "
                "to=hf:FOLDER"
            )
        groups, letters = groups_of(dict(rule.parts)[part]), "".join(layout.sizes(rule, part))
        ins = letters[: split(names).num_in]
        found += [
            Module(path, layout.name(rule, index).removesuffix(".weight"), index, groups[0] == ins)
            for index in np.ndindex(*layout.numbered(rule))
        ]
    return found


def _names(module: Module, method: Method) -> dict[str, str]:
    """Returns the tensor names of a module by adapter leaf (a, b, magnitude)."""
    kinds = ("lora_A.weight", "lora_B.weight")
    if module.path == "embedding":
        kinds = ("lora_embedding_A", "lora_embedding_B")
    named = dict(zip(("a", "b"), kinds, strict=True))
    if method is Method.dora:
        named["magnitude"] = "lora_magnitude_vector"
    return {leaf: f"{PREFIX}{module.name}.{tensor_name}" for leaf, tensor_name in named.items()}


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _to_peft(leaf: str, array: np.ndarray, rank: int) -> np.ndarray:
    """Converts A [in..., R] to [R, in], B [R, out...] to [out, R], and a magnitude to [out]."""
    if leaf == "magnitude":
        return array.reshape(-1)
    return np.ascontiguousarray(array.reshape(-1, rank).T if leaf == "a" else array.reshape(rank, -1).T)


def _target_modules(found: list[Module], all_names: list[str]) -> list[str]:
    """Returns the shortest name suffixes that match all adapted modules and no other module."""
    chosen = {module.name for module in found}
    others = [name for name in all_names if name not in chosen]
    targets = set()
    for name in chosen:
        parts = name.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        clear = lambda ending: not any(other == ending or other.endswith("." + ending) for other in others)
        targets.add(next(ending for ending in endings if clear(ending)))
    return sorted(targets)


def save_adapters(
    path: Path,
    config: ModelConfig,
    adapter: AdapterConfig,
    adapters: Any,
    family: Family,
    *,
    base: str,
    dtype: str,
) -> None:
    """Writes adapters; all processes call it, process 0 writes. Raises: ValueError if PEFT cannot hold them."""
    if config.num_labels:
        raise ValueError(
            "the score head is trained in full, which PEFT adapters cannot hold; export the merged model, to=hf:FOLDER"
        )
    found, numpy_dtype = modules(config, adapter, family), np.dtype(jnp.dtype(dtype))
    tensors = {}
    for module in found:
        leaves = _at(adapters, module.path)
        for leaf, tensor_name in _names(module, adapter.method).items():
            array = to_host(leaves[leaf])[module.index]
            tensors[tensor_name] = _to_peft(leaf, array, adapter.rank).astype(numpy_dtype)
    if jax.process_index() != 0:
        return
    every = [name.removesuffix(".weight") for name, _, _ in WeightMap(config, family).tensors()]
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": _target_modules(found, every),
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.method is Method.rslora,
        "use_dora": adapter.method is Method.dora,
        "fan_in_fan_out": any(module.in_first for module in found if module.path not in ("embedding", "head")),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    safetensors_library().numpy.save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def first_difference(
    path: Path, config: ModelConfig, adapter: AdapterConfig, adapters: Any, family: Family
) -> str | None:
    """Returns the name of the first stored tensor that differs from `adapters`, or None."""
    stored = Folder(path)
    for module in modules(config, adapter, family):
        leaves = _at(adapters, module.path)
        for leaf, tensor_name in _names(module, adapter.method).items():
            tensor = stored.tensor(tensor_name)
            wanted = _to_peft(leaf, to_host(leaves[leaf])[module.index], adapter.rank).astype(tensor.dtype)
            if not np.array_equal(tensor.view(np.uint8), wanted.view(np.uint8)):
                return tensor_name
    return None


class Folder:
    """A folder of saved PEFT adapters."""

    def __init__(self, path: Path):
        """Raises: ValueError if files are missing or use unsupported options."""
        self.path, self.label = path, f"peft:{path}"
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise ValueError(f"{self.label}: {name} not found; pass a folder of adapters saved as safetensors")
        self.described: dict[str, Any] = json.loads((path / CONFIG).read_text())
        self._file = safetensors_library().safe_open(path / WEIGHTS, framework="numpy")
        kind, bias = self.described.get("peft_type"), self.described.get("bias", "none")
        if kind != "LORA" or bias != "none":
            raise ValueError(f"{self.label}: peft_type={kind}, bias={bias}: only LORA with bias=none is supported")
        for key in OTHER_METHODS:
            if self.described.get(key):
                raise ValueError(f"{self.label}: {key}={self.described[key]}: not supported")

    @property
    def base(self) -> Path:
        """Folder of the base model. Raises: ValueError if it does not exist."""
        name = self.described.get("base_model_name_or_path") or ""
        if not (Path(name) / "config.json").is_file():
            raise ValueError(
                f"{self.label}: base_model_name_or_path={name!r} is not the folder of a downloaded checkpoint; set "
                f"it to that folder in {CONFIG}"
            )
        return Path(name)

    def tensor(self, name: str) -> np.ndarray:
        """Reads a tensor by name."""
        return np.asarray(self._file.get_tensor(name))

    def config(self, model: ModelConfig, family: Family) -> AdapterConfig:
        """Returns the adapter configuration. Raises: ValueError for missing or unexpected tensors."""
        d, stored = self.described, set(self._file.keys())
        method = Method.dora if d.get("use_dora") else Method.rslora if d.get("use_rslora") else Method.lora
        if d.get("use_dora") and d.get("use_rslora"):
            raise ValueError(f"{self.label}: use_dora together with use_rslora is not supported")
        targets, places = [], set()
        for path in matrices(param_axes(model)):
            name = short_name(path)
            try:
                one = AdapterConfig(method, d["r"], float(d["lora_alpha"]), [name])
                named = {tensor_name for m in modules(model, one, family) for tensor_name in _names(m, method).values()}
            except ValueError:  # no PEFT adapters for this matrix
                continue
            if named & stored:
                targets, places = [*targets, *([] if name in targets else [name])], places | named
        problems = [f"{name} is unexpected" for name in sorted(stored - places)]
        problems += [f"{name} is missing" for name in sorted(places - stored)]
        if problems or not targets:
            raise ValueError(f"{self.label}: {'; '.join(problems[:5]) or 'no adapter tensors found'}")
        return AdapterConfig(method, d["r"], float(d["lora_alpha"]), targets, float(d.get("lora_dropout") or 0.0))

    def load(self, model: ModelConfig, adapter: AdapterConfig, family: Family, abstract: Any) -> Any:
        """Loads the adapters with the shapes and shardings of `abstract`."""
        of_path: dict[str, list[Module]] = {}
        for module in modules(model, adapter, family):
            of_path.setdefault(module.path, []).append(module)

        def load(path: tuple[Any, ...], spec: jax.ShapeDtypeStruct) -> jax.Array:
            *parents, leaf = (key.key for key in path)
            array = np.zeros(spec.shape, spec.dtype)
            for module in of_path["/".join(parents)]:
                tensor, shape = self.tensor(_names(module, adapter.method)[leaf]), array[module.index].shape
                if tensor.size != math.prod(shape):
                    raise ValueError(f"{self.label}: {module.name}: shape {list(tensor.shape)} does not match the base")
                array[module.index] = tensor.T.reshape(shape)  # .T of a vector is the vector
            return jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: array[index])

        return jax.tree_util.tree_map_with_path(load, abstract)
