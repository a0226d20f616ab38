"""Loads existing weights: of a run, a published checkpoint (`hf:FOLDER`, `gguf:FILE`) or adapters (`peft:FOLDER`)."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.schema import RunConfig, to_plain
from data.object_store import is_url
from data.records.chat_encoding import configured
from data.tokenizers.gguf_tokenizer import read_tokenizer
from data.tokenizers.kinds import SentencePieceConfig, TokenizerConfig, TokenizerJsonConfig, from_files
from data.tokenizers.tokenizer import TEMPLATE, Tokenizer, fingerprint
from launch.build import Core
from launch.run_folder import RunFolder, folder_in
from models.adapters.lora import AdapterConfig
from models.attention.kernels import without_kernel
from models.config import COMPUTE_KEYS, ModelConfig
from models.formats.gguf.files import File
from models.formats.huggingface.checkpoint_files import TOKENIZER_FILES, Checkpoint, Folder, load_params
from models.formats.huggingface.families import family_of, read_model
from models.formats.huggingface.peft import Folder as AdapterFolder
from models.transformer import abstract_params, make_apply, param_axes
from trainer.adapters import AdapterLayout
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.checksums import state_hash
from trainer.objective import FrozenModel, ObjectiveConfig, Params
from trainer.sharding import param_shardings, replicated, with_shardings

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
