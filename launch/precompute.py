"""Precomputes the outputs of a frozen model (reference, teacher) per row and caches them on disk.

Training then does not hold that model in memory. A table holds one split of one source. Its folder, in `cached/` next
to the prepared data, is named by a hash of everything that the values depend on: weights, tokenizer, data, lengths,
settings.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from configs.schema import RunConfig
from data.column_cache import ColumnCache
from data.loader import Rows, make_rows, padding_row, stack
from data.tokenize_shards import TokenCorpus
from data.tokenizers.tokenizer import fingerprint
from launch.build import Core
from launch.corpora import Corpora, prepared_root, prepared_url
from launch.multihost import Say, is_main_process, sync_processes
from launch.weights_source import model_digest
from trainer.console import progress_bar
from trainer.sharding import replicated

VERSION = 1
_FLUSH = 30.0  # seconds between records of a table's progress


@dataclass(frozen=True)
class Tables:
    """Tables of both splits, by source."""

    train: dict[str, ColumnCache]
    validation: dict[str, ColumnCache]

    @property
    def all(self) -> list[ColumnCache]:
        return [*self.train.values(), *self.validation.values()]

    @property
    def complete(self) -> bool:
        return all(table.complete for table in self.all)


NO_TABLES = Tables({}, {})


def open_tables(config: RunConfig, core: Core, corpora: Corpora, record: Mapping[str, str]) -> Tables:
    """Opens the tables of the frozen model described by `record`, complete or not.

    Raises: ValueError if a folder holds a table with a different key.
    """
    open_all = lambda split, of: {name: _open(config, core, corpora, record, split, name, of[name]) for name in of}
    return Tables(open_all("train", corpora.train), open_all("validation", corpora.validation))


def fill_tables(
    config: RunConfig, core: Core, corpora: Corpora, frozen: Mapping[str, Any], record: Mapping[str, str], say: Say
) -> Tables:
    """Computes the outputs for all missing rows; an interrupted pass resumes where it stopped."""
    if prepared_url(config) and jax.process_count() > 1:
        raise ValueError(
            f"data.cache_dir={config.data.cache_dir}: cached outputs of the {precomputed(config)} model must be "
            "on a disk that all processes share, not in an object store; set data.cache_dir to a folder on such a disk"
        )
    tables, role, objective = open_tables(config, core, corpora, record), precomputed(config), core.objective
    shapes = replicated(core.mesh)
    compute = jax.jit(lambda frozen, batch: objective.columns(core.apply, frozen, batch), out_shardings=shapes)
    for split, corpora_of in (("train", corpora.train), ("validation", corpora.validation)):
        shown = "train" if split == "train" else "validation"
        for name, corpus in corpora_of.items():
            table = (tables.train if split == "train" else tables.validation)[name]
            if not table.complete:
                start, started = table.filled, time.monotonic()
                _fill(table, _rows(config, corpus, name), core, compute, frozen, f"{name}, {shown}")
                size = sum(file.stat().st_size for file in table.folder.glob("*.npy")) if is_main_process() else 0
                rows, seconds = table.num_rows - start, time.monotonic() - started
                done = f"precomputed {rows:,} rows of {name} ({shown}) in {seconds:.0f} s"
                say(f"{role}: {done}; {size / 1e6:,.1f} MB in {table.folder}")
    sync_processes("tables filled")
    return open_tables(config, core, corpora, record)


def precomputed(config: RunConfig) -> str:
    """Returns the role of the frozen model whose outputs are cached."""
    role = config.objective.frozen_needs.precomputed
    assert role is not None
    return role


def _rows(config: RunConfig, corpus: TokenCorpus, name: str) -> Rows:
    return make_rows(corpus, config.data, config.seed, name, needs=config.objective.data_needs)


def _open(
    config: RunConfig,
    core: Core,
    corpora: Corpora,
    record: Mapping[str, str],
    split: str,
    name: str,
    corpus: TokenCorpus,
) -> ColumnCache:
    objective, data, role = core.objective, config.data, precomputed(config)
    num_rows = len(_rows(config, corpus, name))
    if split == "validation" and data.max_eval_batches:
        num_rows = min(num_rows, data.max_eval_batches * core.batch_size)
    key = {
        "version": VERSION,
        "kind": role,
        "weights": record["sha256"],
        "model": record.get("model") or model_digest(core.model),
        "tokenizer": fingerprint(corpora.tokenizer),
        "corpus": corpus.fingerprint,
        "source": name,
        "records": data.format.name,
        "seq_len": data.seq_len,
        "packing": data.packing.name,
        "seed": config.seed,
        "rows": num_rows,
        "settings": objective.column_settings(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = prepared_root(config) / "cached" / f"{name}-{split}-{role}-{digest}"
    return ColumnCache(folder, key, num_rows, dict(objective.column_spec(data.seq_len)))


def _fill(table: ColumnCache, rows: Rows, core: Core, compute: Any, frozen: Mapping[str, Any], label: str) -> None:
    start = table.filled  # read in all processes before process 0 writes
    sync_processes("table opened")
    if is_main_process():
        table.open_for_writing()
    size, padding = core.batch_size, padding_row(rows[0])
    flushed = time.monotonic()
    with progress_bar(f"precomputing {label}", table.num_rows, quiet=not is_main_process()) as advance:
        for first in range(start, table.num_rows, size):
            indices = [first + int(slot) for slot in core.rows]
            batch = core.place(stack([rows[i] if i < len(rows) else padding for i in indices]))
            found = compute(frozen, batch)
            if is_main_process():
                table.write(first, {key: np.asarray(value.addressable_data(0)) for key, value in found.items()})
                if time.monotonic() - flushed > _FLUSH:
                    table.flush()
                    flushed = time.monotonic()
            advance(min(first + size, table.num_rows))
    if is_main_process():
        table.flush()
