"""`meshwright convert from=hf:FOLDER to=RUN`, `from=RUN to=gguf:FILE` and so on: lossless and verified."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import RunConfig, to_plain
from configs.tasks import ConvertConfig, TrainConfig
from data.batch import DTYPES, TokenBatch
from data.packing import Packing
from data.records.chat_encoding import configured
from data.records.encoding import DataFormat
from data.tokenizers.gguf_tokenizer import write_tokenizer as tokenizer_header
from data.tokenizers.huggingface_export import write_tokenizer
from data.tokenizers.kinds import TokenizerConfig, save_tokenizer
from data.tokenizers.tokenizer import PROBES
from launch.build import build_core
from launch.inherit_config import with_changes
from launch.load_run import SavedRun, open_run
from launch.multihost import is_main_process, log, sync_processes
from launch.run_folder import environment, run_folder
from launch.weights_source import WeightsSource, published_kind, resolve_weights
from models.config import ModelConfig
from models.flops import num_params
from models.formats.gguf import files as gguf_files
from models.formats.gguf.metadata import architecture_for
from models.formats.huggingface import peft as peft_files
from models.formats.huggingface.checkpoint_files import (
    TOKENIZER_FILES,
    Checkpoint,
    Folder,
    first_difference,
    load_params,
    save_params,
)
from models.formats.huggingface.families import architecture_name, family_for, family_of, read_model
from models.mtp import MTP
from models.transformer import logits, make_apply
from trainer.console import progress_bar
from trainer.objective import Params
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.reward import RewardConfig
from trainer.optimizers.sgd import SgdConfig

CARRIED = "published"  # subfolder of a run folder with the non-weight files of the source checkpoint


def run(config: RunConfig, overrides: list[str]) -> int:
    """Converts in either direction. Raises: ValueError unless exactly one end is a published checkpoint."""
    task = config.task
    assert isinstance(task, ConvertConfig)
    origin, target = task.input or "", task.output or ""
    (from_kind, _), (to_kind, path) = published_kind(origin), published_kind(target)
    if not origin or not target or (from_kind is None) == (to_kind is None):
        raise ValueError(
            "convert: give from=hf:FOLDER to=RUN or from=RUN to=hf:FOLDER; gguf:FILE and "
            "peft:FOLDER can replace hf:FOLDER"
        )
    if to_kind is None:
        return to_run(dataclasses.replace(config, run=target), overrides, origin)
    name, _, step = origin.partition("@")
    if step.isdigit():
        task = dataclasses.replace(task, step=int(step))
    config = dataclasses.replace(config, run=name, task=task)
    return to_published(config, task, overrides, to_kind, path)


def to_run(config: RunConfig, overrides: list[str], reference: str) -> int:
    """Writes a run at step 0, for evaluation, generation, or training with `init_from=RUN`."""
    folder = run_folder(config)
    if folder.config.exists():
        raise ValueError(f"to={folder.name}: this run already exists; choose another name")
    origin = resolve_weights(reference, config.output_dir, log, key="from")
    if config.adapter.active:
        raise ValueError(f"adapter.method={config.adapter.method.name}: conversion does not train; remove the key")
    # SGD without momentum has no state: the checkpoint contains only the weights.
    policy = {"chat_template": config.tokenizer.chat_template, "add_bos": config.tokenizer.add_bos}
    tokenizer = configured(origin.tokenizer(), TokenizerConfig(**policy))
    config = dataclasses.replace(
        config,
        model=with_changes(origin.model, config, overrides),
        tokenizer=dataclasses.replace(origin.tokenizer_config, **policy),
        optimizer=SgdConfig(momentum=0.0),
        data=dataclasses.replace(config.data, sources={}),
        task=TrainConfig(),
    )
    if origin.model.num_labels:
        config = _scoring_config(config, origin)
    core = build_core(config, tokenizer)
    with progress_bar(f"reading {reference}") as progress:
        state = core.init_state(params=origin.params(core.own, progress))
    differs = None  # merged adapters: the source does not store the merged weights
    if origin.checkpoint is not None:
        differs = first_difference(origin.checkpoint, origin.model, state.params)
    if differs is not None:
        raise RuntimeError(f"{reference}: {differs} differs from the loaded value; nothing was written")
    if is_main_process():
        folder.write_start(config, [])
        save_tokenizer(tokenizer, folder.tokenizer)
        (folder.path / CARRIED).mkdir(exist_ok=True)
        for name, content in origin.extra_files.items():
            (folder.path / CARRIED / name).write_bytes(content)
    with folder.checkpointer(config.checkpoint, say=log) as checkpointer:
        saved = {"run": to_plain(config), "environment": environment(), "mesh": dict(core.mesh.shape)}
        checkpointer.save(0, state, source={}, config=saved, tokenizer=tokenizer.files())
        checkpointer.wait()
    parameters = num_params(core.model)["total"]
    how = "adapters merged into the base model" if origin.checkpoint is None else "all tensors bit-identical"
    log(f"run {folder.name!r}: {parameters:,} parameters from {reference}, {how}")
    log(f"next:\n  meshwright generate run={folder.name} prompt='The '")
    log(f"  meshwright train run=mine init_from={folder.name} source=[text] data.sources.text.paths=[YOUR_FOLDER]")
    return 0


def _scoring_config(config: RunConfig, origin: WeightsSource) -> RunConfig:
    """Returns the config of a published reward model (one output) or sequence classifier."""
    if origin.model.num_labels == 1:
        data = dataclasses.replace(config.data, format=DataFormat.preference)
        return dataclasses.replace(config, objective=RewardConfig(), data=data)
    named = json.loads(origin.extra_files["config.json"]).get("id2label") or {}
    classes = [named.get(str(i), f"LABEL_{i}") for i in range(origin.model.num_labels)]
    data = dataclasses.replace(config.data, format=DataFormat.classification, classes=classes, packing=Packing.best_fit)
    return dataclasses.replace(config, objective=ClassificationConfig(), data=data)


def to_published(config: RunConfig, task: ConvertConfig, overrides: list[str], kind: str, path: Path) -> int:
    """Writes a checkpoint for other tools. It gets its final name only after it is complete and verified."""
    if path.is_file() or (path.exists() and any(path.iterdir())):
        raise ValueError(f"to={kind}:{path}: already exists and is not empty; choose another name")
    if task.dtype is not None and task.dtype not in SAVED_DTYPES[kind]:
        raise ValueError(f"task.dtype={task.dtype}: must be one of {', '.join(SAVED_DTYPES[kind])} for {kind}:")
    saved = without_mtp(open_run(config, overrides))
    partial_path = path.with_name(path.name + ".tmp")
    if is_main_process() and partial_path.exists():
        shutil.rmtree(partial_path) if partial_path.is_dir() else partial_path.unlink()
    carried = saved.folder.path / CARRIED
    before = json.loads((carried / "config.json").read_text()) if (carried / "config.json").exists() else {}
    default = "float32" if kind == "peft" else None
    dtype = task.dtype or default or before.get("dtype") or before.get("torch_dtype") or saved.core.model.dtype.name
    params = saved.trained_params() if kind == "peft" else _drop_mtp(saved.params())
    try:
        written = WRITERS[kind](partial_path, saved, params, before, dtype, task)
    except ValueError as error:
        raise ValueError(f"from={saved.folder.name}: {error}") from None
    sync_processes("written")
    same = (
        ""
        if written.checkpoint is None
        else compare_logits(partial_path, saved, params, written.checkpoint, written.model)
    )
    sync_processes("compared")
    if not is_main_process():
        return 0
    if path.exists():
        path.rmdir()
    partial_path.rename(path)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    log(f"{kind}:{path}: {written.name}, {parameters:,} parameters in {dtype}, read back and equal{same}")
    return 0


def without_mtp(saved: SavedRun) -> SavedRun:
    """Returns the run without multi-token prediction modules, which other tools do not support."""
    core = saved.core
    if not core.model.mtp_num_layers:
        return saved
    log(f"run {saved.folder.name!r}: its {core.model.mtp_num_layers} multi-token prediction modules are not exported")
    abstract = dataclasses.replace(core.abstract, params=_drop_mtp(core.abstract.params))
    model = dataclasses.replace(core.model, mtp_num_layers=0)
    return dataclasses.replace(saved, core=dataclasses.replace(core, model=model, abstract=abstract))


def _drop_mtp(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != MTP}


class Written(NamedTuple):
    """An exported checkpoint, as read back by its reader."""

    name: str  # the model class or architecture name in the format
    checkpoint: Checkpoint | None  # None for adapters, which have no logits without the base
    model: ModelConfig


PROBE_TOKENS = 64
ROUNDING = 1e-4  # tolerance of logits if all weights are bit-identical


def compare_logits(partial_path: Path, saved: SavedRun, params: Params, written: Checkpoint, model: ModelConfig) -> str:
    """Runs the model on the exported and the original weights, and describes the difference of the logits.

    Raises: RuntimeError if the logits are not finite, or differ although all weights are bit-identical.
    """
    core = saved.core
    with progress_bar("reading back") as progress:
        read_back = load_params(written, model, core.own, progress)
    ids = [token for text in PROBES for token in saved.tokenizer.encode(text)]
    shape = core.batch_size, PROBE_TOKENS
    tokens = np.resize(np.array(ids or [0], np.int32), shape)
    ones, positions = np.ones(shape), np.broadcast_to(np.arange(PROBE_TOKENS), shape)
    rows = (tokens, tokens, ones, ones, positions)
    batch = core.place(TokenBatch(*(x[core.rows].astype(dtype) for x, dtype in zip(rows, DTYPES, strict=True))))

    def forward(model: ModelConfig, params: Params) -> jax.Array:
        apply = make_apply(model, core.constrain)
        return logits(apply(params, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids))

    @jax.jit
    def compare(params: Params, read_back: Params):
        ours = forward(core.model, params)
        theirs = forward(dataclasses.replace(model, dtype=core.model.dtype), read_back)
        same = [jnp.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, read_back)), strict=True)]
        difference, agreement = jnp.abs(ours - theirs), ours.argmax(-1) == theirs.argmax(-1)
        return difference.max(), difference.mean(), ours.std(), agreement.mean(), jnp.all(jnp.stack(same))

    largest, mean, spread, agreement, same = (float(x) for x in compare(params, read_back))
    if not np.isfinite(largest) or (same and largest > ROUNDING * max(spread, 1)):
        raise RuntimeError(
            f"{partial_path}: its logits differ from the run's by {largest:.3g}, although its weights are "
            f"{'identical' if same else 'close'}; the file is left there for inspection"
        )
    if largest == 0:
        return "; logits equal"
    return (
        f"; logits differ by {mean:.2g} on average (standard deviation of the logits: {spread:.2g}), "
        f"the most likely token is equal at {agreement:.0%} of positions"
    )


def write_folder(
    partial_path: Path, saved: SavedRun, params: Params, before: dict[str, Any], dtype: str, task: ConvertConfig
) -> Written:
    """Writes a Hugging Face folder, for transformers, vLLM and others."""
    model, carried = saved.core.model, saved.folder.path / CARRIED
    family = family_for(model)
    if before and architecture_name(read_model(before)) == architecture_name(model):
        family = family_of(before)
    shard_bytes = int(task.max_shard_size_gb * 1e9)
    with progress_bar("writing") as progress:
        save_params(partial_path, model, params, family, dtype=dtype, shard_bytes=shard_bytes, progress=progress)
    sync_processes("weights")
    written = Folder(partial_path)
    read_back = read_model(written.config)
    differs = first_difference(written, read_back, params)  # on every process: each holds a part of the parameters
    if differs is not None or architecture_name(read_back) != architecture_name(model):
        raise RuntimeError(
            f"{partial_path}: {differs or 'config.json'} differs from the written value; "
            "the output is left there for inspection"
        )
    if is_main_process():
        for name in TOKENIZER_FILES:
            if (carried / name).exists():
                shutil.copyfile(carried / name, partial_path / name)
        log(write_tokenizer(partial_path, saved.tokenizer, before))
        if saved.config.data.classes:
            name_classes(partial_path / "config.json", saved.config.data.classes)
    return Written(written.config["architectures"][0], written, read_back)


def name_classes(path: Path, classes: list[str]) -> None:
    """Adds the class names to a config.json."""
    named = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named, indent=2, ensure_ascii=False) + "\n")


def write_file(
    partial_path: Path, saved: SavedRun, params: Params, before: dict[str, Any], dtype: str, task: ConvertConfig
) -> Written:
    """Writes a GGUF file, for llama.cpp and tools based on it."""
    model, tokenizer = saved.core.model, saved.tokenizer
    row = architecture_for(model)
    metadata = {"general.type": "model", "general.name": saved.folder.name}
    metadata |= tokenizer_header(tokenizer, model.vocab_size)
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    with progress_bar("writing") as progress:
        gguf_files.save_params(partial_path, model, params, row, metadata, dtype=dtype, progress=progress)
    written = gguf_files.File(partial_path) if is_main_process() else None
    differs = gguf_files.first_mismatch(written, model, params, row, dtype=dtype)
    if differs is not None:
        raise RuntimeError(
            f"{partial_path}: {differs} differs from the written value; the output is left there for inspection"
        )
    sync_processes("weights")
    read_back = gguf_files.File(partial_path)
    return Written(row.name, read_back, read_back.model)


def write_adapters(
    partial_path: Path, saved: SavedRun, adapters: Params, before: dict[str, Any], dtype: str, task: ConvertConfig
) -> Written:
    """Writes a PEFT adapter folder."""
    adapter, model = saved.config.adapter, saved.core.model
    if not adapter.active:
        raise ValueError("has no adapters; export the full model with to=hf:FOLDER")
    origin = saved.checkpointer.read_json(saved.step, "config")["base"]["origin"]
    family = family_for(model)
    if origin.startswith("hf:"):
        family = family_of(Folder(Path(origin.removeprefix("hf:"))).config)
    else:
        log(f"the base is the run {origin}: export it for PEFT with: convert from={origin} to=hf:FOLDER")
    peft_files.save_adapters(
        partial_path, model, adapter, adapters, family, base=origin.removeprefix("hf:"), dtype=dtype
    )
    differs = peft_files.first_difference(partial_path, model, adapter, adapters, family) if is_main_process() else None
    if differs is not None:
        raise RuntimeError(
            f"{partial_path}: {differs} differs from the written value; the output is left there for inspection"
        )
    return Written(f"adapters of {family.architecture}, rank {adapter.rank}", None, model)


Writer = Callable[[Path, SavedRun, Params, dict[str, Any], str, ConvertConfig], Written]
WRITERS: dict[str, Writer] = {"hf": write_folder, "gguf": write_file, "peft": write_adapters}
SAVED_DTYPES = {"hf": ("float32", "float16", "bfloat16"), "gguf": tuple(gguf_files.DTYPES)}
SAVED_DTYPES["peft"] = SAVED_DTYPES["hf"]
