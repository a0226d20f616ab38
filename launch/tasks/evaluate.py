"""`meshwright evaluate run=NAME`: loss on validation text or other sources, or multiple-choice accuracy."""

import dataclasses
import json
import math
from pathlib import Path

from configs.schema import RunConfig
from configs.tasks import EvaluateConfig, Format
from data.evaluation.multiple_choice import MultipleChoice, read_multiple_choice
from data.tokenizers.tokenizer import Tokenizer
from launch.build import build_evaluation
from launch.corpora import load_corpora
from launch.load_run import SavedRun, open_run
from launch.multihost import is_main_process, log
from models.config import AttentionMask
from trainer.console import progress_bar
from trainer.loglikelihood import Text, accuracy, make_score, score_texts


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints loss, perplexity, bits per byte and accuracy by source and overall, or multiple-choice scores."""
    task = config.task
    assert isinstance(task, EvaluateConfig)
    files = {
        Path(name).stem: read_multiple_choice(Path(name), limit=task.limit, limit_each=task.limit_per_group)
        for name in task.eval_tasks
    }
    saved = open_run(config, overrides, dtype=task.dtype)
    if not files:
        return evaluate_sources(saved, config, task)
    return evaluate_tasks(saved, files, prefix_ids(saved.tokenizer, task.prefix), task.format)


def evaluate_tasks(saved: SavedRun, files: dict[str, list[MultipleChoice]], prefix: list[int], form: Format) -> int:
    """Scores multiple-choice tasks by answer likelihood; prints a line per file as it completes."""
    texts = {name: task_texts(saved.tokenizer, problems, prefix) for name, problems in files.items()}
    width = max(map(len, files))
    longest = max(len(text.ids) for of_file in texts.values() for text in of_file)
    model, mesh = saved.core.model, saved.core.mesh
    if model.position.name == "learned" and longest > model.max_seq_len:
        raise ValueError(
            f"task.eval_tasks: an example has {longest} tokens, more than model.max_seq_len={model.max_seq_len}"
        )
    model.refuse_masks(
        AttentionMask.bidirectional, why="encoders assign no likelihood to text; evaluate them on sources"
    )
    prompts = model.attention.mask is AttentionMask.prefix
    score, params = make_score(saved.core.apply, constrain=saved.core.constrain, prefix=prompts), saved.params()
    found: dict[str, dict[str, float]] = {}
    if form is not Format.json:
        log(f"run {saved.folder.name!r} at step {saved.step}, {model.dtype.name}")
    for name, problems in files.items():
        with progress_bar(name, len(texts[name]), quiet=form is Format.json) as advance:
            flat = iter(score_texts(score, params, texts[name], rows_multiple=mesh.size, progress=advance))
        scores = [[next(flat) for _ in problem.options] for problem in problems]
        characters = [
            [len(option.continuation.removeprefix(" ")) for option in problem.options] for problem in problems
        ]
        found[name] = accuracy(scores, [problem.gold for problem in problems], characters)
        if form is not Format.json:
            values = (f"{key} {value:.4f}" for key, value in found[name].items() if key not in ("stderr", "n"))
            log(f"{name:{width}}  {', '.join(values)}; stderr {found[name]['stderr']:.4f}, n {found[name]['n']:,}")
    if form is Format.json and is_main_process():
        print(json.dumps({"run": saved.folder.name, "step": saved.step, "problems": found}, indent=2))
    return 0


def prefix_ids(tokenizer: Tokenizer, prefix: str | None) -> list[int]:
    """Returns the ids of `task.prefix`. Raises: ValueError if it is not a special token."""
    if prefix is None:
        return []
    if prefix not in tokenizer.special_tokens:
        known = ", ".join(sorted(tokenizer.special_tokens)[:8]) or "none"
        raise ValueError(f"task.prefix={prefix!r}: is not a special token of the run's tokenizer; available: {known}")
    return [tokenizer.special_tokens[prefix]]


def task_texts(tokenizer: Tokenizer, problems: list[MultipleChoice], prefix: list[int]) -> list[Text]:
    """Tokenizes context and continuation separately, so that every option splits at the same position."""
    texts = []
    for problem in problems:
        for context, continuation in problem.options:
            before = tokenizer.add_bos_token(tokenizer.encode(context)) or prefix
            ids = before + tokenizer.encode(continuation)
            texts.append(Text(ids, max(len(before), 1)))
    return texts


def evaluate_sources(saved: SavedRun, config: RunConfig, task: EvaluateConfig) -> int:
    data = dataclasses.replace(
        saved.config.data,
        max_eval_batches=task.max_eval_batches or saved.config.data.max_eval_batches,
        batch_size=saved.core.batch_size,
    )
    merged = dataclasses.replace(saved.config, data=data)
    quiet = task.format is Format.json
    corpora = load_corpora(merged, saved.folder, (lambda text: None) if quiet else log)
    if not corpora.validation:
        raise ValueError("data: no source has validation text; set data.sources.NAME.validation_fraction above 0")
    found = build_evaluation(merged, corpora, saved.core, saved.frozen())(saved.scored_params())
    if not is_main_process():
        return 0
    if quiet:
        print(json.dumps({"run": saved.folder.name, "step": saved.step, **found}, indent=2))
    else:
        print(f"run {saved.folder.name!r} at step {saved.step}")
        rewards = sorted({key.rpartition("/")[2] for key in found if "/reward_" in key})
        metrics = ("precision", "recall", "f1", "roc_auc", "reciprocal_rank", "similarity")
        columns = ("loss", "perplexity", "bits_per_byte", "accuracy", *metrics, *rewards, "tokens", "n")
        rows = {
            source or "all": {
                c: found[key] for c in columns if (key := f"eval/{source}/{c}".replace("//", "/")) in found
            }
            for source in [*corpora.validation, ""]
        }
        if not saved.config.objective.model_needs.is_token_level:
            rows = {name: {"n" if c == "tokens" else c: v for c, v in row.items()} for name, row in rows.items()}
        print_table("source", rows, columns)
    return 0


def print_table(label: str, rows: dict[str, dict[str, float]], columns: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column(label)
    shown = [column for column in columns if any(column in row for row in rows.values())]
    for column in shown:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in rows.items():
        cells = [
            "" if (v := row.get(c)) is None or math.isnan(v) else f"{v:,.0f}" if c in ("tokens", "n") else f"{v:.4f}"
            for c in shown
        ]
        table.add_row(name, *cells)
    Console().print(table)
