"""Deterministic data loader with random access to any step.

Row i of a run is a pure function of (seed, sources, i): the mixture selects the source, the source's epoch shuffles its
rows, the packing plan assigns documents to rows, and random draws of a transform are keyed by i. Batch s consists of
rows [s B, (s + 1) B). Resuming replays nothing. Hosts, workers and prefetching affect only where and when a row is
computed, never its contents.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data.batch import DTYPES, ColumnBatch, TokenBatch, columns_of, tokens_of
from data.column_cache import ColumnCache
from data.packing import Corpus, CounterRng, Packing, PairPlan, Piece, RowSlice, TransformLengths, build_row, make_plan
from data.records.encoding import NO_NEEDS, DataFormat, DataNeeds, EncodingConfig, LossMask, OnOverflow
from data.sources.readers import SourceConfig
from data.transforms import Transform, TransformConfig

Place = Callable[[TokenBatch], Any]
_LAST = 2**48  # upper bound on the rows of a run


@dataclass
class DataConfig:
    batch_size: int = field(default=8, metadata={"min": 1})  # global batch size, in sequences
    seq_len: int = field(default=256, metadata={"min": 1})  # sequence length, in tokens
    packing: Packing = Packing.concat  # concat: documents back to back; best_fit: uncut documents, a little padding
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # data sources of the mixture, by name
    # sampling weight of each source, in the order of sources
    mixture_weights: list[float] = field(
        default_factory=list, metadata={"above": 0, "hint": "leave the source out of source=[...] instead"}
    )
    format: DataFormat = DataFormat.text  # record type of all sources
    transform: TransformConfig = field(default_factory=TransformConfig)  # corruption or masking applied to documents
    loss_mask: LossMask = LossMask.assistant  # tokens of a conversation that contribute to the loss
    on_overflow: OnOverflow = OnOverflow.truncate_turns  # handling of conversations longer than seq_len tokens
    classes: list[str] = field(default_factory=list)  # class names for classification, in label order
    # maximum fraction of unusable records; the run fails above it
    max_bad_fraction: float = field(default=0.1, metadata={"min": 0, "max": 1})
    shuffle: bool = True  # shuffle rows in every epoch
    max_epochs: float | None = None  # maximum passes over the data; the run fails above it; null: unlimited
    # batches prepared in advance; 0 disables prefetching
    prefetch: int = field(default=2, metadata={"min": 0})
    # maximum validation batches per source; 0: all
    max_eval_batches: int = field(default=16, metadata={"min": 0})
    cache_dir: str | None = None  # folder or URL of the token shards; null: prepared/ in output_dir

    def encoding(self, needs: DataNeeds = NO_NEEDS) -> EncodingConfig | None:
        """Returns the encoding of records as examples for an objective with these needs; None for plain documents."""
        if self.format is DataFormat.text:
            return None
        made = (tuple(self.classes), needs.margins, needs.num_negatives)
        return EncodingConfig(self.loss_mask, self.on_overflow, self.seq_len, self.format, *made)


class PackedRows:
    """Packed rows of one corpus."""

    def __init__(
        self, corpus: Corpus, *, seq_len: int, packing: Packing, seed: int, transform: Transform | None = None
    ):
        self.corpus, self.seq_len, self.seed, self.transform = corpus, seq_len, seed, transform
        table = None if transform is None else transform.growth
        self.growth = None if table is None else TransformLengths(table, seed)
        self.plan = make_plan(corpus.lengths, seq_len=seq_len, packing=packing, seed=seed, growth=self.growth)

    def __len__(self) -> int:
        return self.plan.num_rows

    def __getitem__(self, row: int) -> TokenBatch:
        return self.transform_row(row, row)

    def transform_row(self, row: int, index: int) -> TokenBatch:
        """Builds the row as row `index` of the run, which keys the random draws of the transform."""
        transform, growth = self.transform, self.growth

        def show(found: np.ndarray, piece: Piece, slot: int) -> RowSlice:
            assert transform is not None
            choice = 0 if growth is None else growth.choice(piece.document, piece.start)
            return transform(found, piece.stop - piece.start, CounterRng(self.seed, int(index), slot), choice)

        pieces = self.plan.pieces(int(row))
        return build_row(self.corpus, pieces, self.seq_len, None if transform is None else show)


class PairRows:
    """Rows of a corpus of text groups: fields [S, L], one side per text of the group.

    For preference pairs side 0 is chosen and side 1 rejected. A row holds at most `per_row` groups; group n is segment
    n + 1 of every side.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, sides: int = 2, per_row: int = 1, valued: bool = False):
        self.corpus, self.seq_len, self.sides, self.per_row, self.valued = corpus, seq_len, sides, per_row, valued
        self.plan = None if per_row == 1 else PairPlan(corpus.lengths, seq_len, sides=sides, most=per_row)

    def __len__(self) -> int:
        return len(self.corpus.lengths) // self.sides if self.plan is None else self.plan.num_rows

    def __getitem__(self, row: int) -> TokenBatch | ColumnBatch:
        row = int(row)
        firsts = [self.sides * row] if self.plan is None else [piece.document for piece in self.plan.pieces(row)]
        uncut = lambda text: Piece(text, 0, int(self.corpus.lengths[text]))
        sides = [[uncut(first + side) for first in firsts] for side in range(self.sides)]
        made: TokenBatch = stack([build_row(self.corpus, pieces, self.seq_len) for pieces in sides])
        if not self.valued:
            return made
        margins = np.zeros(self.per_row, np.float32)
        margins[: len(firsts)] = self.corpus.values(firsts)
        return ColumnBatch(*made, {"margin": margins})

    def transform_row(self, row: int, index: int) -> TokenBatch | ColumnBatch:
        """Returns the row: groups take no transform."""
        return self[row]


class UnpairedRows(PairRows):
    """Rows of unpaired preferences: side 0 the completion, side 1 a mismatched one; column `label` [] f32."""

    def __getitem__(self, row: int) -> ColumnBatch:
        first, ends = 2 * int(row), self.corpus.lengths
        # The label is stored after the last token of the completion and is masked out of the loss.
        sides = [[Piece(first, 0, int(ends[first]) - 1)], [Piece(first + 1, 0, int(ends[first + 1]))]]
        label = self.corpus.document(first, int(ends[first]) - 1, int(ends[first]))[0]
        tokens: TokenBatch = stack([build_row(self.corpus, pieces, self.seq_len) for pieces in sides])
        tokens.targets[0, int(ends[first]) - 2] = 0  # the label is not a token
        return ColumnBatch(*tokens, {"label": np.float32(label)})


class RowsWithColumns:
    """Rows with their cached columns."""

    def __init__(self, rows: PackedRows | PairRows, table: ColumnCache):
        self.rows, self.table = rows, table

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> ColumnBatch:
        found = self.rows[row]
        return ColumnBatch(*tokens_of(found), {**columns_of(found), **self.table[int(row)]})

    def transform_row(self, row: int, index: int) -> ColumnBatch:
        """Returns the row untransformed: the cached columns were computed on exactly these tokens."""
        return self[row]


Rows = PackedRows | PairRows | RowsWithColumns


def with_columns(rows: Mapping[str, Rows], tables: Mapping[str, ColumnCache]) -> dict[str, Rows]:
    """Attaches cached columns to the rows of the sources that have them."""
    return {name: RowsWithColumns(found, tables[name]) if name in tables else found for name, found in rows.items()}


def make_rows(
    corpus: Corpus,
    config: DataConfig,
    seed: int,
    name: str,
    transform: Transform | None = None,
    needs: DataNeeds = NO_NEEDS,
) -> PackedRows | PairRows:
    """Builds the rows of the source `name`, for an objective with these needs."""
    if config.format is DataFormat.unpaired_preference:
        return UnpairedRows(corpus, seq_len=config.seq_len)
    encoding = config.encoding(needs)
    if encoding is not None and encoding.examples_per_record > 1:
        how = {"sides": encoding.examples_per_record, "per_row": needs.pairs_per_row, "valued": encoding.margins}
        return PairRows(corpus, seq_len=config.seq_len, **how)
    how = {"seq_len": config.seq_len, "packing": config.packing, "transform": transform}
    return PackedRows(corpus, **how, seed=source_seed(seed, name))


class Mixture:
    """Random access to all rows of a run, mixed from its sources."""

    def __init__(
        self,
        corpora: Mapping[str, Corpus],
        config: DataConfig,
        seed: int,
        weights: Mapping[str, float] | None = None,
        *,
        tables: Mapping[str, ColumnCache] | None = None,
        transform: Transform | None = None,
        needs: DataNeeds = NO_NEEDS,
    ):
        """`weights` None: proportional to the tokens of each corpus. `tables`: cached columns by source.

        Raises: ValueError if a source has no rows.
        """
        import grain

        self.names = list(corpora)
        rows = {name: make_rows(corpus, config, seed, name, transform, needs) for name, corpus in corpora.items()}
        self.rows = with_columns(rows, tables or {})
        for name, rows in self.rows.items():
            if not len(rows):
                raise ValueError(f"data.sources.{name}: has no tokens to train on")
        tokens = {name: float(corpus.lengths.sum()) for name, corpus in corpora.items()}
        given = dict(weights) if weights else tokens
        total = sum(given.values())
        self.weights = {name: given[name] / total for name in self.names}
        parts = []
        for index, (name, rows) in enumerate(self.rows.items()):
            part = grain.MapDataset.range(len(rows)).seed(source_seed(seed, name) % 2**32)
            part = (part.shuffle() if config.shuffle else part).repeat(None)
            parts.append(part.map(_Tagged(index)))
        self._index = grain.MapDataset.mix(parts, [self.weights[n] for n in self.names]) if len(parts) > 1 else parts[0]
        extra = {} if transform is None else {"transform": asdict(config.transform)}
        if needs.pairs_per_row > 1:
            extra["pairs_per_row"] = needs.pairs_per_row
        self.fingerprint = _sha(
            {
                "corpora": {name: corpus.fingerprint for name, corpus in corpora.items()},
                "weights": self.weights,
                "seed": seed,
                "seq_len": config.seq_len,
                "packing": config.packing.name,
                "shuffle": config.shuffle,
            }
            | extra
        )

    def locate(self, index: int) -> tuple[str, int]:
        """Returns the source of row `index` and the row number within that source's plan."""
        found = self._index[index]
        assert found is not None, "no row is filtered out"
        return self.names[found[0]], found[1]

    def __getitem__(self, index: int) -> TokenBatch | ColumnBatch:
        name, row = self.locate(index)
        return self.rows[name].transform_row(row, index)

    def num_rows(self, epochs: float) -> int:
        """Returns the number of rows until the first source completes `epochs` epochs."""
        return int(min(len(self.rows[name]) * epochs / self.weights[name] for name in self.names))


class _Tagged:
    """Pairs a row number with its source index; a class, so that Grain can pickle it for workers."""

    def __init__(self, source: int):
        self.source = source

    def __call__(self, row: int) -> tuple[int, int]:
        return self.source, int(row)


def source_seed(seed: int, name: str) -> int:
    """Returns the shuffle seed of a source, independent of the other sources."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stack(rows: Sequence[Any]) -> Any:
    """Stacks rows into a batch of their type."""
    if not isinstance(rows[0], ColumnBatch):
        return type(rows[0])(*(np.stack(column) for column in zip(*rows, strict=True)))
    tokens = TokenBatch(*(np.stack(column) for column in zip(*(row[:5] for row in rows), strict=True)))
    return ColumnBatch(*tokens, {name: np.stack([row.columns[name] for row in rows]) for name in rows[0].columns})


def padding_row(row: Any) -> Any:
    """Returns a padding row with the type and shapes of `row`."""
    if not isinstance(row, ColumnBatch):
        return type(row)(*map(np.zeros_like, row))
    tokens = TokenBatch(*map(np.zeros_like, row[:5]))
    return ColumnBatch(*tokens, {name: np.zeros_like(value) for name, value in row.columns.items()})


class _LocalRows:
    """Rows fed by this process, in order: with R slots, position p is slot p mod R of step p // R."""

    def __init__(self, mixture: Mixture, first: int, batch_size: int, slots: Sequence[int]):
        self.mixture, self.first, self.batch_size, self.slots = (
            mixture,
            first,
            batch_size,
            [int(s) for s in slots],
        )

    def __len__(self) -> int:
        return _LAST

    def __getitem__(self, position: int) -> TokenBatch | ColumnBatch:
        step, slot = divmod(int(position), len(self.slots))
        return self.mixture[self.first + step * self.batch_size + self.slots[slot]]


class TokenLoader:
    """Batches of a mixture, prefetched and placed on the mesh in a background thread."""

    def __init__(self, mixture: Mixture, *, batch_size: int, slots: Sequence[int], place: Place, prefetch: int):
        """`slots`: rows of the global batch fed by this process."""
        self.mixture, self.batch_size, self.slots = mixture, batch_size, slots
        self.place, self.prefetch = place, prefetch
        self.next_index = 0  # first row of the next batch
        self._iterator: Iterator[Any] | None = None

    def next_batch(self, state: Any = None) -> Any:
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self.next_index += self.batch_size
        return batch

    def _open(self) -> Iterator[Any]:
        import grain

        rows = _LocalRows(self.mixture, self.next_index, self.batch_size, self.slots)
        read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the one prefetch thread below is enough
        made = grain.MapDataset.source(rows).batch(len(self.slots), batch_fn=stack).to_iter_dataset(read)
        made = made.map(self.place)
        if self.prefetch:
            made = grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=self.prefetch)
        return iter(made)

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self.next_index, "fingerprint": self.mixture.fingerprint}

    def set_state(self, saved: dict[str, Any]) -> None:
        """Restores the position. Raises: ValueError if the data differs from the checkpoint's."""
        if saved["fingerprint"] != self.mixture.fingerprint:
            raise ValueError(
                "data: sources, weights, tokenizer, packing, seq_len or seed differ from the checkpoint, so its data "
                "position does not apply; restore the old settings, or restart the data with reset=[data]"
            )
        self.skip_to(int(saved["next_index"]))

    def skip_to(self, row: int) -> None:
        """Moves to a row of the run."""
        self.close()
        self.next_index = row

    def global_batch(self) -> Any:
        """Builds the next global batch, the rows of all processes, on the host."""
        return stack([self.mixture[self.next_index + slot] for slot in range(self.batch_size)])

    def close(self) -> None:
        if self._iterator is not None and (close := getattr(self._iterator, "close", None)) is not None:
            close()  # stops the prefetch thread
        self._iterator = None


def batch_hash(batch: TokenBatch | ColumnBatch) -> str:
    """Returns the SHA-256 of a batch: fields in their canonical dtype, columns in their own."""
    digest = hashlib.sha256()
    fields = [*zip(TokenBatch._fields, batch[:5], DTYPES, strict=True)]
    fields += [(name, value, value.dtype) for name, value in sorted(columns_of(batch).items())]
    for name, value, dtype in fields:
        array = np.ascontiguousarray(value, np.dtype(dtype).newbyteorder("<"))
        digest.update(f"{name}:{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def validation_batches(
    rows: Rows, *, batch_size: int, slots: Sequence[int], max_batches: int, place: Place
) -> Iterator[Any]:
    """Yields the first validation batches, always the same; the last one is filled with padding rows."""
    count = -(-len(rows) // batch_size)
    if max_batches:
        count = min(count, max_batches)
    padding = padding_row(rows[0])
    for first in range(0, count * batch_size, batch_size):
        wanted = [first + int(slot) for slot in slots]
        yield place(stack([rows[i] if i < len(rows) else padding for i in wanted]))
