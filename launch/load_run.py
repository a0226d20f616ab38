"""Loads a saved run read-only, for evaluation, inspection, generation and export."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax

from configs.schema import RunConfig
from configs.tasks import RunReaderConfig, TrainConfig
from data.records.encoding import DataFormat
from data.tokenizers.kinds import from_files
from data.tokenizers.tokenizer import Tokenizer
from launch.build import Core, build_core
from launch.config_errors import named_keys
from launch.multihost import log
from launch.run_folder import RunFolder, run_folder
from launch.weights_source import load_frozen_model, recorded_base
from models.adapters.lora import AdapterConfig
from models.attention.kernels import without_kernel
from models.config import Dtype
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.mesh import MeshConfig
from trainer.objective import Params
from trainer.objective_params import model_params
from trainer.optimizers.eval_params import eval_params
from trainer.reference_sync import reference_from_state
from trainer.state import TrainState

# Keys of `data` that define how records become rows.
RECORD_KEYS = (
    "format", "loss_mask", "on_overflow", "max_bad_fraction", "packing", "seq_len", "classes",
)  # fmt: skip


@dataclass(frozen=True)
class SavedRun:
    folder: RunFolder
    config: RunConfig  # the saved config with permitted command-line overrides
    step: int
    tokenizer: Tokenizer
    core: Core  # for the model parameters, adapters merged
    trained: Core  # for the trained parameters: differs from `core` for adapters
    checkpointer: Checkpointer

    def state(self) -> TrainState:
        return self.checkpointer.restore(self.step, self.trained.abstract).state

    def params(self) -> Params:
        """Returns the model parameters for generation and export: the averaged ones if the optimizer has an average."""
        return model_params(self.scored_params())

    def scored_params(self) -> Params:
        """Returns the model parameters with the objective's additional ones, as the loss reads them."""
        adaptation = self.trained.adaptation
        if adaptation is None:
            return self.trained_params()
        base = recorded_base(adaptation, self.checkpointer, self.step, self.config.output_dir, log)
        return adaptation.merge(base.params, self.trained_params())

    def frozen(self) -> dict[str, Any]:
        """Loads the frozen models of the loss (reference, teacher), without the base of adapters."""
        known, needs = self.checkpointer.read_json(self.step, "config"), self.config.objective.frozen_needs
        models = reference_from_state(self.state().opt_state) if needs.synced else {}
        for role in needs.loaded:
            record = known[role]
            found = (
                self.config.objective,
                role,
                record["origin"],
                self.tokenizer,
                self.core,
                self.config.output_dir,
                log,
            )
            models[role], _ = load_frozen_model(*found, sha256=record["sha256"])
        return models

    def trained_params(self) -> Params:
        """Returns the trained parameters: the adapters, if the run has any."""
        if jax.tree.structure(jax.eval_shape(eval_params, self.trained.abstract)) and self._averages():
            return jax.jit(eval_params)(self.state())
        return self.checkpointer.restore_params(self.step, self.trained.abstract.params)

    def _averages(self) -> bool:
        # Otherwise the optimizer state, twice the size of the parameters, need not be read.
        optimizer = self.config.optimizer
        return optimizer.ema_decay is not None or optimizer.kind == "schedule_free"


def open_run(config: RunConfig, overrides: list[str], *, dtype: Dtype | None = None) -> SavedRun:
    """Opens the run `run=NAME` at `step=K` or at its newest valid checkpoint, on the mesh of this command.

    Model, tokenizer, optimizer and seed come from the run; so does the data, unless the command sets data keys.
    `dtype`: overrides the compute dtype of the run.
    Raises: ValueError if the run or the step does not exist.
    """
    folder = run_folder(config)
    saved = folder.saved_config()
    named = named_keys(overrides)
    changed = {key.partition(".")[0] for key in named}
    for key in changed & {"model", "adapter", "optimizer", "tokenizer", "objective", "schedule"}:
        raise ValueError(f"{key}: fixed by the run {folder.name!r}; remove it from the command")
    data = config.data if changed & {"data", "source"} else saved.data
    if "source" not in changed and "data" in changed:
        data = dataclasses.replace(data, sources=saved.data.sources)
    # The run's record format also applies to other data, unless the command changes it.
    inherited = [key for key in RECORD_KEYS if f"data.{key}" not in named and "phase" not in named]
    transforms = changed & {"transform", "phase"} or any(key.startswith("data.transform") for key in named)
    data = dataclasses.replace(data, transform=(config if transforms else saved).data.transform)
    if saved.data.format is not DataFormat.text or saved.data.transform.kind != "none":
        data = dataclasses.replace(data, **{key: getattr(saved.data, key) for key in inherited})
    merged = dataclasses.replace(
        saved,
        data=data,
        model=saved.model if dtype is None else dataclasses.replace(saved.model, dtype=dtype),
        mesh=config.mesh if "mesh" in changed else MeshConfig(),
        output_dir=config.output_dir,
        run=config.run,
    )
    checkpointer = folder.checkpointer(read_only=True, say=log)
    assert isinstance(config.task, RunReaderConfig)
    step = config.task.step if config.task.step is not None else checkpointer.latest_valid_step()
    if step is None:
        raise ValueError(
            f"run={folder.name}: has no checkpoint yet; one is saved every {saved.checkpoint.save_interval_steps} steps"
        )
    tokenizer = from_files(checkpointer.read_tokenizer(step))
    if not isinstance(saved.task, TrainConfig):
        merged = dataclasses.replace(merged, task=TrainConfig())
    adapted = _for_inference(merged)
    core = trained = build_core(dataclasses.replace(adapted, adapter=AdapterConfig()), tokenizer)
    if saved.adapter.active:
        trained = build_core(adapted, tokenizer)
    return SavedRun(folder, merged, step, tokenizer, core, trained, checkpointer)


def open_writer(config: RunConfig, overrides: list[str]) -> SavedRun:
    """Opens a run that generates text. Raises: as `open_run`, and ValueError for reward models and classifiers."""
    saved = open_run(config, overrides)
    if saved.core.model.num_labels:
        raise ValueError(
            f"run={saved.folder.name}: computes {saved.core.model.num_labels} scores per text "
            f"({saved.config.objective.kind}) and cannot generate; use: meshwright predict run={saved.folder.name}"
        )
    return saved


def _for_inference(config: RunConfig) -> RunConfig:
    """Adapts a config to inference: no gradient accumulation, and a batch size divisible by the mesh.

    Attention kernels are chosen for the devices and sequence lengths of training, so the XLA attention replaces them.
    """
    assert isinstance(config.task, TrainConfig)
    shards = jax.device_count() // (max(config.mesh.tensor, 1) * max(config.mesh.context, 1))
    size = -(-config.data.batch_size // shards) * shards
    return dataclasses.replace(
        config,
        model=without_kernel(config.model),
        task=dataclasses.replace(config.task, gradient_accumulation_steps=1),
        data=dataclasses.replace(config.data, batch_size=size),
    )
