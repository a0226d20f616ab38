"""Loads existing weights: of a run, a published checkpoint (`hf:FOLDER`, `gguf:FILE`) or adapters (`peft:FOLDER`)."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.schema import RunConfig, to_plain, validate
from data.object_store import is_url
from data.records.chat_encoding import configured
from data.tokenizers.gguf_tokenizer import read_tokenizer
from data.tokenizers.kinds import SentencePieceConfig, TokenizerConfig, TokenizerJsonConfig, from_files, save_tokenizer
from data.tokenizers.tokenizer import TEMPLATE, Tokenizer, fingerprint
from launch.build import MADE_OF, Core, is_main_process, publish_files
from launch.config_errors import named_keys
from launch.run_folder import RunFolder, folder_in
from models.adapters.lora import AdapterConfig
from models.attention.kernels import without_kernel
from models.config import COMPUTE_KEYS, ModelConfig
from models.formats.gguf.files import File
from models.formats.huggingface.checkpoint_files import TOKENIZER_FILES, Checkpoint, Folder, load_params
from models.formats.huggingface.families import family_of, read_model
from models.formats.huggingface.peft import Folder as AdapterFolder
from models.pruning import WidthConfig, prune_params, pruned_config, select_units, widths
from models.transformer import abstract_params, make_apply, param_axes, stacks
from trainer.adapters import AdapterLayout
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.checksums import on_host, state_hash
from trainer.mesh import param_shardings, replicated, with_shardings
from trainer.objective import FrozenModel, ObjectiveConfig, Params

Say = Callable[[str], None]


@dataclass(frozen=True)
class WeightsSource:
    """Weights that `init_from` or a frozen model refers to."""

    name: str  # display name
    model: ModelConfig
    tokenizer_config: TokenizerConfig
    tokenizer: Callable[[], Tokenizer]
    params: Callable[..., Params]  # loads onto given shapes and shardings; published ones also take `Progress`
    reference: str  # refers to the same weights later, even after further checkpoints
    checkpoint: Checkpoint | None = None  # of published weights
    base: "WeightsSource | None" = None  # of adapters: the base that `params` merges them into
    adapter: AdapterConfig | None = None
    adapters: Callable[[AdapterLayout], Params] | None = None
    extra_files: dict[str, bytes] = field(default_factory=dict)  # of published weights: other files of the folder


def _run_named(name: str, runs: str) -> RunFolder:
    """Returns the folder of a run by its name, path or object-store URL."""
    if is_url(name):
        around, _, last = name.rstrip("/").rpartition("/")
        return folder_in(around, last)
    return RunFolder(Path(name)) if Path(name, "config.yaml").exists() else folder_in(runs, name)


def resolve_weights(reference: str, runs: str, say: Say, *, key: str = "init_from") -> WeightsSource:
    """Resolves `hf:FOLDER`, `gguf:FILE`, `peft:FOLDER`, or a run's `NAME` or `FOLDER`, optionally with `@STEP`.

    Raises: ValueError naming `key` and the fix if there are no such weights.
    """
    kind, published = published_kind(reference)
    if kind is not None:
        return PUBLISHED[kind](published)
    name, _, step = reference.partition("@")
    folder = _run_named(name, runs)
    if not folder.config.exists():
        raise ValueError(
            f"{key}={reference}: there is no run in {folder.where}; set it to a run's name or folder, hf:FOLDER or "
            "gguf:FILE of a published checkpoint, or peft:FOLDER of adapters"
        )
    if step and not step.isdigit():
        raise ValueError(f"{key}={reference}: {step!r} is not a step number; write NAME@STEP")
    checkpointer = folder.checkpointer(read_only=True, say=say)
    at = int(step) if step else checkpointer.latest_valid_step()
    if at is None:
        raise ValueError(f"{key}={reference}: {folder.where} has no checkpoint")
    saved = folder.saved_config()

    def params(abstract: Params) -> Params:
        try:
            if saved.adapter.active:
                return merged_params(checkpointer, at, saved, abstract, runs, say)
            return checkpointer.restore_params(at, abstract)
        except ValueError as error:
            raise ValueError(f"{key}={reference}: {error}") from error

    tokenizer = lambda: from_files(checkpointer.read_tokenizer(at))
    return WeightsSource(f"{folder.name}, step {at}", saved.model, saved.tokenizer, tokenizer, params, f"{name}@{at}")


# The base of adapters


class AdapterBase(NamedTuple):
    """The frozen base of adapters, and its record in their checkpoints."""

    params: Params  # quantized as `adapter.quantize_base` says
    name: str  # display name
    start: Callable[[AdapterLayout], Params] | None  # loads trained adapters; None: new ones
    record: dict[str, str]  # origin: the reference; sha256: over all weights as loaded


def load_base(
    adaptation: AdapterLayout, reference: str, runs: str, say: Say, *, sha256: str | None = None
) -> AdapterBase:
    """Loads the base of adapters. Raises: ValueError if its weights are missing or have changed."""
    source = resolve_weights(reference, runs, say)
    base = with_head(source.base or source, outputs_of(adaptation.full_params))
    params, record = _checked(base, adaptation.full_params, "that the adapters were trained on", sha256)
    return AdapterBase(adaptation.quantize_base(params), base.name, source.adapters, record)


def load_frozen_model(
    objective: ObjectiveConfig,
    role: str,
    reference: str,
    tokenizer: Tokenizer,
    core: Core,
    runs: str,
    say: Say,
    *,
    sha256: str | None = None,
) -> tuple[Any, dict[str, str]]:
    """Loads the frozen model of this role onto the run's mesh; returns it and its record for checkpoints.

    Without a source in its spec it has the policy's architecture, and its parameters are returned, with adapters
    merged; otherwise it is a `FrozenModel`.
    Raises: ValueError if it is missing or has changed, if its tokenizer is not the run's, or if `objective` cannot
    compare the two models.
    """
    spec = objective.frozen_needs.models[role]
    key, which = spec.key, f"of this run's {role}"
    source = resolve_weights(reference, runs, say, key=key)
    if spec.source is None:
        abstract = core.own if core.adaptation is None else core.adaptation.full_params
        return _checked(source, abstract, which, sha256, key=key)
    if fingerprint(source.tokenizer()) != fingerprint(tokenizer):
        raise ValueError(
            f"{key}={reference}: its tokenizer differs from this run's, so token probabilities cannot be compared; "
            f"start from its weights and tokenizer with init_from={reference}"
        )
    model = replace(source.model, vocab_size=source.model.vocab_size or tokenizer.vocab_size)
    objective.check_frozen_model(role, core.model, model)
    shapes, axes = abstract_params(model), param_axes(model)
    shardings = param_shardings(axes, shapes, core.mesh, core.rules)
    abstract = with_shardings(shapes, shardings)
    params, record = _checked(source, abstract, which, sha256, key=key)
    record |= {"model": model_digest(model)}
    return FrozenModel(params, make_apply(without_kernel(model), core.constrain), tokenizer.vocab_size), record


def model_digest(model: ModelConfig) -> str:
    """Returns a hash of the architecture: of how a model uses its weights."""
    digested = {key: value for key, value in to_plain(model).items() if key not in (*COMPUTE_KEYS, "mup_base_width")}
    digested["attention"] = {
        key: v for key, v in digested["attention"].items() if f"attention.{key}" not in COMPUTE_KEYS
    }
    return hashlib.sha256(json.dumps(digested, sort_keys=True).encode()).hexdigest()[:16]


def prune_source(source: WeightsSource, config: RunConfig) -> WeightsSource:
    """Prunes the weights to `prune.layers`, in this order, and to `prune.width`.

    Raises: ValueError for layers or a width that the model does not have.
    """
    source = _with_layers(source, config.prune.layers)
    return _with_width(source, config.prune.width) if config.prune.width.active else source


def _with_width(source: WeightsSource, width: WidthConfig) -> WeightsSource:
    wide = source.model
    pruned = pruned_config(wide, width)

    def params(abstract: Params, *progress: Any) -> Params:
        onto = jax.tree.leaves(abstract)[0].sharding.mesh
        sized = abstract_params(replace(wide, vocab_size=abstract["embedding"].shape[0]))
        # Sharded like the pruned parameters where the sizes allow it.
        sharded = lambda shape, leaf: _divisible(shape.shape, leaf.sharding, replicated(onto))
        full = source.params(with_shardings(sized, jax.tree.map(sharded, sized, abstract)), *progress)
        choice = select_units(wide, pruned, full, on_host)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(lambda params: prune_params(wide, choice, params), out_shardings=shardings)(full)

    sizes = ", ".join(f"{name} {now} of {widths(wide)[name]}" for name, now in widths(pruned).items())
    return replace(source, name=f"{source.name}, pruned to {sizes}", model=pruned, params=params, checkpoint=None)


def _divisible(shape: tuple[int, ...], sharding: Any, otherwise: Any) -> Any:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return otherwise
    return sharding


def _with_layers(source: WeightsSource, layers: list[int]) -> WeightsSource:
    """Keeps only these layers, in this order; an empty list keeps all.

    Raises: ValueError for layers that the model does not have.
    """
    if not layers:
        return source
    model, n = source.model, source.model.num_layers
    wrong = [i for i in layers if not 0 <= i < n]
    if wrong:
        raise ValueError(f"prune.layers={layers}: {source.name} has layers 0 to {n - 1}, not {wrong[0]}")
    if len(stacks(model)) > 1:
        raise ValueError(f"prune.layers={layers}: {source.name} has two kinds of layers, which cannot be pruned")
    cut = lambda pattern: [pattern[i % len(pattern)] for i in layers]
    pruned = replace(
        model,
        num_layers=len(layers),
        attention=replace(model.attention, layer_types=cut(model.attention.layer_types)),
        rope=replace(model.rope, layer_pattern=cut(model.rope.layer_pattern)),
    )

    def params(abstract: Params, *progress: Any) -> Params:
        deep = lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
        full = source.params({**abstract, "layers": jax.tree.map(deep, abstract["layers"])}, *progress)
        take = lambda tree: {**tree, "layers": jax.tree.map(lambda x: x[np.array(layers)], tree["layers"])}
        return jax.jit(take, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(full)

    name = f"{source.name}, {len(layers)} of its {n} layers"
    return replace(source, name=name, model=pruned, params=params, checkpoint=None)


def with_head(source: WeightsSource, outputs: int) -> WeightsSource:
    """Replaces the head by `outputs` zero-initialized scores; 0 restores the LM head of tied embeddings.

    Raises: ValueError if logits are requested from weights without an LM head.
    """
    if source.model.num_labels == outputs:
        return source
    if not outputs and not source.model.tied_embeddings:
        raise ValueError(
            f"init_from={source.reference}: {source.name} has {source.model.num_labels} scores and no LM head; start "
            "from a run of a language model"
        )

    def params(abstract: Params, *progress: Any) -> Params:
        table = abstract["embedding"]
        mesh, spec = table.sharding.mesh, (*table.sharding.spec, None, None)[:2]
        lies = lambda *shape: jax.ShapeDtypeStruct(shape, table.dtype, sharding=NamedSharding(mesh, P(*spec[::-1])))
        shapes = {key: leaf for key, leaf in abstract.items() if key != "score"}
        if source.model.num_labels:
            shapes["score"] = lies(table.shape[1], source.model.num_labels)
        elif not source.model.tied_embeddings:
            shapes["head"] = lies(*table.shape[::-1])
        found = source.params(shapes, *progress)
        remaining = {key: leaf for key, leaf in found.items() if key not in ("score", "head")}
        return remaining | ({"score": _zeros(abstract["score"])} if outputs else {})

    return replace(source, model=replace(source.model, num_labels=outputs), params=params, checkpoint=None)


def outputs_of(params: Params) -> int:
    """Returns the number of scores of a tree of parameters or shapes; 0: logits."""
    return params["score"].shape[1] if "score" in params else 0


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()


def _checked(
    source: WeightsSource, abstract: Params, which: str, sha256: str | None, *, key: str = "init_from"
) -> tuple[Params, dict[str, str]]:
    params = source.params(abstract)
    found = state_hash(params)
    if sha256 not in (None, found):
        raise ValueError(
            f"{key}={source.reference}: these weights are no longer those {which}: their SHA-256 is {found[:12]} "
            f"and was {str(sha256)[:12]}; restore the original"
        )
    return params, {"origin": source.reference, "sha256": found}


def recorded_base(adaptation: AdapterLayout, checkpointer: Checkpointer, step: int, runs: str, say: Say) -> AdapterBase:
    """Loads the base that a checkpoint of adapters records, and verifies its hash."""
    record = checkpointer.read_json(step, "config")["base"]
    return load_base(adaptation, record["origin"], runs, say, sha256=record["sha256"])


def merged_params(
    checkpointer: Checkpointer, step: int, saved: RunConfig, abstract: Params, runs: str, say: Say
) -> Params:
    """Returns the parameters of a run with adapters, merged into their base."""
    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    shard = partial(param_shardings, mesh=mesh, rules=saved.sharding)
    adaptation = AdapterLayout(saved.adapter, param_axes(saved.model), abstract, shard)
    adapters = checkpointer.restore_params(step, adaptation.abstract)
    return adaptation.merge(recorded_base(adaptation, checkpointer, step, runs, say).params, adapters)


def published_kind(reference: str) -> tuple[str | None, Path]:
    """Splits `hf:FOLDER` and the like into kind and path; the kind of a run is None."""
    kind, _, path = reference.partition(":")
    return (kind, Path(path)) if kind in PUBLISHED else (None, Path(reference))


def _folder(path: Path) -> WeightsSource:
    folder = Folder(path)
    model = read_model(folder.config)
    pieces = (path / "tokenizer.model").exists() and not (path / "tokenizer.json").exists()
    kind = SentencePieceConfig if pieces else TokenizerJsonConfig
    config = kind(path=str(path / ("tokenizer.model" if pieces else "tokenizer.json")))

    def tokenizer() -> Tokenizer:
        if not Path(str(config.path)).exists():
            raise ValueError(
                f"hf:{path}: there is no tokenizer.json or tokenizer.model; add one, or start a run with another "
                f"tokenizer: train init_from=hf:{path} tokenizer=NAME"
            )
        return configured(config.build(lambda: iter(())), config)

    extra_files = {
        name: (path / name).read_bytes() for name in ("config.json", *TOKENIZER_FILES) if (path / name).is_file()
    }
    load = lambda abstract, *progress: load_params(folder, model, abstract, *progress)
    return WeightsSource(folder.label, model, config, tokenizer, load, folder.label, folder, extra_files=extra_files)


def _file(path: Path) -> WeightsSource:
    file = File(path)

    def tokenizer() -> Tokenizer:
        try:
            return configured(read_tokenizer(file.header.metadata).with_policy(chat_template=template), config)
        except ValueError as error:
            raise ValueError(f"{file.label}: {error}") from None

    template = file.header.metadata.get("tokenizer.chat_template")
    extra_files = {} if template is None else {TEMPLATE: template.encode()}
    load = lambda abstract, *progress: load_params(file, file.model, abstract, *progress)
    config = TokenizerJsonConfig(path=str(path))
    return WeightsSource(file.label, file.model, config, tokenizer, load, file.label, file, extra_files=extra_files)


def _adapters(path: Path) -> WeightsSource:
    folder = AdapterFolder(path)
    base = _folder(folder.base)
    family = family_of(Folder(folder.base).config)
    adapter = folder.config(base.model, family)
    adapters = lambda adaptation: folder.load(base.model, adapter, family, adaptation.abstract)

    def merged(abstract: Params) -> Params:
        # Replicated on each device: adapters are small, and the merged weights are sharded.
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        full = lambda axes, shapes, strict=True: jax.tree.map(lambda _: replicated(mesh), shapes)
        adaptation = AdapterLayout(adapter, param_axes(base.model), abstract, full)
        return adaptation.merge(base.params(adaptation.full_params), adapters(adaptation))

    return WeightsSource(
        folder.label,
        base.model,
        base.tokenizer_config,
        base.tokenizer,
        merged,
        folder.label,
        base=base,
        adapter=adapter,
        adapters=adapters,
        extra_files=base.extra_files,
    )


PUBLISHED: dict[str, Callable[[Path], WeightsSource]] = {"hf": _folder, "gguf": _file, "peft": _adapters}


def inherit_model_config(config: RunConfig, overrides: list[str], folder: RunFolder, say: Say) -> RunConfig:
    """Takes model and tokenizer from `init_from`, unless the command line chooses others.

    Single keys such as `model.remat=full` change the inherited model. A resumed run uses its own saved config, so the
    weights of `init_from` are not needed any more.
    """
    if config.init_from is None:
        return config
    overrides = with_experiment(overrides)
    named = named_keys(overrides)
    if folder.config.exists():
        before = folder.saved_config()
        model, tokenizer, adapter = before.model, before.tokenizer, before.adapter
    else:
        source = prune_source(resolve_weights(config.init_from, config.output_dir, say), config)
        model, tokenizer, adapter = source.model, source.tokenizer_config, source.adapter
    if published_kind(config.init_from)[0] == "peft":
        if chosen := [key for key in named if key.partition(".")[0] == "adapter"]:
            raise ValueError(f"{chosen[0]}: is part of the adapters of {config.init_from}; leave it out")
        config = replace(config, adapter=adapter or config.adapter)
    if "model" not in named:
        # The head follows from the objective, not from the weights.
        model = replace(model, num_labels=config.model.num_labels)
        config = replace(config, model=with_changes(model, config, overrides))
    if not _chooses_tokenizer(named):
        config = replace(config, tokenizer=replace(tokenizer, **_policy_keys(config, named)))
    validate(config)
    return config


def with_experiment(overrides: list[str]) -> list[str]:
    """Returns the overrides with those of the phase and experiment in front: groups, model and tokenizer keys."""
    given = {o.partition("=")[0]: o.partition("=")[2] for o in overrides}
    found: list[str] = []
    for group in ("phase", "experiment"):
        file = files("configs") / group / f"{given.get(group)}.yaml"
        content = yaml.safe_load(file.read_text()) if file.is_file() else {}
        found += [f"{k.split('/')[-1]}={v}" for d in content.get("defaults", ()) for k, v in d.items()]
        found += _keys(content)
    return [*found, *overrides]


def _keys(content: dict[str, Any], path: str = "") -> list[str]:
    """Returns `a.b=value` for every leaf below `model` and `tokenizer`."""
    found: list[str] = []
    for key, value in content.items():
        if not path and key not in ("model", "tokenizer"):
            continue
        found += _keys(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}={value}"]
    return found


def with_changes(model: ModelConfig, config: RunConfig, overrides: list[str]) -> ModelConfig:
    """Returns `model` with the single keys that the command line sets, such as `model.remat`."""
    model = copy.deepcopy(model)
    for key in sorted(named_keys(overrides)):
        if key.startswith("model."):
            _set(model, key.removeprefix("model."), config.model)
    return model


def _set(model: Any, key: str, given: Any) -> None:
    first, _, rest = key.partition(".")
    if rest and is_dataclass(getattr(model, first)):
        _set(getattr(model, first), rest, getattr(given, first))
    else:
        setattr(model, first, getattr(given, first))


POLICY_KEYS = ("tokenizer.chat_template", "tokenizer.add_bos")  # these may change an inherited tokenizer


def _chooses_tokenizer(named: set[str]) -> bool:
    return any(key.partition(".")[0] == "tokenizer" for key in named - set(POLICY_KEYS))


def _policy_keys(config: RunConfig, named: set[str]) -> dict[str, Any]:
    fields = [key.partition(".")[2] for key in POLICY_KEYS if key in named]
    return {name: getattr(config.tokenizer, name) for name in fields}


def inherit_tokenizer(config: RunConfig, overrides: list[str], folder: RunFolder, say: Say) -> None:
    """Copies the tokenizer of `init_from` to the run folder: its weights depend on its token ids.

    `tokenizer.chat_template` and `tokenizer.add_bos` on the command line change the copy.
    """
    named = named_keys(with_experiment(overrides))
    if config.init_from is None or _chooses_tokenizer(named) or folder.has_checkpoints():
        return
    if is_main_process():
        (folder.tokenizer / MADE_OF).unlink(missing_ok=True)
        inherited = resolve_weights(config.init_from, config.output_dir, say).tokenizer()
        save_tokenizer(configured(inherited, TokenizerConfig(**_policy_keys(config, named))), folder.tokenizer)
    publish_files(folder, "inherited tokenizer")
