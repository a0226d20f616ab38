"""Command-line help: the list of tasks, one task, a config group, or a key.

Imports neither JAX nor Hydra, so that help prints at once.
"""

import difflib
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from configs import reference
from configs.reference import Choice, Key

WIDTH = max(60, min(100, shutil.get_terminal_size((100, 40)).columns))
TRAINING = (
    "experiment", "phase", "model", "source", "tokenizer", "transform", "objective", "optimizer", "schedule", "adapter",
    "mesh", "checkpoint", "tracker", "launcher",
)  # fmt: skip
OF_RUN = ("run", "output_dir", "fake_devices")  # shared keys of tasks that read a run


class Task(NamedTuple):
    """Help of a task."""

    summary: str
    keys: tuple[str, ...]  # the keys set most often
    examples: tuple[str, ...]
    groups: tuple[str, ...] = ()
    shared: tuple[str, ...] | None = OF_RUN  # shared keys that it reads, by first component; None: all


TASKS = {
    "train": Task(
        "Train a model; the same run name again resumes the run",
        (
            "run", "num_steps", "data.batch_size", "data.seq_len", "optimizer.learning_rate", "schedule.warmup_steps",
            "init_from", "model.dtype", "eval_every", "checkpoint.save_interval_steps",
        ),
        (
            "meshwright train experiment=hello num_steps=500",
            "meshwright train source=[text] data.sources.text.paths=[DIR] model=smollm2_135m mesh=fsdp",
            "meshwright train phase=sft init_from=RUN adapter=lora data.sources.jsonl.paths=[FILE] run=tuned",
        ),
        TRAINING,
        None,
    ),
    "plan": Task(
        "Estimate memory, speed and cost of a run on devices that need not be present",
        (
            "target", "search", "compile", "num_tokens", "price_per_device_hour", "scaling_law",
            "gradient_accumulation_steps", "data.batch_size", "data.seq_len", "model.remat",
        ),
        (
            "meshwright plan model=llama3_70b target=v5p-512",
            "meshwright plan model=llama3_8b target=h100x64 search=true num_tokens=1e12",
            "meshwright plan phase=sft adapter=lora model=qwen3_8b target=h100x8 format=json",
        ),
        TRAINING,
        None,
    ),
    "sweep": Task(
        "Train with several values of some keys and compare the results",
        (
            "run", "sweep.trials", "sweep.max_concurrent_trials", "sweep.method", "sweep.metric", "sweep.mode",
            "sweep.pruning", "sweep.warmup_steps", "sweep.retry_failed", "num_steps",
        ),
        (
            "meshwright sweep experiment=hello optimizer.learning_rate=log:1e-4..1e-2 sweep.trials=8",
            "meshwright sweep experiment=hello num_steps=100,200 model.num_layers=2,4",
            "meshwright sweep experiment=hello sweep=learning_rate sweep.max_concurrent_trials=2 run=rates",
        ),
        (*TRAINING, "sweep"),
        None,
    ),
    "coord_check": Task(
        "Check that learning rates transfer across widths (muP)",
        (
            "run", "widths", "num_steps", "tolerance", "output", "format", "model.mup_base_width",
            "optimizer.learning_rate", "data.batch_size", "data.seq_len",
        ),
        (
            "meshwright coord_check model.mup_base_width=64",
            "meshwright coord_check widths=[64,128,256] optimizer=muon",
            "meshwright coord_check model=tiny_gpt2 tolerance=0.2 format=json",
        ),
        TRAINING,
        None,
    ),
    "scaling_ladder": Task(
        "Train several sizes, fit a scaling law, recommend a size",
        (
            "run", "widths", "aspect_ratio", "tokens_per_param", "compute_budget", "output", "format",
            "data.batch_size", "data.seq_len", "optimizer.learning_rate",
        ),
        (
            "meshwright scaling_ladder compute_budget=1e18",
            "meshwright scaling_ladder widths=[64,96,128] tokens_per_param=[10,20] run=small",
            "meshwright scaling_ladder experiment=hello compute_budget=1e17 format=json",
        ),
        TRAINING,
        None,
    ),
    "prepare": Task(
        "Tokenize the sources into shards ahead of training",
        (
            "run", "output_dir", "seed", "data.seq_len", "data.packing", "data.format", "data.max_bad_fraction",
            "data.cache_dir", "tokenizer.vocab_size", "init_from",
        ),
        (
            "meshwright prepare source=[text] data.sources.text.paths=[DIR]",
            "meshwright prepare source=[jsonl] data.sources.jsonl.paths=[FILE] tokenizer=bytes",
            "meshwright prepare experiment=hello",
        ),
        ("experiment", "phase", "source", "tokenizer", "transform", "launcher"),
        (*OF_RUN, "seed", "init_from", "data"),
    ),
    "evaluate": Task(
        "Measure the loss of a run, or multiple-choice accuracy",
        (
            "run", "step", "max_eval_batches", "eval_tasks", "limit", "limit_per_group", "prefix", "dtype", "format",
            "data.max_eval_batches",
        ),
        (
            "meshwright evaluate run=hello",
            "meshwright evaluate run=hello source=[text] data.sources.text.paths=[DIR]",
            "meshwright evaluate run=hello eval_tasks=[FILE.jsonl] format=json",
        ),
        ("source", "transform", "mesh", "launcher"),
        (*OF_RUN, "seed", "data"),
    ),
    "generate": Task(
        "Generate text with a run, from a prompt or in a chat",
        ("run", "prompt", "chat", "step", "max_new_tokens", "temperature", "top_p", "num_samples", "stop", "format"),
        (
            "meshwright generate run=hello prompt='def '",
            "meshwright generate run=tuned chat='Hello' system='Be brief.' temperature=0",
            "meshwright generate run=hello prompt_file=PROMPTS.txt num_samples=4 format=json",
        ),
        ("mesh", "launcher"),
        (*OF_RUN, "seed"),
    ),
    "serve": Task(
        "Serve a run over HTTP with OpenAI's API and a chat page",
        (
            "run", "step", "host", "port", "api_key_env", "max_num_seqs", "max_model_len", "max_queue_size", "timeout",
            "shutdown_timeout",
        ),
        (
            "meshwright serve run=hello",
            "meshwright serve run=tuned port=8080 max_num_seqs=32",
            "meshwright serve run=tuned host=0.0.0.0 api_key_env=SERVE_KEY",
        ),
        ("mesh", "launcher"),
    ),
    "predict": Task(
        "Compute rewards, class probabilities or embeddings of texts",
        ("run", "texts", "files", "output", "batch_size", "step", "output_dir", "fake_devices"),
        (
            "meshwright predict run=spam texts=['Win a prize']",
            "meshwright predict run=reward files=[ANSWERS.jsonl]",
            "meshwright predict run=embed files=[TEXTS.txt] output=vectors.npy",
        ),
        ("mesh", "launcher"),
    ),
    "inspect": Task(
        "Print the contents of a checkpoint: step, sizes, mesh, hashes, data position",
        ("run", "step", "format", "output_dir", "fake_devices"),
        (
            "meshwright inspect run=hello",
            "meshwright inspect run=hello step=60",
            "meshwright inspect run=hello format=json",
        ),
        ("mesh",),
    ),
    "convert": Task(
        "Convert a published checkpoint to a run, or a run to a published format",
        ("from", "to", "dtype", "max_shard_size_gb", "step", "tokenizer.chat_template", "model.dtype", "output_dir"),
        (
            "meshwright convert from=hf:FOLDER to=base",
            "meshwright convert from=tuned to=gguf:tuned.gguf dtype=q8_0",
            "meshwright convert from=tuned@500 to=hf:FOLDER",
        ),
        ("model", "tokenizer", "mesh"),
        ("output_dir", "fake_devices"),
    ),
    "runs": Task(
        "List the runs in a folder",
        ("output_dir", "format"),
        ("meshwright runs", "meshwright runs output_dir=s3://BUCKET/runs", "meshwright runs format=json"),
        (),
        ("output_dir",),
    ),
    "replay": Task(
        "Repeat the updates before a rollback and find the rows that caused the spike",
        ("run", "rollback", "rows", "format", "output_dir", "fake_devices"),
        (
            "meshwright replay run=hello",
            "meshwright replay run=hello rollback=120-0",
            "meshwright replay run=hello rows=10 format=json",
        ),
    ),
    "status": Task(
        "Print the state of the newest job of a run",
        ("run", "output_dir"),
        ("meshwright status run=hello", "meshwright status run=mine output_dir=DIR", "meshwright status"),
        (),
        ("run", "output_dir"),
    ),
    "logs": Task(
        "Print the log of the newest job of a run",
        ("run", "follow", "output_dir"),
        (
            "meshwright logs run=hello",
            "meshwright logs run=hello follow=true",
            "meshwright logs run=mine output_dir=DIR",
        ),
        (),
        ("run", "output_dir"),
    ),
    "stop": Task(
        "Stop the newest job of a run, with a checkpoint",
        ("run", "output_dir"),
        ("meshwright stop run=hello", "meshwright stop run=mine output_dir=DIR", "meshwright stop"),
        (),
        ("run", "output_dir"),
    ),
}  # fmt: skip

START = (
    ("meshwright train experiment=hello", "a small model, in two minutes"),
    ("meshwright generate run=hello prompt='def '", "generate text with it"),
    ("meshwright train source=[text] data.sources.text.paths=[DIR]", "train on your own folder"),
)


def overview() -> str:
    """Returns the list of tasks and commands to start with."""
    rows = [(name, task.summary) for name, task in TASKS.items()]
    return "\n".join(
        [
            "usage: meshwright TASK [KEY=VALUE ...]",
            "",
            *_table(rows),
            "",
            "Start with:",
            *_table(START),
            "",
            "More: meshwright TASK --help; --cfg job prints the composed config; -m runs several values.",
        ]
    )


def asks_for_help(words: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") or word.startswith("--help=") for word in words)


def topics_of(words: Sequence[str]) -> list[str]:
    """Returns the words after `--help`."""
    index = next(i for i, word in enumerate(words) if asks_for_help([word]))
    return [*words[index].partition("=")[2:], *words[index + 1 :]] if "=" in words[index] else list(words[index + 1 :])


def help_on(task: str, topics: Sequence[str]) -> str:
    """Returns the help of a task, or of the given topics. Raises: ValueError for an unknown topic."""
    if not topics:
        return screen(task)
    return "\n\n".join(_topic(task, topic) for topic in topics)


def screen(task: str) -> str:
    """Returns one screen of help: the most common keys of a task, its groups and examples."""
    about, default = TASKS[task], reference.default_options()
    lines = [f"usage: meshwright {task} [KEY=VALUE ...]", "", f"{about.summary}."]
    found = [_key(task, name) for name in about.keys]
    keys = [(key.path, _short(key.default), _sentence(key.doc)) for key in found]
    lines += ["", "Keys set most often, with their defaults:", *_table(keys)]
    if about.groups:
        lines += ["", "Groups, chosen by GROUP=OPTION (* is the default):"]
        rows = []
        for group in about.groups:
            mark = {default.get(group): "*"}
            rows.append((group, ", ".join(name + mark.get(name, "") for name in reference.option_names(group))))
        lines += _table(rows)
    lines += ["", "Examples:", *(f"  {example}" for example in about.examples)]
    some_group = next((group for group in ("optimizer", *about.groups) if group in about.groups), None)
    key = next((key for key in about.keys if key not in OF_RUN), about.keys[0])
    more = [(f"meshwright {task} --help {key}", "one key")]
    if some_group is not None:
        more.append((f"meshwright {task} --help {some_group}", "a group: its options and their keys"))
    more.append((f"meshwright {task} --help all", "every key"))
    return "\n".join([*lines, "", "More:", *_table(more)])


def _key(task: str, name: str) -> Key:
    """Returns one key of a task; parses only the modules that define it."""
    first = name.partition(".")[0]
    own = {key.path: key for key in reference.option_keys("task", task)}
    if name in own:
        return own[name]
    if first in reference.classes():
        return next(key for key in reference.option_keys(first, reference.default_options()[first]) if key.path == name)
    return reference.common_keys(name)[0]


def _candidates(task: str, name: str) -> Iterator[Key]:
    """Yields keys of a task that may be `name` or below it."""
    about = TASKS[task]
    yield from reference.option_keys("task", task)
    if about.shared is None or name.split(".")[0] in about.shared:
        yield from reference.common_keys(name)
    for group in about.groups:
        for option in reference.classes().get(group, {}):
            path = reference.package(group, option)
            if group != "sweep" and (f"{name}.".startswith(f"{path}.") or path.startswith(f"{name}.")):
                yield from reference.option_keys(group, option)


def keys_of_task(task: str) -> list[Key]:
    """Returns the keys that a task reads: its own, shared ones, and those of its groups."""
    about = TASKS[task]
    found = list(reference.option_keys("task", task))
    found += [key for key in reference.common_keys() if about.shared is None or key.path.split(".")[0] in about.shared]
    for group in about.groups:
        if group != "sweep":  # listed as keys of the task
            for option in reference.classes().get(group, {}):
                found += reference.option_keys(group, option)
    return found


def owners(name: str) -> list[str]:
    """Returns the tasks that have this key, or keys below it."""
    return [
        task
        for task in reference.tasks()
        if any(key.path == name or key.path.startswith(f"{name}.") for key in reference.option_keys("task", task))
    ]


def _topic(task: str, topic: str) -> str:
    name = topic.removeprefix("task.")
    if name == "all":
        return _entries(_merged(keys_of_task(task)))
    group, _, option = name.replace("=", ".").partition(".")
    if group in TASKS[task].groups:
        if not option:
            return _group(group)
        if option.strip("[]") in reference.option_names(group):
            return _option(group, option.strip("[]"))
    found = [key for key in _candidates(task, name) if key.path == name or key.path.startswith(f"{name}.")]
    if found:
        return _entries(_merged(found))
    known = keys_of_task(task)
    others = owners(name)
    if others:
        raise ValueError(f"--help {topic}: {name} is a key of {', '.join(others)}; `{task}` has no such key")
    words = [*dict.fromkeys([*TASKS[task].groups, *(part for key in known for part in _parents(key.path))]), "all"]
    near = difflib.get_close_matches(name, words, n=3, cutoff=0.6)
    near = near or [word for word in words if word.rsplit(".", 1)[-1] == name][:3]
    hint = (
        f"; did you mean {' or '.join(near)}?" if near else f"; `meshwright {task} --help` lists the most common keys"
    )
    raise ValueError(f"--help {topic}: no such key or group{hint}")


def _parents(path: str) -> Iterator[str]:
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _merged(keys: Iterable[Key]) -> list[tuple[Key, list[str]]]:
    """Deduplicates keys; returns each with the options that have it."""
    found: dict[tuple, tuple[Key, list[str]]] = {}
    for key in keys:
        same = (key.path, key.type, key.default, key.doc, key.choices, key.bounds)
        found.setdefault(same, (key, []))[1].append(key.option)
    return list(found.values())


def _group(group: str) -> str:
    choices, default = reference.options(group), reference.default_options().get(group)
    chosen = f"; default {default}" if default else ""
    example = f"{group}=[NAME,...]" if group in ("source", "tracker") else f"{group}=NAME"
    lines = [f"{group}: chosen by {example}{chosen}", "", *_choices(choices)]
    of_option = [reference.option_keys(group, option) for option in reference.classes().get(group, {})]
    if of_option:
        keys = [key for keys in of_option for key in _placed(group, keys)]
        merged = _merged(keys)
        shared = [pair for pair in merged if len(pair[1]) == len(of_option)]
        if shared:
            lines += ["", "Keys:" if len(of_option) == 1 else "Keys of every option:", "", _entries(shared)]
        for option in reference.classes()[group]:
            own = [pair for pair in merged if option in pair[1] and pair not in shared]
            if own:
                lines += ["", f"Keys of {group}={option}:", "", _entries([(key, []) for key, _ in own])]
    else:
        lines += ["", f"`meshwright train {group}=NAME --cfg job` prints the config composed with an option."]
    return "\n".join(lines)


def _placed(group: str, keys: Iterable[Key]) -> Iterator[Key]:
    """Yields keys with NAME in place of the option, for groups whose options have separate paths."""
    for key in keys:
        old, new = reference.package(group, key.option), reference.package(group, "NAME")
        yield Key(**{**vars(key), "path": key.path.replace(old, new, 1) if old else key.path})


def _option(group: str, option: str) -> str:
    choice = next(choice for choice in reference.options(group) if choice.name == option)
    keys = reference.option_keys(group, option)
    entries = ["", _entries(_merged(keys))] if keys else []
    return "\n".join([f"{group}={option}: {choice.doc}", *entries])


def _entries(keys: Sequence[tuple[Key, list[str]]]) -> str:
    return "\n".join(line for key, _ in keys for line in _entry(key))


def _entry(key: Key) -> list[str]:
    kind = key.type if not key.choices else f"{key.type}, from" if key.type.startswith("list") else ""
    allowed = f"{kind} {key.allowed}".strip() if key.choices else kind
    default = "required" if key.default == "required" else f"default {key.default}"
    head = ", ".join(part for part in (default, key.bounds) if part)
    lines = [key.path, *_filled(f"{allowed}; {head}", 4), *_filled(key.doc, 4)]
    for choice in key.choices:
        if choice.doc:
            lines += _filled(f"{choice.name}: {choice.doc}", 8)
    return lines


def _choices(choices: Sequence[Choice]) -> list[str]:
    return _table([(choice.name, choice.doc) for choice in choices])


def _filled(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=space, subsequent_indent=space + "  ", break_on_hyphens=False)


def _short(default: str) -> str:
    return default if len(default) <= 16 else default[:13] + "..."


def _sentence(doc: str) -> str:
    """Returns the text up to the first semicolon or full stop."""
    ends = [at for mark in ("; ", ". ") if (at := doc.find(mark)) > 0]
    return doc[: min(ends)] if ends else doc.rstrip(".")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Formats rows as aligned columns, indented by two; the last column is wrapped."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        head = "  " + "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False))
        wrapped = textwrap.wrap(
            row[-1], WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
        )
        lines += wrapped or [head.rstrip()]
    return lines
