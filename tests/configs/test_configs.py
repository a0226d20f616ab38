"""Every YAML file composes, validates and builds abstractly; saved configs are restored unchanged."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from configs.schema import GROUPS, RunConfig, from_saved, register, to_plain, to_typed
from models.transformer import abstract_params, param_axes

FOLDER = Path(__file__).resolve().parents[2] / "configs"
NEEDS = {
    "text": ["data.sources.text.paths=[x]"],
    "jsonl": ["data.sources.jsonl.paths=[x]"],
    "parquet": ["data.sources.parquet.paths=[x]"],
    "arrayrecord": ["data.sources.arrayrecord.paths=[x]"],
    "huggingface": ["data.sources.huggingface.path=x"],
    "tokenizer_json": ["tokenizer.path=x"],
    "shakespeare_char": ["data.sources.text.paths=[x]"],
    "sft": ["data.sources.jsonl.paths=[x]"],
    "sft_smollm2": ["data.sources.jsonl.paths=[x]"],
    "kto": ["data.format=unpaired_preference", "source=[jsonl]", "data.sources.jsonl.paths=[x]"],
    "preference": ["data.format=preference"],
    "multi_token": ["model.mtp_num_layers=1"],
    "masked": ["transform=mlm", "model.attention.mask=bidirectional"],
    "mlm": ["objective=masked", "model.attention.mask=bidirectional"],
    "masked_diffusion": ["transform=diffusion", "model.attention.mask=bidirectional"],
    "diffusion": ["objective=masked_diffusion", "model.attention.mask=bidirectional"],
    "reward": ["source=[jsonl]", "data.sources.jsonl.paths=[x]", "data.format=preference"],
    "classification": ["data.format=classification", "data.packing=best_fit", "data.classes=[a,b]"],
    "contrastive": ["data.format=retrieval"],
    "classify": ["data.sources.jsonl.paths=[x]", "data.classes=[a,b]"],
    "embed": ["data.sources.jsonl.paths=[x]"],
    "reward_smollm2": ["data.sources.jsonl.paths=[x]"],
    "spam_smollm2": ["data.sources.jsonl.paths=[x]"],
    "distill_smollm2": ["data.sources.jsonl.paths=[x]"],
    "learning_rate": ["task=sweep"],
    "search": ["task=sweep", "+task.sweep.parameters={seed:'1,2'}"],
    "sweep": ["+task.sweep.parameters={seed:'1,2'}"],
    "k8s": ["launcher.image=x"],
    "tpu_vm": ["launcher.accelerator=x", "launcher.runtime=x", "launcher.zone=x"],
    "dpo": ["data.sources.jsonl.paths=[x]"],
    "dpo_smollm2": ["data.sources.jsonl.paths=[x]"],
}


@pytest.fixture(scope="module", autouse=True)
def hydra():
    register()
    with initialize_config_module(config_module="configs", version_base="1.3"):
        yield


def options():
    """Yields every option of every group: YAML files and classes."""
    for path in sorted(FOLDER.glob("*/*.yaml")):
        yield path.parent.name, path.stem
    for group, classes in GROUPS.items():
        for name in classes:
            yield group, name


@pytest.mark.parametrize(("group", "name"), list(options()))
def test_every_option_composes_and_survives_being_saved(group, name):
    value = f"[{name}]" if group in ("source", "tracker") else name
    config = to_typed(compose("root", overrides=[f"{group}={value}", *NEEDS.get(name, [])]))
    saved = yaml.safe_load(yaml.safe_dump(to_plain(config)))
    assert from_saved(saved) == config


@pytest.mark.parametrize("name", [name for group, name in options() if group == "model"])
def test_every_model_builds_abstractly(name):
    model = to_typed(compose("root", overrides=[f"model={name}"])).model
    model.vocab_size = model.vocab_size or 64
    shapes, axes = abstract_params(model), param_axes(model)
    assert set(shapes) == set(axes)


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, classes in GROUPS.items() for n in classes])
def test_every_class_of_a_group_is_a_config_that_knows_its_name(group, name):
    cls = GROUPS[group][name]
    node = OmegaConf.structured(cls)
    if "kind" in node:
        assert node.kind == name


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_yaml_restates_a_default(path):
    if path.parent.name in ("experiment", "phase", "model"):
        pytest.skip("these set keys of any group, or all sizes of a published model")
    name = path.stem
    group = path.parent.name
    cls = GROUPS[group].get(name) or next(iter(GROUPS[group].values()))
    default = OmegaConf.to_container(OmegaConf.structured(cls), enum_to_str=True)
    body = {k: v for k, v in (yaml.safe_load(path.read_text()) or {}).items() if k != "defaults"}

    def walk(mine, theirs, where):
        for key, value in mine.items():
            if value == "???":
                continue
            if isinstance(value, dict):
                walk(value, theirs.get(key, {}), f"{where}{key}.")
            else:
                assert key not in theirs or value != theirs[key], f"{where}{key}: {value} is the default already"

    walk(body, default, "")


@pytest.mark.parametrize("name", [name for group, name in options() if group == "experiment"])
@pytest.mark.parametrize("num_steps", [1, 10])
def test_a_short_run_of_every_experiment_has_a_schedule(name, num_steps):
    more = [f"task.num_steps={num_steps}", *NEEDS.get(name, [])]
    config = to_typed(compose("root", overrides=[f"experiment={name}", *more]))
    schedule = config.schedule.build(1.0, num_steps)
    assert all(0 < float(schedule(step)) <= 1 for step in range(num_steps))


def test_the_default_command_is_valid():
    assert isinstance(to_typed(compose("root")), RunConfig)
