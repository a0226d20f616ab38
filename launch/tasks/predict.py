"""`meshwright predict run=NAME`: rewards, class probabilities or embeddings of texts.

Shape letters: N texts, O outputs (1 for a reward model; the number of classes; the embedding width).
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.schema import RunConfig
from configs.tasks import PredictConfig
from data.batch import TokenBatch
from data.records.chat_formats import Conversation, InvalidRecord, find_format, to_conversation
from data.records.encoding import EncodingConfig, OnOverflow, encode_full_text
from data.records.record import BadRecords
from data.sources.readers import JsonlConfig
from data.tokenizers.tokenizer import Tokenizer
from launch.load_run import SavedRun, open_run
from launch.multihost import is_main_process, log, sync_processes
from trainer.console import progress_bar

Input = Conversation | str
LENGTH_MULTIPLE = 32  # row lengths are padded to multiples of it, to limit recompilation


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints one JSON object per text, or writes `task.output`: .jsonl, or .npy with an array [N, O]."""
    task = config.task
    assert isinstance(task, PredictConfig)
    if task.output is not None and Path(task.output).suffix not in (".jsonl", ".npy"):
        raise ValueError(f"task.output={task.output}: must end in .jsonl or .npy")
    if task.batch_size < 1:
        raise ValueError(f"task.batch_size={task.batch_size}: must be at least 1")
    inputs = [*task.texts, *(one for name in task.files for one in read_file(Path(name)))]
    if not inputs:
        raise ValueError("predict: give texts with task.texts=['...'] or files with task.files=[FILE.txt,FILE.jsonl]")
    saved = open_run(config, overrides)
    objective = saved.core.objective
    if saved.config.objective.model_needs.is_token_level:
        raise ValueError(
            f"run={saved.folder.name}: its objective, {saved.config.objective.kind}, does not score texts; train a run "
            "with phase=reward, classify or embed"
        )
    found_NO = compute_outputs(saved, objective, inputs, task.batch_size)
    if is_main_process():
        write_found(found_NO, objective, saved.config.data.classes, task.output)
    sync_processes("predicted")
    return 0


def read_file(path: Path) -> Iterator[Input]:
    """Yields a text per line; from .jsonl, texts or conversations. Raises: ValueError naming an invalid line."""
    if not path.is_file():
        raise ValueError(f"task.files: {path} does not exist")
    if path.suffix != ".jsonl":
        yield from (line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        return
    source, bad = JsonlConfig(paths=[str(path)]), BadRecords()
    for unit in source.units():
        for record in source.records(unit, bad):
            try:
                yield to_conversation(record.fields, find_format(record.fields))
            except InvalidRecord as error:
                raise ValueError(f"task.files: {path}, {record.where}: {error.reason}") from None
    for reason, entry in bad.found.get(str(path), {}).items():
        raise ValueError(f"task.files: {path}, {entry['first']}: {reason}")


def compute_outputs(saved: SavedRun, objective: Any, inputs: list[Input], batch_size: int) -> np.ndarray:
    """Returns outputs [N, O] f32 in input order; batches texts of similar length."""
    core, data = saved.core, saved.config.data
    rules = EncodingConfig(data.loss_mask, OnOverflow.truncate, data.seq_len, data.format)
    ids = [encoded(saved.tokenizer, one, rules, index) for index, one in enumerate(inputs)]
    rows = math.ceil(batch_size / core.mesh.size) * core.mesh.size
    read = jax.jit(lambda params, batch: objective.read(core.apply, params, batch))
    params, order = saved.params(), sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found: dict[int, np.ndarray] = {}
    with progress_bar("predicting", len(ids)) as advance:
        for first in range(0, len(order), rows):
            indices = order[first : first + rows]
            batch = padded([ids[i] for i in indices], rows)
            found |= zip(indices, np.asarray(read(params, batch)), strict=False)
            advance(len(indices))
    return np.stack([found[i] for i in range(len(ids))])


def encoded(tokenizer: Tokenizer, text: Input, rules: EncodingConfig, index: int) -> np.ndarray:
    try:
        return encode_full_text(tokenizer, text, rules).ids
    except InvalidRecord as error:
        raise ValueError(f"predict: text {index + 1}: {error.reason}") from None


def padded(ids: list[np.ndarray], rows: int) -> TokenBatch:
    """Pads each text to a row; adds empty rows up to `rows`."""
    length = math.ceil(max(map(len, ids)) / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    tokens, segments = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row, of_text in enumerate(ids):
        tokens[row, : len(of_text)], segments[row, : len(of_text)] = of_text, 1
    positions = np.where(segments > 0, np.arange(length, dtype=np.int32)[None], 0)
    return TokenBatch(tokens, np.zeros_like(tokens), np.zeros(tokens.shape, np.float32), segments, positions)


def write_found(found_NO: np.ndarray, objective: Any, classes: list[str], output: str | None) -> None:
    if output is not None and Path(output).suffix == ".npy":
        np.save(output, found_NO, allow_pickle=False)
        log(f"{output}: {found_NO.shape[0]:,} rows of {found_NO.shape[1]:,}")
        return
    lines = [json.dumps(as_object(row, objective, classes), ensure_ascii=False) for row in found_NO]
    if output is None:
        print("\n".join(lines))
    else:
        Path(output).write_text("\n".join(lines) + "\n", encoding="utf-8")
        log(f"{output}: {len(lines):,} lines")


def as_object(row: np.ndarray, objective: Any, classes: list[str]) -> dict[str, Any]:
    values = [round(float(value), 6) for value in row]
    return objective.describe_output(values, classes)
