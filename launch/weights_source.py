"""Weights that exist already: another run's, or a published checkpoint's (`hf:FOLDER`, `gguf:FILE`), or
adapters on one (`peft:FOLDER`)."""

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
from models.formats.huggingface.checkpoint_files import BESIDE, Checkpoint, Folder, load_params
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
    """What `init_from` names."""

    name: str  # for people
    model: ModelConfig
    tokenizer_config: TokenizerConfig
    tokenizer: Callable[[], Tokenizer]
    params: Callable[..., Params]  # onto the shapes and shardings given; a published one's also gets `Progress`
    reference: str  # what names the same weights later, whatever is saved until then
    checkpoint: Checkpoint | None = None  # of a published one
    base: "WeightsSource | None" = None  # of adapters: their base, into which `params` merges them
    adapter: AdapterConfig | None = None
    adapters: Callable[[AdapterLayout], Params] | None = None
    extra_files: dict[str, bytes] = field(default_factory=dict)  # of a published one: files that came with the weights


def _run_named(name: str, runs: str) -> RunFolder:
    """By its name, or by its folder, which may be one of an object store."""
    if is_url(name):
        around, _, last = name.rstrip("/").rpartition("/")
        return folder_in(around, last)
    return RunFolder(Path(name)) if Path(name, "config.yaml").exists() else folder_in(runs, name)


def resolve_weights(reference: str, runs: str, say: Say, *, key: str = "init_from") -> WeightsSource:
    """`hf:FOLDER`, `gguf:FILE`, `peft:FOLDER`, or a run's `NAME` or `FOLDER`, either with `@STEP`.

    Raises: ValueError where there is none, naming `key` and the way out.
    """
    kind, published = published_kind(reference)
    if kind is not None:
        return PUBLISHED[kind](published)
    name, _, step = reference.partition("@")
    folder = _run_named(name, runs)
    if not folder.config.exists():
        raise ValueError(
            f"{key}={reference}: there is no run in {folder.where}; give a run's name or folder, or hf:FOLDER or "
            "gguf:FILE of a published checkpoint, or peft:FOLDER of adapters"
        )
    if step and not step.isdigit():
        raise ValueError(f"{key}={reference}: {step!r} is no step; give NAME@STEP")
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
    """Frozen weights, and what a checkpoint of their adapters says of them."""

    params: Params  # as `adapter.quantize_base` keeps them
    name: str  # for people
    start: Callable[[AdapterLayout], Params] | None  # trained adapters to begin with; None: new ones
    record: dict[str, str]  # origin: the reference; sha256: over all of the weights, as they were read


def load_base(
    adaptation: AdapterLayout, reference: str, runs: str, say: Say, *, sha256: str | None = None
) -> AdapterBase:
    """Raises: ValueError where the weights are gone, or are no longer those that the adapters were trained on."""
    origin = resolve_weights(reference, runs, say)
    below = with_head(origin.base or origin, outputs_of(adaptation.full_params))
    params, record = _checked(below, adaptation.full_params, "on which the adapters were trained", sha256)
    return AdapterBase(adaptation.quantize_base(params), below.name, origin.adapters, record)


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
    """The model of this role from `reference`, on the run's mesh, and what a checkpoint records of it.

    Without a source in its spec it has the policy's architecture, and only its parameters are returned, adapters
    merged; else it is a `FrozenModel`.
    Raises: ValueError where it is gone or another than before, where its tokens are not the run's, and where
    `objective` compares what the two do not have.
    """
    spec = objective.frozen_needs.models[role]
    key, which = spec.key, f"of this run's {role}"
    origin = resolve_weights(reference, runs, say, key=key)
    if spec.source is None:
        abstract = core.own if core.adaptation is None else core.adaptation.full_params
        return _checked(origin, abstract, which, sha256, key=key)
    if fingerprint(origin.tokenizer()) != fingerprint(tokenizer):
        raise ValueError(
            f"{key}={reference}: its tokenizer is not this run's, so that its probabilities are those of other tokens; "
            f"begin with its weights or take its tokenizer: init_from={reference}"
        )
    model = replace(origin.model, vocab_size=origin.model.vocab_size or tokenizer.vocab_size)
    objective.check_frozen_model(role, core.model, model)
    shapes, axes = abstract_params(model), param_axes(model)
    shardings = param_shardings(axes, shapes, core.mesh, core.rules)
    abstract = with_shardings(shapes, shardings)
    params, record = _checked(origin, abstract, which, sha256, key=key)
    record |= {"model": model_digest(model)}
    return FrozenModel(params, make_apply(without_kernel(model), core.constrain), tokenizer.vocab_size), record


def model_digest(model: ModelConfig) -> str:
    """Of how a model uses its weights."""
    told = {key: value for key, value in to_plain(model).items() if key not in (*COMPUTE_KEYS, "base_width")}
    told["attention"] = {key: v for key, v in told["attention"].items() if f"attention.{key}" not in COMPUTE_KEYS}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def prune_source(origin: WeightsSource, config: RunConfig) -> WeightsSource:
    """The origin with only the layers `prune.layers`, in this order, and of the width `prune.width`.

    Raises: ValueError for layers or a width that it cannot have.
    """
    origin = _with_layers(origin, config.prune.layers)
    return _with_width(origin, config.prune.width) if config.prune.width.active else origin


def _with_width(origin: WeightsSource, width: WidthConfig) -> WeightsSource:
    wide = origin.model
    thin = pruned_config(wide, width)

    def params(abstract: Params, *progress: Any) -> Params:
        onto = jax.tree.leaves(abstract)[0].sharding.mesh
        sized = abstract_params(replace(wide, vocab_size=abstract["embedding"].shape[0]))
        # Cut as the thin ones are, where they can be.
        lie = lambda shape, leaf: _divisible(shape.shape, leaf.sharding, replicated(onto))
        whole = origin.params(with_shardings(sized, jax.tree.map(lie, sized, abstract)), *progress)
        choice = select_units(wide, thin, whole, on_host)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(lambda params: prune_params(wide, choice, params), out_shardings=shardings)(whole)

    sizes = ", ".join(f"{name} {now} of {widths(wide)[name]}" for name, now in widths(thin).items())
    return replace(origin, name=f"{origin.name}, thinned to {sizes}", model=thin, params=params, checkpoint=None)


def _divisible(shape: tuple[int, ...], sharding: Any, otherwise: Any) -> Any:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return otherwise
    return sharding


def _with_layers(origin: WeightsSource, layers: list[int]) -> WeightsSource:
    """The origin with only these of its layers, in this order; all where none are named.

    Raises: ValueError for layers that it has not.
    """
    if not layers:
        return origin
    model, n = origin.model, origin.model.num_layers
    wrong = [i for i in layers if not 0 <= i < n]
    if wrong:
        raise ValueError(f"prune.layers={layers}: {origin.name} has the layers 0 to {n - 1}, and no {wrong[0]}")
    if len(stacks(model)) > 1:
        raise ValueError(f"prune.layers={layers}: {origin.name} has layers of two kinds, which cannot be thinned out")
    cut = lambda pattern: [pattern[i % len(pattern)] for i in layers]
    thin = replace(
        model,
        num_layers=len(layers),
        attention=replace(model.attention, layer_types=cut(model.attention.layer_types)),
        rope=replace(model.rope, layer_pattern=cut(model.rope.layer_pattern)),
    )

    def params(abstract: Params, *progress: Any) -> Params:
        deep = lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
        whole = origin.params({**abstract, "layers": jax.tree.map(deep, abstract["layers"])}, *progress)
        take = lambda tree: {**tree, "layers": jax.tree.map(lambda x: x[np.array(layers)], tree["layers"])}
        return jax.jit(take, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(whole)

    name = f"{origin.name}, {len(layers)} of its {n} layers"
    return replace(origin, name=name, model=thin, params=params, checkpoint=None)


def with_head(origin: WeightsSource, outputs: int) -> WeightsSource:
    """The origin with so many outputs, all zero, in the place of its head; itself where it has as many.

    Raises: ValueError where logits are wanted of weights that have no head for them.
    """
    if origin.model.outputs == outputs:
        return origin
    if not outputs and not origin.model.tied_embeddings:
        raise ValueError(
            f"init_from={origin.reference}: {origin.name} gives {origin.model.outputs} scores and has no head for "
            "tokens; begin with a run that writes"
        )

    def params(abstract: Params, *progress: Any) -> Params:
        table = abstract["embedding"]
        mesh, spec = table.sharding.mesh, (*table.sharding.spec, None, None)[:2]
        lies = lambda *shape: jax.ShapeDtypeStruct(shape, table.dtype, sharding=NamedSharding(mesh, P(*spec[::-1])))
        theirs = {key: leaf for key, leaf in abstract.items() if key != "score"}
        if origin.model.outputs:
            theirs["score"] = lies(table.shape[1], origin.model.outputs)
        elif not origin.model.tied_embeddings:
            theirs["head"] = lies(*table.shape[::-1])
        found = origin.params(theirs, *progress)
        kept = {key: leaf for key, leaf in found.items() if key not in ("score", "head")}
        return kept | ({"score": _zeros(abstract["score"])} if outputs else {})

    return replace(origin, model=replace(origin.model, outputs=outputs), params=params, checkpoint=None)


def outputs_of(params: Params) -> int:
    """Of a tree of parameters or shapes: how many scores it gives; 0: logits."""
    return params["score"].shape[1] if "score" in params else 0


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()


def _checked(
    origin: WeightsSource, abstract: Params, which: str, sha256: str | None, *, key: str = "init_from"
) -> tuple[Params, dict[str, str]]:
    params = origin.params(abstract)
    found = state_hash(params)
    if sha256 not in (None, found):
        raise ValueError(
            f"{key}={origin.reference}: these weights are no longer those {which}: their SHA-256 is {found[:12]} "
            f"and was {str(sha256)[:12]}; put the original back"
        )
    return params, {"origin": origin.reference, "sha256": found}


def recorded_base(adaptation: AdapterLayout, checkpointer: Checkpointer, step: int, runs: str, say: Say) -> AdapterBase:
    """The base that the adapters of a checkpoint name, checked."""
    record = checkpointer.read_json(step, "config")["base"]
    return load_base(adaptation, record["origin"], runs, say, sha256=record["sha256"])


def merged_params(
    checkpointer: Checkpointer, step: int, saved: RunConfig, abstract: Params, runs: str, say: Say
) -> Params:
    """The parameters of a model whose adapters a checkpoint holds."""
    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    shard = partial(param_shardings, mesh=mesh, rules=saved.sharding)
    adaptation = AdapterLayout(saved.adapter, param_axes(saved.model), abstract, shard)
    adapters = checkpointer.restore_params(step, adaptation.abstract)
    return adaptation.merge(recorded_base(adaptation, checkpointer, step, runs, say).params, adapters)


def published_kind(reference: str) -> tuple[str | None, Path]:
    """`hf:FOLDER` to its kind and its path; None for the name of a run."""
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
                f"hf:{path}: there is no tokenizer.json and no tokenizer.model; put one there, or begin a run with "
                f"another: train init_from=hf:{path} tokenizer=NAME"
            )
        return configured(config.build(lambda: iter(())), config)

    beside = {name: (path / name).read_bytes() for name in ("config.json", *BESIDE) if (path / name).is_file()}
    load = lambda abstract, *progress: load_params(folder, model, abstract, *progress)
    return WeightsSource(folder.label, model, config, tokenizer, load, folder.label, folder, extra_files=beside)


def _file(path: Path) -> WeightsSource:
    file = File(path)

    def tokenizer() -> Tokenizer:
        try:
            return configured(read_tokenizer(file.header.metadata).with_policy(chat_template=template), config)
        except ValueError as error:
            raise ValueError(f"{file.label}: {error}") from None

    template = file.header.metadata.get("tokenizer.chat_template")
    beside = {} if template is None else {TEMPLATE: template.encode()}
    load = lambda abstract, *progress: load_params(file, file.model, abstract, *progress)
    config = TokenizerJsonConfig(path=str(path))
    return WeightsSource(file.label, file.model, config, tokenizer, load, file.label, file, extra_files=beside)


def _adapters(path: Path) -> WeightsSource:
    folder = AdapterFolder(path)
    below = _folder(folder.base)
    family = family_of(Folder(folder.base).config)
    adapter = folder.config(below.model, family)
    adapters = lambda adaptation: folder.load(below.model, adapter, family, adaptation.abstract)

    def merged(abstract: Params) -> Params:
        # Read whole on each device: adapters are small, and the merge is what is cut.
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        whole = lambda axes, shapes, strict=True: jax.tree.map(lambda _: replicated(mesh), shapes)
        adaptation = AdapterLayout(adapter, param_axes(below.model), abstract, whole)
        return adaptation.merge(below.params(adaptation.full_params), adapters(adaptation))

    told = (below.model, below.tokenizer_config, below.tokenizer, merged, folder.label)
    return WeightsSource(
        folder.label, *told, base=below, adapter=adapter, adapters=adapters, extra_files=below.extra_files
    )


PUBLISHED: dict[str, Callable[[Path], WeightsSource]] = {"hf": _folder, "gguf": _file, "peft": _adapters}


def inherit_model_config(config: RunConfig, overrides: list[str], folder: RunFolder, say: Say) -> RunConfig:
    """With `init_from`: the model and the tokenizer of the origin, where the command line chooses no others.

    Single keys such as `model.remat=full` change the model that was adopted. A run that goes on keeps what it began
    with, so that its origin may be gone by then.
    """
    if config.init_from is None:
        return config
    overrides = with_experiment(overrides)
    named = named_keys(overrides)
    if folder.config.exists():
        before = folder.saved_config()
        model, tokenizer, adapter = before.model, before.tokenizer, before.adapter
    else:
        origin = prune_source(resolve_weights(config.init_from, config.output_dir, say), config)
        model, tokenizer, adapter = origin.model, origin.tokenizer_config, origin.adapter
    if published_kind(config.init_from)[0] == "peft":
        if chosen := [key for key in named if key.partition(".")[0] == "adapter"]:
            raise ValueError(f"{chosen[0]}: the adapters of {config.init_from} say it themselves; leave it out")
        config = replace(config, adapter=adapter or config.adapter)
    if "model" not in named:
        # Its head is the objective's, not the origin's.
        model = replace(model, outputs=config.model.outputs)
        config = replace(config, model=with_changes(model, config, overrides))
    if not _chooses_tokenizer(named):
        config = replace(config, tokenizer=replace(tokenizer, **_policy_keys(config, named)))
    validate(config)
    return config


def with_experiment(overrides: list[str]) -> list[str]:
    """The command with what its phase and experiment choose: groups, and single keys of model and tokenizer, before
    its own.
    """
    given = {o.partition("=")[0]: o.partition("=")[2] for o in overrides}
    found: list[str] = []
    for group in ("phase", "experiment"):
        file = files("configs") / group / f"{given.get(group)}.yaml"
        content = yaml.safe_load(file.read_text()) if file.is_file() else {}
        found += [f"{k.split('/')[-1]}={v}" for d in content.get("defaults", ()) for k, v in d.items()]
        found += _keys(content)
    return [*found, *overrides]


def _keys(content: dict[str, Any], path: str = "") -> list[str]:
    """`a.b=value` of every leaf below `model` and `tokenizer`."""
    found: list[str] = []
    for key, value in content.items():
        if not path and key not in ("model", "tokenizer"):
            continue
        found += _keys(value, f"{path}{key}.") if isinstance(value, dict) else [f"{path}{key}={value}"]
    return found


def with_changes(model: ModelConfig, config: RunConfig, overrides: list[str]) -> ModelConfig:
    """`model` with the single keys, such as `model.remat`, that the command line names."""
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


POLICY_KEYS = ("tokenizer.chat_template", "tokenizer.add_bos")  # these change a tokenizer that was adopted


def _chooses_tokenizer(named: set[str]) -> bool:
    return any(key.partition(".")[0] == "tokenizer" for key in named - set(POLICY_KEYS))


def _policy_keys(config: RunConfig, named: set[str]) -> dict[str, Any]:
    fields = [key.partition(".")[2] for key in POLICY_KEYS if key in named]
    return {name: getattr(config.tokenizer, name) for name in fields}


def inherit_tokenizer(config: RunConfig, overrides: list[str], folder: RunFolder, say: Say) -> None:
    """Puts the origin's own tokenizer in the run folder: one trained anew would give its weights other tokens.

    `tokenizer.chat_template` and `tokenizer.add_bos` of the command change it on the way.
    """
    named = named_keys(with_experiment(overrides))
    if config.init_from is None or _chooses_tokenizer(named) or folder.has_checkpoints():
        return
    if is_main_process():
        (folder.tokenizer / MADE_OF).unlink(missing_ok=True)
        adopted = resolve_weights(config.init_from, config.output_dir, say).tokenizer()
        save_tokenizer(configured(adopted, TokenizerConfig(**_policy_keys(config, named))), folder.tokenizer)
    publish_files(folder, "adopted tokenizer")
