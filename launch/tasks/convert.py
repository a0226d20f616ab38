"""`meshwright convert from=hf:FOLDER to=RUN`, `from=RUN to=gguf:FILE` and so on: exact both ways, and checked."""

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
from launch.build import build_core, is_main_process, log, sync_processes
from launch.load_run import SavedRun, open_run
from launch.run_folder import environment, run_folder
from launch.weights_source import WeightsSource, published_kind, resolve_weights, with_changes
from models.config import ModelConfig
from models.flops import num_params
from models.formats.gguf import files as gguf_files
from models.formats.gguf.metadata import architecture_for
from models.formats.huggingface import peft as peft_files
from models.formats.huggingface.checkpoint_files import (
    BESIDE,
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
from trainer.optimizers.optimizer import SgdConfig

CARRIED = "published"  # the folder in a run folder with what came beside the weights


def run(config: RunConfig, overrides: list[str]) -> int:
    """Raises: ValueError where the two ends are not one published checkpoint and one run."""
    task = config.task
    assert isinstance(task, ConvertConfig)
    origin, target = task.input or "", task.output or ""
    (from_kind, _), (to_kind, path) = published_kind(origin), published_kind(target)
    if not origin or not target or (from_kind is None) == (to_kind is None):
        raise ValueError(
            "convert: give from=hf:FOLDER to=RUN or from=RUN to=hf:FOLDER; gguf:FILE and peft:FOLDER go for hf:FOLDER"
        )
    if to_kind is None:
        return to_run(dataclasses.replace(config, run=target), overrides, origin)
    name, _, step = origin.partition("@")
    if step.isdigit():
        task = dataclasses.replace(task, step=int(step))
    config = dataclasses.replace(config, run=name, task=task)
    return to_published(config, task, overrides, to_kind, path)


def to_run(config: RunConfig, overrides: list[str], reference: str) -> int:
    """A run at step 0, to be evaluated, written with, or begun from (`init_from=RUN`)."""
    folder = run_folder(config)
    if folder.config.exists():
        raise ValueError(f"to={folder.name}: this run exists already; give another name")
    origin = resolve_weights(reference, config.output_dir, log, key="from")
    if config.adapter.active:
        raise ValueError(f"adapter.method={config.adapter.method.name}: a conversion trains nothing; leave it out")
    # Plain descent keeps no state: the checkpoint is the weights and nothing else.
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
    if origin.model.outputs:
        config = judging(config, origin)
    core = build_core(config, tokenizer)
    with progress_bar(f"reading {reference}") as progress:
        state = core.init_state(params=origin.params(core.own, progress))
    differs = None  # of merged adapters: nothing there holds the sums
    if origin.checkpoint is not None:
        differs = first_difference(origin.checkpoint, origin.model, state.params)
    if differs is not None:
        raise RuntimeError(f"{reference}: {differs} is not what was read from it; nothing was written")
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
    how = "adapters merged into their base" if origin.checkpoint is None else "every tensor equal bit for bit"
    log(f"run {folder.name!r}: {parameters:,} parameters of {reference}, {how}")
    log(f"next:\n  meshwright generate run={folder.name} prompt='The '")
    log(f"  meshwright train run=mine init_from={folder.name} source=[text] data.sources.text.paths=[YOUR_FOLDER]")
    return 0


def judging(config: RunConfig, origin: WeightsSource) -> RunConfig:
    """The run of a published reward model, which has one output, or of one that tells classes."""
    if origin.model.outputs == 1:
        data = dataclasses.replace(config.data, format=DataFormat.preference)
        return dataclasses.replace(config, objective=RewardConfig(), data=data)
    named = json.loads(origin.extra_files["config.json"]).get("id2label") or {}
    classes = [named.get(str(i), f"LABEL_{i}") for i in range(origin.model.outputs)]
    data = dataclasses.replace(config.data, format=DataFormat.classification, classes=classes, packing=Packing.best_fit)
    return dataclasses.replace(config, objective=ClassificationConfig(), data=data)


def to_published(config: RunConfig, task: ConvertConfig, overrides: list[str], kind: str, path: Path) -> int:
    """A checkpoint that other tools load. It has its name only when it is whole and checked."""
    if path.is_file() or (path.exists() and any(path.iterdir())):
        raise ValueError(f"to={kind}:{path}: is there already and not empty; give another name")
    if task.dtype is not None and task.dtype not in SAVED_DTYPES[kind]:
        raise ValueError(f"task.dtype={task.dtype}: must be one of {', '.join(SAVED_DTYPES[kind])} in {kind}:")
    saved = without_further(open_run(config, overrides))
    half = path.with_name(path.name + ".tmp")
    if is_main_process() and half.exists():
        shutil.rmtree(half) if half.is_dir() else half.unlink()
    carried = saved.folder.path / CARRIED
    before = json.loads((carried / "config.json").read_text()) if (carried / "config.json").exists() else {}
    usual = "float32" if kind == "peft" else None
    dtype = task.dtype or usual or before.get("dtype") or before.get("torch_dtype") or saved.core.model.dtype.name
    params = saved.trained_params() if kind == "peft" else _without(saved.params())
    try:
        written = WRITERS[kind](half, saved, params, before, dtype, task)
    except ValueError as error:
        raise ValueError(f"from={saved.folder.name}: {error}") from None
    sync_processes("written")
    same = "" if written.checkpoint is None else compare_logits(half, saved, params, written.checkpoint, written.model)
    sync_processes("compared")
    if not is_main_process():
        return 0
    if path.exists():
        path.rmdir()
    half.rename(path)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    log(f"{kind}:{path}: {written.name}, {parameters:,} parameters in {dtype}, read back and equal{same}")
    return 0


def without_further(saved: SavedRun) -> SavedRun:
    """The run as others know its model: without modules for further tokens."""
    core = saved.core
    if not core.model.mtp_num_layers:
        return saved
    log(f"run {saved.folder.name!r}: its {core.model.mtp_num_layers} modules for further tokens are left out")
    abstract = dataclasses.replace(core.abstract, params=_without(core.abstract.params))
    model = dataclasses.replace(core.model, mtp_num_layers=0)
    return dataclasses.replace(saved, core=dataclasses.replace(core, model=model, abstract=abstract))


def _without(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != MTP}


class Written(NamedTuple):
    """What a writer made, as its own reader sees it."""

    name: str  # of its class or architecture, as others know it
    checkpoint: Checkpoint | None  # None: of adapters, which have no logits of their own
    model: ModelConfig


PROBE_TOKENS = 64
ROUNDING = 1e-4  # of logits, where no weight was rounded


def compare_logits(half: Path, saved: SavedRun, params: Params, written: Checkpoint, model: ModelConfig) -> str:
    """Runs the model on the weights that were written and on the run's, and says how far the logits are apart.

    Raises: RuntimeError where they differ though every weight has kept its bits, or are not finite.
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
        apart, alike = jnp.abs(ours - theirs), ours.argmax(-1) == theirs.argmax(-1)
        return apart.max(), apart.mean(), ours.std(), alike.mean(), jnp.all(jnp.stack(same))

    most, mean, spread, alike, same = (float(x) for x in compare(params, read_back))
    if not np.isfinite(most) or (same and most > ROUNDING * max(spread, 1)):
        raise RuntimeError(
            f"{half}: its logits differ from the run's by {most:.3g}, though its weights are "
            f"{'the same' if same else 'near'}; it stays there to be looked at"
        )
    if most == 0:
        return "; logits equal"
    return (
        f"; logits differ by {mean:.2g} on average (their deviation: {spread:.2g}), "
        f"the likeliest token is the same at {alike:.0%} of places"
    )


def write_folder(
    half: Path, saved: SavedRun, params: Params, before: dict[str, Any], dtype: str, task: ConvertConfig
) -> Written:
    """A folder that transformers, vLLM and others load."""
    model, carried = saved.core.model, saved.folder.path / CARRIED
    family = family_for(model)
    if before and architecture_name(read_model(before)) == architecture_name(model):
        family = family_of(before)
    shard_bytes = int(task.max_shard_size_gb * 1e9)
    with progress_bar("writing") as progress:
        save_params(half, model, params, family, dtype=dtype, shard_bytes=shard_bytes, progress=progress)
    sync_processes("weights")
    written = Folder(half)
    read_back = read_model(written.config)
    differs = first_difference(written, read_back, params)  # of every process, since each has its share of them
    if differs is not None or architecture_name(read_back) != architecture_name(model):
        raise RuntimeError(
            f"{half}: {differs or 'config.json'} is not what was written; it stays there to be looked at"
        )
    if is_main_process():
        for name in BESIDE:
            if (carried / name).exists():
                shutil.copyfile(carried / name, half / name)
        log(write_tokenizer(half, saved.tokenizer, before))
        if saved.config.data.classes:
            name_classes(half / "config.json", saved.config.data.classes)
    return Written(written.config["architectures"][0], written, read_back)


def name_classes(path: Path, classes: list[str]) -> None:
    """In a config.json."""
    named = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named, indent=2, ensure_ascii=False) + "\n")


def write_file(
    half: Path, saved: SavedRun, params: Params, before: dict[str, Any], dtype: str, task: ConvertConfig
) -> Written:
    """A file that llama.cpp and what is built on it load."""
    model, tokenizer = saved.core.model, saved.tokenizer
    row = architecture_for(model)
    metadata = {"general.type": "model", "general.name": saved.folder.name}
    metadata |= tokenizer_header(tokenizer, model.vocab_size)
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    with progress_bar("writing") as progress:
        gguf_files.save_params(half, model, params, row, metadata, dtype=dtype, progress=progress)
    written = gguf_files.File(half) if is_main_process() else None
    differs = gguf_files.first_wrong(written, model, params, row, dtype=dtype)
    if differs is not None:
        raise RuntimeError(f"{half}: {differs} is not what was written; it stays there to be looked at")
    sync_processes("weights")
    there = gguf_files.File(half)
    return Written(row.name, there, there.model)


def write_adapters(
    half: Path, saved: SavedRun, adapters: Params, before: dict[str, Any], dtype: str, task: ConvertConfig
) -> Written:
    """A folder that PEFT loads onto the base."""
    adapter, model = saved.config.adapter, saved.core.model
    if not adapter.active:
        raise ValueError("has no adapters; export the model with to=hf:FOLDER")
    origin = saved.checkpointer.read_json(saved.step, "config")["base"]["origin"]
    family = family_for(model)
    if origin.startswith("hf:"):
        family = family_of(Folder(Path(origin.removeprefix("hf:"))).config)
    else:
        log(f"the base is the run {origin}: convert from={origin} to=hf:FOLDER writes it, for PEFT to load these upon")
    peft_files.save_adapters(half, model, adapter, adapters, family, base=origin.removeprefix("hf:"), dtype=dtype)
    differs = peft_files.first_difference(half, model, adapter, adapters, family) if is_main_process() else None
    if differs is not None:
        raise RuntimeError(f"{half}: {differs} is not what was written; it stays there to be looked at")
    return Written(f"adapters of {family.architecture}, rank {adapter.rank}", None, model)


Writer = Callable[[Path, SavedRun, Params, dict[str, Any], str, ConvertConfig], Written]
WRITERS: dict[str, Writer] = {"hf": write_folder, "gguf": write_file, "peft": write_adapters}
SAVED_DTYPES = {"hf": ("float32", "float16", "bfloat16"), "gguf": tuple(gguf_files.DTYPES)}
SAVED_DTYPES["peft"] = SAVED_DTYPES["hf"]
