"""The one order of all batches, and the way to any place in it.

Row i of the run is a formula of (seed, sources, i): the mixture picks the source, the source's epoch shuffles its
rows, the plan of packing says which documents they hold, and what a transform draws follows from i. Batch s is rows
[s B, (s + 1) B). Nothing is replayed to get anywhere, and hosts, workers and prefetching only decide who computes what,
and when.
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
_LAST = 2**48  # rows of a run: more than will ever be asked for


@dataclass
class DataConfig:
    batch_size: int = field(default=8, metadata={"min": 1})  # sequences of the global batch
    seq_len: int = field(default=256, metadata={"min": 1})  # tokens of a sequence
    packing: Packing = Packing.concat  # How documents fill rows
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    # Sampling weight of each source, in their order
    mixture_weights: list[float] = field(
        default_factory=list, metadata={"above": 0, "hint": "leave the source out of source=[...] instead"}
    )
    format: DataFormat = DataFormat.text  # What a record of a source is
    transform: TransformConfig = field(default_factory=TransformConfig)  # of documents, as they go into rows
    loss_mask: LossMask = LossMask.assistant  # of conversations
    on_overflow: OnOverflow = OnOverflow.truncate_turns  # conversations of more than seq_len tokens
    classes: list[str] = field(default_factory=list)  # of labelled records, in the order of their numbers
    # Of records that no example can be made of; with more, the run does not begin
    max_bad_fraction: float = field(default=0.1, metadata={"min": 0, "max": 1})
    shuffle: bool = True  # rows, anew in each epoch
    # refuse to train longer than so many passes over the data; null: as often as needed
    max_epochs: float | None = None
    prefetch: int = field(default=2, metadata={"min": 0})  # batches made ahead
    max_eval_batches: int = field(default=16, metadata={"min": 0})  # of held-out text from each source, at most; 0: all
    cache_dir: str | None = None  # the folder of token shards, or its URL; null: prepared/ in the folder of all runs

    def encoding(self, needs: DataNeeds = NO_NEEDS) -> EncodingConfig | None:
        """How records become examples for an objective with these needs; None where they are documents."""
        if self.format is DataFormat.text:
            return None
        made = (tuple(self.classes), needs.margins, needs.num_negatives)
        return EncodingConfig(self.loss_mask, self.on_overflow, self.seq_len, self.format, *made)


class PackedRows:
    """The rows of one corpus."""

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
        """The row as row `index` of the run: what a transform draws for it follows from that."""
        transform, growth = self.transform, self.growth

        def show(found: np.ndarray, piece: Piece, place: int) -> RowSlice:
            assert transform is not None
            choice = 0 if growth is None else growth.choice(piece.document, piece.start)
            return transform(found, piece.stop - piece.start, CounterRng(self.seed, int(index), place), choice)

        pieces = self.plan.pieces(int(row))
        return build_row(self.corpus, pieces, self.seq_len, None if transform is None else show)


class PairRows:
    """The rows of one corpus of texts that stand together: fields [S, L], the texts of a group one to each side.

    Of pairs 0 is chosen and 1 rejected. A row holds `per_row` groups at most: as segment n + 1 of every side the n-th.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, sides: int = 2, per_row: int = 1, valued: bool = False):
        self.corpus, self.seq_len, self.sides, self.per_row, self.valued = corpus, seq_len, sides, per_row, valued
        self.plan = None if per_row == 1 else PairPlan(corpus.lengths, seq_len, sides=sides, most=per_row)

    def __len__(self) -> int:
        return len(self.corpus.lengths) // self.sides if self.plan is None else self.plan.num_rows

    def __getitem__(self, row: int) -> TokenBatch | ColumnBatch:
        row = int(row)
        firsts = [self.sides * row] if self.plan is None else [piece.document for piece in self.plan.pieces(row)]
        whole = lambda text: Piece(text, 0, int(self.corpus.lengths[text]))
        sides = [[whole(first + side) for first in firsts] for side in range(self.sides)]
        made: TokenBatch = stack([build_row(self.corpus, pieces, self.seq_len) for pieces in sides])
        if not self.valued:
            return made
        margins = np.zeros(self.per_row, np.float32)
        margins[: len(firsts)] = self.corpus.values(firsts)
        return ColumnBatch(*made, {"margin": margins})

    def transform_row(self, row: int, index: int) -> TokenBatch | ColumnBatch:
        """The row: nothing is drawn for it."""
        return self[row]


class UnpairedRows(PairRows):
    """The rows of one corpus of answers: 0 the answer, 1 another one to the same prompt; column `label` [] f32."""

    def __getitem__(self, row: int) -> ColumnBatch:
        first, ends = 2 * int(row), self.corpus.lengths
        # The label stands after the last token of the answer, where nothing is learnt.
        sides = [[Piece(first, 0, int(ends[first]) - 1)], [Piece(first + 1, 0, int(ends[first + 1]))]]
        label = self.corpus.document(first, int(ends[first]) - 1, int(ends[first]))[0]
        tokens: TokenBatch = stack([build_row(self.corpus, pieces, self.seq_len) for pieces in sides])
        tokens.targets[0, int(ends[first]) - 2] = 0  # not a token
        return ColumnBatch(*tokens, {"label": np.float32(label)})


class RowsWithColumns:
    """Rows with what a table keeps of each."""

    def __init__(self, rows: PackedRows | PairRows, table: ColumnCache):
        self.rows, self.table = rows, table

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> ColumnBatch:
        found = self.rows[row]
        return ColumnBatch(*tokens_of(found), {**columns_of(found), **self.table[int(row)]})

    def transform_row(self, row: int, index: int) -> ColumnBatch:
        """The row: what is kept was asked of these very tokens, so nothing may be drawn for them."""
        return self[row]


Rows = PackedRows | PairRows | RowsWithColumns


def with_columns(rows: Mapping[str, Rows], tables: Mapping[str, ColumnCache]) -> dict[str, Rows]:
    """Rows by source; those of a source that has a table with what it keeps."""
    return {name: RowsWithColumns(found, tables[name]) if name in tables else found for name, found in rows.items()}


def make_rows(
    corpus: Corpus,
    config: DataConfig,
    seed: int,
    name: str,
    transform: Transform | None = None,
    needs: DataNeeds = NO_NEEDS,
) -> PackedRows | PairRows:
    """The rows of the source `name`, for an objective with these needs."""
    if config.format is DataFormat.unpaired_preference:
        return UnpairedRows(corpus, seq_len=config.seq_len)
    rules = config.encoding(needs)
    if rules is not None and rules.examples_per_record > 1:
        how = {"sides": rules.examples_per_record, "per_row": needs.pairs_per_row, "valued": rules.margins}
        return PairRows(corpus, seq_len=config.seq_len, **how)
    how = {"seq_len": config.seq_len, "packing": config.packing, "transform": transform}
    return PackedRows(corpus, **how, seed=source_seed(seed, name))


class Mixture:
    """All rows of a run, by index."""

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
        """`weights` None: by the tokens of each corpus; `tables`: what is kept of each source's rows.

        Raises: ValueError for a source without a whole row.
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
        further = {} if transform is None else {"transform": asdict(config.transform)}
        if needs.pairs_per_row > 1:
            further["pairs_per_row"] = needs.pairs_per_row
        self.fingerprint = _sha(
            {
                "corpora": {name: corpus.fingerprint for name, corpus in corpora.items()},
                "weights": self.weights,
                "seed": seed,
                "seq_len": config.seq_len,
                "packing": config.packing.name,
                "shuffle": config.shuffle,
            }
            | further
        )

    def locate(self, index: int) -> tuple[str, int]:
        """The source of row `index` and the row within its plan."""
        found = self._index[index]
        assert found is not None, "nothing is filtered out"
        return self.names[found[0]], found[1]

    def __getitem__(self, index: int) -> TokenBatch | ColumnBatch:
        name, row = self.locate(index)
        return self.rows[name].transform_row(row, index)

    def num_rows(self, epochs: float) -> int:
        """Rows until some source has been passed over `epochs` times."""
        return int(min(len(self.rows[name]) * epochs / self.weights[name] for name in self.names))


class _Tagged:
    """Puts the source's number beside a row number; a class, so that Grain can copy it to workers."""

    def __init__(self, source: int):
        self.source = source

    def __call__(self, row: int) -> tuple[int, int]:
        return self.source, int(row)


def source_seed(seed: int, name: str) -> int:
    """Each source shuffles by itself, whatever the others are."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stack(rows: Sequence[Any]) -> Any:
    """Rows of one kind of batch as that batch."""
    if not isinstance(rows[0], ColumnBatch):
        return type(rows[0])(*(np.stack(column) for column in zip(*rows, strict=True)))
    tokens = TokenBatch(*(np.stack(column) for column in zip(*(row[:5] for row in rows), strict=True)))
    return ColumnBatch(*tokens, {name: np.stack([row.columns[name] for row in rows]) for name in rows[0].columns})


def padding_row(row: Any) -> Any:
    """A row of padding, of the kind of `row`."""
    if not isinstance(row, ColumnBatch):
        return type(row)(*map(np.zeros_like, row))
    tokens = TokenBatch(*map(np.zeros_like, row[:5]))
    return ColumnBatch(*tokens, {name: np.zeros_like(value) for name, value in row.columns.items()})


class _LocalRows:
    """The rows that this process feeds, one after the other: position p is slot p mod R of step p div R."""

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
    """Batches of a mixture, made ahead in the background and placed on the mesh there."""

    def __init__(self, mixture: Mixture, *, batch_size: int, slots: Sequence[int], place: Place, prefetch: int):
        """`slots`: rows of the global batch that this process feeds."""
        self.mixture, self.batch_size, self.slots = mixture, batch_size, slots
        self.place, self.prefetch = place, prefetch
        self.next_index = 0  # row of the run with which the next batch begins
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
        read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # one thread, below: more only contend
        made = grain.MapDataset.source(rows).batch(len(self.slots), batch_fn=stack).to_iter_dataset(read)
        made = made.map(self.place)
        if self.prefetch:
            made = grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=self.prefetch)
        return iter(made)

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self.next_index, "fingerprint": self.mixture.fingerprint}

    def set_state(self, saved: dict[str, Any]) -> None:
        """Raises: ValueError where the data is no longer what the position counts."""
        if saved["fingerprint"] != self.mixture.fingerprint:
            raise ValueError(
                "data: sources, weights, tokenizer, packing, seq_len or seed are not those of the checkpoint, so its "
                "position says nothing about this data; set them back, or begin the data anew with reset=[data]"
            )
        self.skip_to(int(saved["next_index"]))

    def skip_to(self, row: int) -> None:
        """Moves to a row of the run."""
        self.close()
        self.next_index = row

    def global_batch(self) -> Any:
        """The whole next batch, of all processes, on the host."""
        return stack([self.mixture[self.next_index + slot] for slot in range(self.batch_size)])

    def close(self) -> None:
        if self._iterator is not None and (close := getattr(self._iterator, "close", None)) is not None:
            close()  # of the thread that makes batches ahead
        self._iterator = None


def batch_hash(batch: TokenBatch | ColumnBatch) -> str:
    """SHA-256 over every field of a batch in its canonical dtype, and every column in its own."""
    digest = hashlib.sha256()
    fields = [*zip(TokenBatch._fields, batch[:5], DTYPES, strict=True)]
    fields += [(name, value, value.dtype) for name, value in sorted(columns_of(batch).items())]
    for name, value, dtype in fields:
        array = np.ascontiguousarray(value, np.dtype(dtype).newbyteorder("<"))
        digest.update(f"{name}:{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def heldout_batches(
    rows: Rows, *, batch_size: int, slots: Sequence[int], max_batches: int, place: Place
) -> Iterator[Any]:
    """The first batches of held-out rows, always the same; what is missing in the last one is padding."""
    count = -(-len(rows) // batch_size)
    if max_batches:
        count = min(count, max_batches)
    nothing = padding_row(rows[0])
    for first in range(0, count * batch_size, batch_size):
        wanted = [first + int(slot) for slot in slots]
        yield place(stack([rows[i] if i < len(rows) else nothing for i in wanted]))
