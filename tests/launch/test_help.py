"""Help is true, complete and short, and suggestions lead to keys that exist."""

import dataclasses
import re
import subprocess
import sys

import pytest

from configs import reference
from configs.schema import GROUPS, RunConfig
from configs.tasks import TASKS
from launch import help
from launch.config_errors import explain_flag
from launch.key_hints import HINTS, hint
from launch.overrides import routes_of

KEYS = reference.all_keys()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tests do not depend on the width of the terminal that they run in."""
    monkeypatch.setattr(help, "WIDTH", 100)


def fields_below(cls: type, prefix: str) -> set[str]:
    """Paths of all keys of an imported config class: what the reader of sources must find."""
    found: set[str] = set()
    made = {f.name: f.type for f in dataclasses.fields(cls)}
    for name, kind in made.items():
        if name == "kind":
            continue
        kind = getattr(sys.modules[cls.__module__], kind, kind) if isinstance(kind, str) else kind
        inner = kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None
        found |= {f"{prefix}{name}"} if inner is None else fields_below(inner, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in GROUPS.items() for o in options])
def test_the_reference_has_the_keys_of_every_class(group, option):
    package = reference.package(group, option)
    known = {key.path for key in reference.option_keys(group, option)}
    names = {field: alias for alias, field in reference.aliases().get(option, {}).items()}
    expected = fields_below(GROUPS[group][option], f"{package}." if package else "")
    assert known == {names.get(path, path) for path in expected}


def test_the_reference_has_the_keys_of_every_run():
    known = {key.path for key in reference.common_keys()}
    grouped = [f.name for f in dataclasses.fields(RunConfig) if f.name in GROUPS or f.name in ("trackers",)]
    expected = {
        path
        for path in fields_below(RunConfig, "")
        if path.split(".")[0] not in grouped and not path.startswith(("data.sources", "data.transform"))
    }
    assert known == expected


def test_defaults_and_menus_are_those_of_the_classes():
    by_path = {(key.option, key.path): key for key in KEYS}
    assert by_path["train", "num_steps"].default == "1000" and by_path["generate", "top_p"].default == "1"
    assert by_path["generate", "prompt"].default == "null" and by_path["generate", "stop"].default == "[]"
    assert by_path["text", "data.sources.text.paths"].default == "required"
    assert by_path["tiny", "model.dtype"].allowed.startswith("float32, bfloat16")
    assert by_path["coord_check", "widths"].default == "[64,128,256,512]"


def test_bounds_are_read_from_the_call_that_makes_a_field(tmp_path, monkeypatch):
    (tmp_path / "made.py").write_text(
        "@dataclass\n"
        "class A:\n"
        "    # Above.\n"
        "    x: int = field(default=1, metadata={'min': 1, 'max': 9})  # Trailing\n"
        "    y: float = ranged(0.5, min=0.0, above=-1)  # Y\n"
        "    z: list[int] = field(default_factory=lambda: [1, 2], metadata={'min': 0})  # Z\n"
        "\n"
        "    def method(self) -> None:\n"
        "        w: int = 1\n"
    )
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    found = list(reference.keys_of("made", "A"))
    assert [(key.path, key.default, key.bounds, key.doc) for key in found] == [
        ("x", "1", "min 1, max 9", "Above. Trailing"),
        ("y", "0.5", "min 0.0, above -1", "Y"),
        ("z", "[1,2]", "min 0", "Z"),
    ]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.option}:{key.path}")
def test_every_key_has_a_doc(key):
    assert key.doc and len(key.doc.splitlines()) == 1
    assert key.doc[0].isupper() or re.match(r"\S*[_:=.(0-9]", key.doc), "starts with a capital letter or a name"


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("task", TASKS)
def test_help_of_a_task_is_one_screen(task, width, monkeypatch):
    monkeypatch.setattr(help, "WIDTH", width)
    lines = help.help_on(task, []).splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    assert len(help.TASKS[task].keys) <= 10 and len(help.TASKS[task].examples) == 3
    own = {key.path for key in help.keys_of_task(task)}
    assert set(help.TASKS[task].keys) <= own
    for example in help.TASKS[task].examples:
        words = example.split()
        assert words[:2] == ["meshwright", task]


@pytest.mark.parametrize("task", TASKS)
def test_no_option_of_another_task_is_in_its_help(task):
    known = {key.path.split(".")[0] for key in reference.option_keys("task", task)}
    shared = {key.path.split(".")[0] for key in reference.common_keys()} | set(reference.groups()) | {"trackers"}
    text = help.help_on(task, ["all"])
    found = {line.split(".")[0] for line in text.splitlines() if line and not line.startswith(" ")}
    assert found <= known | shared


TOPICS = {
    "one key": ("num_steps", ["num_steps", "integer; default 1000"]),
    "a key with its prefix": ("task.num_steps", ["num_steps", "integer; default 1000"]),
    "a key's path": ("model.attention", ["model.attention.num_heads"]),
    "a group": ("optimizer", ["optimizer: chosen by optimizer=NAME; default adamw", "muon", "optimizer.learning_rate"]),
    "an option": ("optimizer.adamw", ["optimizer=adamw:", "optimizer.b1"]),
    "an option by =": ("optimizer=adamw", ["optimizer=adamw:", "optimizer.b1"]),
    "an option from YAML": ("model=llama3_8b", ["model=llama3_8b: Llama 3.1 8B"]),
    "a menu": ("model.remat", ["none, full", "full: "]),
    "sources": ("source", ["data.sources.NAME.paths", "chosen by source=[NAME,...]"]),
}


@pytest.mark.parametrize(("topic", "said"), TOPICS.values(), ids=TOPICS)
def test_help_on_a_topic(topic, said):
    text = help.help_on("train", [topic])
    assert all(part in text for part in said), text
    assert "schema" not in text and max(map(len, text.splitlines())) <= 100


def test_a_wrong_topic_is_named():
    with pytest.raises(ValueError, match="did you mean optimizer or"):
        help.help_on("train", ["optimzer"])
    with pytest.raises(ValueError, match=r"num_steps is a key of train, plan.*`serve` has no such key"):
        help.help_on("serve", ["num_steps"])


def test_help_imports_neither_jax_nor_hydra():
    code = (
        "import sys\nfrom launch.cli import run\n"
        "assert run(['train', '--help', 'all']) == 0 and run(['--help']) == 0 and run(['train', '--help', 'x']) == 2\n"
        "assert not {'jax', 'hydra', 'omegaconf', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_hint_leads_to_a_key_or_an_option():
    known = {key.path for key in KEYS} | set(reference.groups())
    for advice in HINTS.values():
        for word in advice.split():
            key, _, value = word.partition("=")
            assert key in known, f"{advice}: {key}"
            assert key not in reference.groups() or not value or value.strip("[]") in reference.option_names(key), (
                advice
            )


def test_hints():
    assert hint("model.n_layers") == "model.num_layers" and hint("nothing") is None
    assert explain_flag("--max_steps", "10", "train") == "--max_steps: keys are written KEY=VALUE: num_steps=10"
    assert explain_flag("--max-steps=10", None, "train").endswith(": num_steps=10")
    assert explain_flag("--train.max_steps", "5", "train").endswith(": num_steps=5")
    assert explain_flag("--num_steps", None, "train").endswith(": num_steps=VALUE")
    assert explain_flag("hello", None, "train").endswith("did you mean 'experiment=hello'?")


ROUTED = {
    ("train", "num_steps=10"): "task.num_steps=10",
    ("train", "task.num_steps=10"): "task.num_steps=10",
    ("train", "+num_steps=10"): "+task.num_steps=10",
    ("train", "++num_steps=10"): "++task.num_steps=10",
    ("train", "~num_steps"): "~task.num_steps",
    ("train", "num_steps=1,2"): "task.num_steps=1,2",
    ("train", "run=a"): "run=a",
    ("train", "data.batch_size=8"): "data.batch_size=8",
    ("train", "temperature=1"): "temperature=1",
    ("sweep", "sweep.trials=8"): "task.sweep.trials=8",
    ("sweep", "sweep=learning_rate"): "sweep=learning_rate",
    ("generate", "prompt=num_steps=1, [a] b"): "task.prompt=num_steps=1, [a] b",
    ("generate", "num_steps=1"): "num_steps=1",
    ("convert", "from=hf:x"): "task.input=hf:x",
    ("convert", "to=y"): "task.output=y",
    ("nonsense", "num_steps=1"): "num_steps=1",
}


@pytest.mark.parametrize(("task", "given"), ROUTED)
def test_a_key_of_the_task_needs_no_prefix(task, given):
    assert routes_of(task).route(given) == ROUTED[task, given]
