"""What a frozen model says of each row, asked once before training and kept on disk: then no run holds that model.

A table belongs to one split of one source and to a key of all that its numbers depend on, which names its folder in
`cached/` beside the prepared text: other weights, tokenizer, text, lengths or settings, another table.
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
from launch.build import Core, Corpora, Say, is_main_process, prepared_root, prepared_url, sync_processes
from launch.weights_source import model_digest
from trainer.console import progress_bar
from trainer.mesh import replicated

VERSION = 1
_FLUSH = 30.0  # seconds between notes of how far a table is filled


@dataclass(frozen=True)
class Tables:
    """By source."""

    train: dict[str, ColumnCache]
    heldout: dict[str, ColumnCache]

    @property
    def all(self) -> list[ColumnCache]:
        return [*self.train.values(), *self.heldout.values()]

    @property
    def complete(self) -> bool:
        return all(table.complete for table in self.all)


NO_TABLES = Tables({}, {})


def open_tables(config: RunConfig, core: Core, corpora: Corpora, record: Mapping[str, str]) -> Tables:
    """The tables of a frozen model that a checkpoint would describe by `record`, filled or not.

    Raises: ValueError where a folder holds another table than its name says.
    """
    open_all = lambda split, of: {name: _open(config, core, corpora, record, split, name, of[name]) for name in of}
    return Tables(open_all("train", corpora.train), open_all("heldout", corpora.heldout))


def fill_tables(
    config: RunConfig, core: Core, corpora: Corpora, frozen: Mapping[str, Any], record: Mapping[str, str], say: Say
) -> Tables:
    """Asks the model about every row that is not there yet; a pass that was cut off goes on where it was."""
    if prepared_url(config) and jax.process_count() > 1:
        raise ValueError(
            f"data.cache_dir={config.data.cache_dir}: outputs of the {precomputed(config)} model are read by all "
            "processes from a disk that they share, and not from a store; name a folder of such a disk"
        )
    tables, role, objective = open_tables(config, core, corpora, record), precomputed(config), core.objective
    shapes = replicated(core.mesh)
    ask = jax.jit(lambda frozen, batch: objective.columns(core.apply, frozen, batch), out_shardings=shapes)
    for split, corpora_of in (("train", corpora.train), ("heldout", corpora.heldout)):
        for name, corpus in corpora_of.items():
            table = (tables.train if split == "train" else tables.heldout)[name]
            if not table.complete:
                start, began = table.filled, time.monotonic()
                _fill(table, _rows(config, corpus, name), core, ask, frozen, f"{name}, {split}")
                size = sum(file.stat().st_size for file in table.folder.glob("*.npy")) if is_main_process() else 0
                rows, seconds = table.num_rows - start, time.monotonic() - began
                said = f"asked about {rows:,} rows of {name} ({split}) in {seconds:.0f} s"
                say(f"{role}: {said}; {size / 1e6:,.1f} MB in {table.folder}")
    sync_processes("tables filled")
    return open_tables(config, core, corpora, record)


def precomputed(config: RunConfig) -> str:
    """The role of the frozen model whose outputs are stored."""
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
    if split == "heldout" and data.max_eval_batches:
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


def _fill(table: ColumnCache, rows: Rows, core: Core, ask: Any, frozen: Mapping[str, Any], what: str) -> None:
    start = table.filled  # the same in all processes, before one of them writes
    sync_processes("table looked at")
    if is_main_process():
        table.begin()
    size, nothing = core.batch_size, padding_row(rows[0])
    noted = time.monotonic()
    with progress_bar(f"asking about {what}", table.num_rows, quiet=not is_main_process()) as advance:
        for first in range(start, table.num_rows, size):
            wanted = [first + int(slot) for slot in core.rows]
            batch = core.place(stack([rows[i] if i < len(rows) else nothing for i in wanted]))
            found = ask(frozen, batch)
            if is_main_process():
                table.write(first, {key: np.asarray(value.addressable_data(0)) for key, value in found.items()})
                if time.monotonic() - noted > _FLUSH:
                    table.flush()
                    noted = time.monotonic()
            advance(min(first + size, table.num_rows))
    if is_main_process():
        table.flush()
