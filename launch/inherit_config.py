"""Takes model config and tokenizer of a run from the weights that it starts from."""

import copy
from dataclasses import is_dataclass, replace
from importlib.resources import files
from typing import Any

import yaml

from configs.schema import RunConfig, validate
from data.records.chat_encoding import configured
from data.tokenizers.kinds import TokenizerConfig, save_tokenizer
from launch.config_errors import named_keys
from launch.corpora import MADE_OF
from launch.multihost import is_main_process, publish_files
from launch.pruned_init import prune_source
from launch.run_folder import RunFolder
from launch.weights_source import Say, published_kind, resolve_weights
from models.config import ModelConfig


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
