"""Root config: `RunConfig`, and `GROUPS`, which maps option names of the command line to dataclasses.

Defaults are defined only in the dataclasses; a YAML file in this folder adds an option with different values. Config
classes of models, optimizers, sources etc. are defined next to the code that they configure. Those of tasks, launchers
and sweeps are in `configs/tasks.py`, `launchers.py` and `sweeps.py`, because their implementation in `launch` imports
this package.
"""

import enum
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.compatibility import check_compatibility, set_num_labels
from configs.launchers import LAUNCHERS, LauncherConfig, LocalConfig
from configs.ranges import check_ranges
from configs.sweeps import SweepSearchConfig
from configs.tasks import TASKS, ServeConfig, SweepConfig, TaskConfig, TrainConfig
from data.loader import DataConfig
from data.object_store import check_url
from data.packing import Packing
from data.records.encoding import DataFormat
from data.sources.readers import (
    ArrayRecordConfig,
    HuggingFaceConfig,
    JsonlConfig,
    ParquetConfig,
    PythonStdlibConfig,
    SyntheticConfig,
    TextConfig,
)
from data.tokenizers.kinds import (
    BytesConfig,
    CharactersConfig,
    SentencePieceConfig,
    TokenizerConfig,
    TokenizerJsonConfig,
)
from data.transforms import (
    DiffusionConfig,
    FimConfig,
    MlmConfig,
    PrefixLmConfig,
    SpanCorruptionConfig,
    TransformConfig,
    Ul2Config,
)
from models.adapters.lora import AdapterConfig
from models.config import MatmulPrecision, ModelConfig
from models.pruning import PruneConfig
from trainer.checkpoint.checkpointer import CheckpointConfig
from trainer.mesh import MeshConfig
from trainer.objective import ObjectiveConfig
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.contrastive import ContrastiveConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.kto import KtoConfig
from trainer.objectives.masked_lm import MaskedDiffusionConfig, MaskedLMConfig
from trainer.objectives.multi_token_prediction import MultiTokenConfig
from trainer.objectives.next_token import NextTokenConfig
from trainer.objectives.preference import PreferenceConfig
from trainer.objectives.reward import RewardConfig
from trainer.optimizers.adafactor import AdafactorConfig
from trainer.optimizers.adamw import AdamWConfig
from trainer.optimizers.lion import LionConfig
from trainer.optimizers.muon import MuonConfig
from trainer.optimizers.optimizer import OptimizerConfig
from trainer.optimizers.schedule_free import ScheduleFreeConfig
from trainer.optimizers.sgd import SgdConfig
from trainer.optimizers.soap import SoapConfig
from trainer.reliability.loss_spikes import LossSpikeConfig
from trainer.reliability.sdc_check import SDCCheckConfig
from trainer.schedule import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    ScheduleConfig,
    WsdConfig,
)
from trainer.sharding import ShardingRules
from trainer.tracker import TensorboardConfig, TrackerConfig, WandbConfig


class Resume(enum.Enum):
    auto = "auto"  # resume from the newest checkpoint, or start the run
    must = "must"  # fail if there is no checkpoint
    never = "never"  # fail if there are checkpoints


@dataclass
class RunConfig:
    """Complete config of a run. Packages below `launch` receive only the parts they need."""

    run: str = "default"  # name of the run and its folder; an existing name resumes that run
    output_dir: str = "runs"  # folder of all runs, or an object store URL: s3://BUCKET/runs
    seed: int = 0  # seed of initialization, data order, dropout and sampling
    # number of simulated CPU devices, to test a mesh without hardware; null: use the real devices
    fake_devices: int | None = field(default=None, metadata={"min": 1, "hint": "null: the real devices"})
    resume: Resume = Resume.auto  # policy for a run that has checkpoints
    # initial weights: a run (NAME, FOLDER, NAME@STEP), hf:FOLDER, gguf:FILE or peft:FOLDER; null: random
    init_from: str | None = None
    prune: PruneConfig = field(default_factory=PruneConfig)  # layers and units of init_from to keep
    reset: list[str] = field(default_factory=list)  # state to discard on resume, any of: optimizer, data, step
    task: TaskConfig = field(default_factory=TaskConfig)  # task, set by the first word of the command line
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sharding: ShardingRules = field(default_factory=ShardingRules)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    loss_spikes: LossSpikeConfig = field(default_factory=LossSpikeConfig)
    sdc_check: SDCCheckConfig = field(default_factory=SDCCheckConfig)
    trackers: dict[str, TrackerConfig] = field(default_factory=dict)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)


GROUPS: dict[str, dict[str, type]] = {
    "task": TASKS,
    "source": {
        "text": TextConfig,
        "jsonl": JsonlConfig,
        "parquet": ParquetConfig,
        "arrayrecord": ArrayRecordConfig,
        "huggingface": HuggingFaceConfig,
        "synthetic": SyntheticConfig,
        "python_stdlib": PythonStdlibConfig,
    },
    "transform": {
        "none": TransformConfig,
        "fim": FimConfig,
        "prefix_lm": PrefixLmConfig,
        "span_corruption": SpanCorruptionConfig,
        "ul2": Ul2Config,
        "mlm": MlmConfig,
        "diffusion": DiffusionConfig,
    },
    "tokenizer": {
        "sentencepiece": SentencePieceConfig,
        "tokenizer_json": TokenizerJsonConfig,
        "bytes": BytesConfig,
        "characters": CharactersConfig,
    },
    "model": {"tiny": ModelConfig},
    "adapter": {"none": AdapterConfig},
    "objective": {
        "next_token": NextTokenConfig,
        "multi_token": MultiTokenConfig,
        "masked": MaskedLMConfig,
        "masked_diffusion": MaskedDiffusionConfig,
        "preference": PreferenceConfig,
        "kto": KtoConfig,
        "distillation": DistillationConfig,
        "reward": RewardConfig,
        "classification": ClassificationConfig,
        "contrastive": ContrastiveConfig,
    },
    "optimizer": {
        "adamw": AdamWConfig,
        "adafactor": AdafactorConfig,
        "lion": LionConfig,
        "muon": MuonConfig,
        "soap": SoapConfig,
        "sgd": SgdConfig,
        "schedule_free": ScheduleFreeConfig,
    },
    "schedule": {
        "cosine": CosineConfig,
        "linear": LinearConfig,
        "constant": ConstantConfig,
        "wsd": WsdConfig,
        "inverse_sqrt": InverseSqrtConfig,
    },
    "mesh": {"default": MeshConfig},
    "checkpoint": {"default": CheckpointConfig},
    "tracker": {"wandb": WandbConfig, "tensorboard": TensorboardConfig},
    "launcher": LAUNCHERS,
    "sweep": {"search": SweepSearchConfig},
}

# Config path of a group's options, if it is not the group's name.
PACKAGES = {
    "source": "data.sources.{option}",
    "transform": "data.transform",
    "tracker": "trackers.{option}",
    "sweep": "task.sweep",
}


def register() -> None:
    """Registers every class of `GROUPS` with Hydra as an option of its group.

    A YAML file in `configs/GROUP` adds an option with the values that differ from the defaults of the group's class.
    """
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for group, classes in GROUPS.items():
        for option, cls in classes.items():
            package = PACKAGES.get(group, group).format(option=option)
            store.store(group=group, name=option, node=cls, package=package)


def to_typed(node: Any) -> RunConfig:
    """Converts a composed Hydra config to a validated `RunConfig`.

    Raises: ValueError naming key, value, reason and fix.
    """
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        key = missing[0]
        raise ValueError(f"{key}=???: required key without a value; set it on the command line: {key}=VALUE")
    config = OmegaConf.to_object(node)
    assert isinstance(config, RunConfig)
    validate(config)
    return config


def from_saved(saved: dict[str, Any]) -> RunConfig:
    """Converts the `config.yaml` of a run folder to a `RunConfig`; `kind` selects the class of each node.

    Raises: ValueError naming the first key that this version does not have, or that is missing.
    """
    try:
        return _from_saved(saved)
    except OmegaConfBaseException as error:
        raise ValueError(f"config.yaml: {error.full_key or error.key}: {str(error).splitlines()[0]}") from error
    except KeyError as error:
        raise ValueError(f"config.yaml: {error.args[0]}: missing key") from error


def _from_saved(saved: dict[str, Any]) -> RunConfig:
    tree = OmegaConf.structured(RunConfig)
    plain = {key: value for key, value in saved.items() if key not in _POLYMORPHIC}
    tree = OmegaConf.merge(tree, {key: v for key, v in plain.items() if key not in ("data", "trackers")})
    for key, group in _POLYMORPHIC.items():
        if group is not None:
            setattr(tree, key, typed_node(group, saved[key]))
    data = {key: v for key, v in saved["data"].items() if key not in ("sources", "transform")}
    tree.data = OmegaConf.merge(OmegaConf.structured(DataConfig), data)
    tree.data.transform = typed_node("transform", saved["data"].get("transform", {"kind": "none"}))
    for name, node in saved["data"]["sources"].items():
        tree.data.sources[name] = typed_node("source", node)
    for name, node in saved["trackers"].items():
        tree.trackers[name] = typed_node("tracker", node)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, RunConfig)
    return config


_POLYMORPHIC = {
    "task": "task",
    "tokenizer": "tokenizer",
    "objective": "objective",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "launcher": "launcher",
}


def typed_node(group: str, node: dict[str, Any]) -> Any:
    """Converts a saved node of a group to an OmegaConf node of the class selected by its `kind`."""
    cls = GROUPS[group].get(node["kind"])
    if cls is None:
        raise ValueError(f"{group}.kind={node['kind']}: unknown {group}; choose from: {', '.join(GROUPS[group])}")
    return OmegaConf.merge(OmegaConf.structured(cls), node)


def to_plain(config: Any) -> dict[str, Any]:
    """Converts a config dataclass to dicts, lists, numbers and strings, for YAML and JSON."""
    if is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in fields(config)}  # type: ignore[return-value]
    if isinstance(config, enum.Enum):
        return config.name  # type: ignore[return-value]
    if isinstance(config, dict):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_plain(value) for value in config]  # type: ignore[return-value]
    return config


def validate(config: RunConfig) -> None:
    """Checks the range of each key and the consistency of keys.

    Raises: ValueError naming key, value, reason and fix.
    """
    check_ranges(config)
    name = config.run
    if not name or name.startswith(".") or any(c in name for c in '/\\:*?"<>| '):
        raise ValueError(f"run={name!r}: not a valid folder name; use letters, digits, '.', '_' and '-' only")
    for key, value in (("output_dir", config.output_dir), ("data.cache_dir", config.data.cache_dir or "")):
        check_url(value, key)
    unknown = set(config.reset) - {"optimizer", "data", "step"}
    if unknown:
        raise ValueError(
            f"reset={config.reset}: unknown state {sorted(unknown)[0]!r}; choose from: optimizer, data, step"
        )
    sources = config.data.sources
    weights = config.data.mixture_weights
    if weights:
        if len(weights) != len(sources):
            raise ValueError(
                f"data.mixture_weights={weights}: {len(weights)} weights for {len(sources)} sources; give one per "
                f"source, in this order: {', '.join(sources)}"
            )
        for source, weight in zip(sources.values(), weights, strict=True):
            source.weight = weight
    given = [source.weight is not None for source in sources.values()]
    if any(given) and not all(given):
        without = [key for key, source in sources.items() if source.weight is None]
        raise ValueError(
            f"data.sources.{without[0]}.weight=null: other sources have a weight; set a weight for each source or none"
        )
    config.model.validate()
    if config.prune.width.active and config.init_from is None:
        raise ValueError("prune.width: needs weights to prune; set init_from, or set the sizes in model.* instead")
    config.adapter.validate()
    precision = config.model.matmul_precision
    if config.adapter.active and precision is not MatmulPrecision.full:
        raise ValueError(
            f"model.matmul_precision={precision.name}: not supported with adapter.method={config.adapter.method.name}; "
            "set model.matmul_precision=full (adapter=qlora quantizes the frozen weights to 4 bits)"
        )
    config.launcher.validate()
    task = config.task
    if isinstance(task, TrainConfig) and task.profile_steps and len(task.profile_steps) != 2:
        raise ValueError(f"task.profile_steps={task.profile_steps}: needs two steps; give [first, last]")
    if isinstance(task, SweepConfig):
        task.sweep.validate()
    if isinstance(task, ServeConfig) and isinstance(config.launcher, LocalConfig) and config.launcher.num_processes > 1:
        raise ValueError(
            f"launcher.num_processes={config.launcher.num_processes}: serve runs in one process with all devices of "
            "its host; remove the key"
        )
    if config.data.format in (DataFormat.chat, DataFormat.classification) and config.data.packing is Packing.concat:
        raise ValueError(
            "data.packing=concat: splits conversations and texts across rows, so answers would be trained on without "
            "their prompt; use data.packing=best_fit"
        )
    set_num_labels(config.data, config.objective, config.model)
    check_compatibility(config.data, config.objective, config.model, config.adapter)
