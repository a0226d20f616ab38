"""`meshwright convert from=hf:FOLDER to=RUN`, and `from=RUN to=hf:FOLDER`: exact both ways, and checked."""

import dataclasses
import json
import shutil
from pathlib import Path

from configs.schema import ConvertConfig, RunConfig, TrainConfig, to_plain
from data.chat import configured
from data.tokenizer import TokenizerConfig, save_tokenizer
from launch.assemble import build_core, is_chief
from launch.origins import find_origin
from launch.published import write_tokenizer
from launch.run_folder import environment, run_folder
from launch.saved_run import open_run, say
from models.cost import num_params
from models.huggingface import family_for, family_of, shape_of
from models.huggingface_files import BESIDE, Folder, first_difference, save_params
from trainer.checkpoint import Checkpointer
from trainer.optimizer import SgdConfig

CARRIED = "published"  # the folder in a run folder with what came beside the weights


def run(config: RunConfig, overrides: list[str]) -> int:
    """Raises: ValueError where the two ends are not one published checkpoint and one run."""
    task = config.task
    assert isinstance(task, ConvertConfig)
    origin, target = task.origin, task.target
    if origin is None or target is None or origin.startswith("hf:") == target.startswith("hf:"):
        raise ValueError("convert: give from=hf:FOLDER to=RUN, or from=RUN to=hf:FOLDER")
    if origin.startswith("hf:"):
        return to_run(dataclasses.replace(config, run=target), origin)
    name, _, step = origin.partition("@")
    config = dataclasses.replace(config, run=name, step=int(step) if step.isdigit() else config.step)
    return to_published(config, task, overrides, Path(target.removeprefix("hf:")))


def to_run(config: RunConfig, reference: str) -> int:
    """A run at step 0, to be evaluated, written with, or begun from (`init_from=RUN`)."""
    folder = run_folder(config)
    if folder.config.exists():
        raise ValueError(f"to={folder.name}: this run exists already; give another name")
    origin = find_origin(reference, config.runs, say, key="from")
    # Plain descent keeps no state: the checkpoint is the weights and nothing else.
    policy = {"chat_template": config.tokenizer.chat_template, "add_bos": config.tokenizer.add_bos}
    tokenizer = configured(origin.tokenizer(), TokenizerConfig(**policy))
    config = dataclasses.replace(
        config,
        model=origin.model,
        tokenizer=dataclasses.replace(origin.tokenizer_config, **policy),
        optimizer=SgdConfig(momentum=0.0),
        data=dataclasses.replace(config.data, sources={}),
        task=TrainConfig(),
    )
    core = build_core(config, tokenizer)
    state = core.init_state()
    state = dataclasses.replace(state, params=origin.params(core.abstract.params))
    source = Path(reference.removeprefix("hf:"))
    differs = first_difference(Folder(source), origin.model, state.params)
    if differs is not None:
        raise RuntimeError(f"{reference}: {differs} is not what was read from it; nothing was written")
    if is_chief():
        folder.write_start(config, [])
        save_tokenizer(tokenizer, folder.tokenizer)
        (folder.path / CARRIED).mkdir(exist_ok=True)
        for name in ("config.json", *BESIDE):
            if (source / name).exists():
                shutil.copyfile(source / name, folder.path / CARRIED / name)
    with Checkpointer(folder.checkpoints, config.checkpoint, say=say) as checkpointer:
        saved = {"run": to_plain(config), "environment": environment(), "mesh": dict(core.mesh.shape)}
        checkpointer.save(0, state, source={}, config=saved, tokenizer=tokenizer.files())
    parameters = num_params(core.model)["total"]
    say(f"run {folder.name!r}: {parameters:,} parameters of {reference}, every tensor equal bit for bit")
    say(f"next:\n  meshwright generate run={folder.name} prompt='The '")
    say(f"  meshwright train run=mine init_from={folder.name} source=[text] data.sources.text.paths=[YOUR_FOLDER]")
    return 0


def to_published(config: RunConfig, task: ConvertConfig, overrides: list[str], path: Path) -> int:
    """A folder that transformers, vLLM and others load. It has its name only when it is whole and checked."""
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"to=hf:{path}: is there already and not empty; give another folder")
    saved = open_run(config, overrides)
    model, folder = saved.core.model, saved.folder
    try:
        family = family_for(model)
    except ValueError as error:
        raise ValueError(f"from={folder.name}: {error}") from None
    carried = folder.path / CARRIED
    before = json.loads((carried / "config.json").read_text()) if (carried / "config.json").exists() else {}
    if before and shape_of(family_of(before).read(before)) == shape_of(model):
        family = family_of(before)
    dtype = task.dtype or before.get("dtype") or before.get("torch_dtype") or model.dtype.name
    params = saved.params()
    half = path.with_name(path.name + ".tmp")
    if is_chief() and half.exists():
        shutil.rmtree(half)
    save_params(half, model, params, family, dtype=dtype, shard_bytes=int(task.shard_gigabytes * 1e9))
    if not is_chief():
        return 0
    written = Folder(half)
    read_back = family.read(written.config)
    differs = first_difference(written, read_back, params)
    if differs is not None or shape_of(read_back) != shape_of(model):
        raise RuntimeError(
            f"{half}: {differs or 'config.json'} is not what was written; it stays there to be looked at"
        )
    for name in BESIDE:
        if (carried / name).exists():
            shutil.copyfile(carried / name, half / name)
    say(write_tokenizer(half, saved.tokenizer, before))
    if path.exists():
        path.rmdir()
    half.rename(path)
    say(f"hf:{path}: {family.architecture}, {num_params(model)['total']:,} parameters in {dtype}, read back and equal")
    return 0
