"""Packs documents into rows of equal length; the plan is a pure function of (corpus, seed, seq_len, packing).

Rows are planned once, over the shuffled documents; each epoch then shuffles the rows. Packed documents do not attend
to each other, so the assignment to rows does not change what a model computes. If a transform (`data/transforms.py`)
lengthens a piece, the plan cuts and packs by the transformed length.

Shape letters: L row length, C transform choices.
"""

import bisect
import enum
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from data.batch import TokenBatch

WINDOW = 8192  # documents that best fit packs at a time


class Packing(enum.Enum):
    concat = "concat"  # documents back to back, cut at row boundaries: no padding
    best_fit = "best_fit"  # documents stay intact unless longer than a row: little padding


class Corpus(Protocol):
    fingerprint: str
    lengths: np.ndarray

    def document(self, index: int, start: int, stop: int) -> np.ndarray: ...

    def loss_mask(self, index: int, start: int, stop: int) -> np.ndarray | None: ...

    def values(self, indices: Sequence[int]) -> np.ndarray: ...


class Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


class RowSlice(NamedTuple):
    """Row contents made from one piece; the three arrays have equal length."""

    tokens: np.ndarray  # i32
    targets: np.ndarray  # i32
    mask: np.ndarray  # f32


# (tokens of the piece plus the next one, the piece, its index in the row) -> row contents
ShowSlice = Callable[[np.ndarray, Piece, int], RowSlice]


class Plan(Protocol):
    """Assignment of pieces to rows."""

    num_rows: int

    def pieces(self, row: int) -> list[Piece]: ...


def hashed(seed: int, count: int) -> np.ndarray:
    """Returns [count] u64: SplitMix64 of (seed, i), identical on every platform and version."""
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64) + np.uint64(1)
        x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed & (2**64 - 1)) * np.uint64(0xD1342543DE82EF95)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))


def shuffled(seed: int, count: int) -> np.ndarray:
    """Returns a permutation of range(count)."""
    return np.argsort(hashed(seed, count), kind="stable")


def fold_seed(*parts: int) -> int:
    """Folds several numbers into one seed; each is hashed with those before it."""
    seed = 0
    for part in parts:
        x = ((seed ^ part) * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64  # as `hashed` for a single number
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor % 2**64
        seed = x ^ (x >> 31)
    return seed


class CounterRng:
    """Counter-based random numbers for a key, identical on every platform and version."""

    def __init__(self, *key: int):
        self._key, self._count = fold_seed(*key), 0

    def _seed(self) -> int:
        self._count += 1
        return fold_seed(self._key, self._count)

    def uniform(self, count: int) -> np.ndarray:
        """Returns [count] f64 in [0, 1)."""
        return (hashed(self._seed(), count) >> np.uint64(11)) * 2.0**-53

    def below(self, bound: int) -> int:
        """Returns an integer in [0, bound)."""
        return int(self.uniform(1)[0] * bound)

    def order(self, count: int) -> np.ndarray:
        """Returns a permutation of range(count)."""
        return shuffled(self._seed(), count)


class TransformLengths:
    """Row lengths of transformed pieces: `table` [C, L + 1] i64, by choice and piece length, ascending.

    The choice for a piece is a function of its document and start.
    """

    def __init__(self, table: np.ndarray, seed: int):
        self.table, self.seed = table, seed

    def choice(self, document: int, start: int) -> int:
        return fold_seed(self.seed, document, start) % len(self.table) if len(self.table) > 1 else 0

    def cut(self, document: int, start: int, stop: int, room: int) -> tuple[Piece, int] | None:
        """Returns the longest piece from `start` that fits into `room` tokens, and its transformed length.

        None if only one token of several would fit.
        """
        table = self.table[self.choice(document, start)]
        size = min(stop - start, int(np.searchsorted(table, room, side="right")) - 1)
        if size < min(stop - start, 2):
            return None
        return Piece(document, start, start + size), int(table[size])


class ConcatPlan:
    """Row r holds tokens [r L, (r + 1) L) of all documents, concatenated in shuffled order."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int):
        self.seq_len = seq_len
        self.order = shuffled(seed, len(lengths))
        self.ends = np.cumsum(lengths[self.order])
        self.total = int(self.ends[-1]) if len(lengths) else 0
        self.num_rows = -(-self.total // seq_len)

    def pieces(self, row: int) -> list[Piece]:
        at, stop = row * self.seq_len, min((row + 1) * self.seq_len, self.total)
        rank = int(np.searchsorted(self.ends, at, side="right"))
        found = []
        while at < stop:
            end = int(self.ends[rank])
            start = int(self.ends[rank - 1]) if rank else 0
            if end > at:
                found.append(Piece(int(self.order[rank]), at - start, min(stop, end) - start))
                at = min(stop, end)
            rank += 1
        return found


class ListedPlan:
    """A plan stored as an explicit list of rows."""

    def __init__(self, rows: Iterable[list[Piece]]):
        documents, starts, stops, offsets = [], [], [], [0]
        for row in rows:
            for piece in row:
                documents.append(piece.document)
                starts.append(piece.start)
                stops.append(piece.stop)
            offsets.append(len(documents))
        self.documents, self.starts, self.stops = (np.array(x, np.int64) for x in (documents, starts, stops))
        self.offsets = np.array(offsets, np.int64)
        self.num_rows = len(offsets) - 1

    def pieces(self, row: int) -> list[Piece]:
        at = slice(self.offsets[row], self.offsets[row + 1])
        columns = (self.documents[at].tolist(), self.starts[at].tolist(), self.stops[at].tolist())
        return [Piece(*fields) for fields in zip(*columns, strict=True)]


class BestFitPlan(ListedPlan):
    """Best-fit decreasing over windows of documents: the fullest row that still fits takes the next longest piece."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int, growth: TransformLengths | None = None):
        cuts = (_cuts(d, lengths[d], seq_len, growth) for d in shuffled(seed, len(lengths)))
        super().__init__(_in_windows(cuts, seq_len))


class PairPlan(ListedPlan):
    """Packs uncut groups of texts into rows; a group takes the length of its longest text.

    A row's pieces are the first texts of its groups, at most `most` of them.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, *, sides: int, most: int):
        sizes = lengths.reshape(-1, sides).max(1).tolist()
        uncut = lambda text: Piece(text, 0, int(lengths[text]))
        super().__init__(_in_windows(([(uncut(sides * i), size)] for i, size in enumerate(sizes)), seq_len, most))


def _cuts(document: int, length: int, seq_len: int, growth: TransformLengths | None) -> Iterator[tuple[Piece, int]]:
    if growth is None:
        for start in range(0, int(length), seq_len):
            stop = min(start + seq_len, int(length))
            yield Piece(int(document), start, stop), stop - start
        return
    start = 0
    while start < length:
        cut = growth.cut(int(document), start, int(length), seq_len)
        assert cut is not None, "a row has room for two tokens"
        yield cut
        start = cut[0].stop


class GrownConcatPlan(ListedPlan):
    """`ConcatPlan` for transformed pieces: documents back to back, each piece as long as the remaining room allows."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int, growth: TransformLengths):
        super().__init__(_concat(shuffled(seed, len(lengths)), lengths, seq_len, growth))


def _concat(order: np.ndarray, lengths: np.ndarray, seq_len: int, growth: TransformLengths) -> Iterator[list[Piece]]:
    row: list[Piece] = []
    room = seq_len
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        start = 0
        while start < length:
            cut = growth.cut(document, start, length, room)
            if cut is None:
                yield row
                row, room = [], seq_len
                continue
            row.append(cut[0])
            start, room = cut[0].stop, room - cut[1]
    if row:
        yield row


def _in_windows(
    documents: Iterable[Iterable[tuple[Piece, int]]], seq_len: int, most: int | None = None
) -> Iterator[list[Piece]]:
    """Yields best-fit rows for the pieces of `WINDOW` documents at a time."""
    documents = iter(documents)
    while window := list(itertools.islice(documents, WINDOW)):
        yield from _best_fit(list(itertools.chain.from_iterable(window)), seq_len, most)


def _best_fit(cuts: list[tuple[Piece, int]], seq_len: int, most: int | None = None) -> list[list[Piece]]:
    """Returns rows of at most `most` pieces; None: unlimited."""
    cuts.sort(key=lambda cut: -cut[1])  # stable: equal lengths keep the shuffled order
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for piece, size in cuts:
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            rows.append([piece])
            left, row = seq_len - size, len(rows) - 1
        else:
            left, row = room.pop(at)
            rows[row].append(piece)
            left -= size
        if left and len(rows[row]) != most:
            bisect.insort(room, (left, row))
    return rows


def make_plan(
    lengths: np.ndarray, *, seq_len: int, packing: Packing, seed: int, growth: TransformLengths | None = None
) -> Plan:
    """Builds the plan for a packing mode. `growth` None: pieces keep their length in the row."""
    if packing is Packing.best_fit:
        return BestFitPlan(lengths, seq_len, seed, growth)
    return ConcatPlan(lengths, seq_len, seed) if growth is None else GrownConcatPlan(lengths, seq_len, seed, growth)


def plain(found: np.ndarray, size: int, loss_mask: np.ndarray | None = None) -> RowSlice:
    """Returns `size` tokens with the next token as target; `found` may hold one token more.

    The last target is masked without a next token. `loss_mask` selects the other targets; None: all of them.
    """
    targets, mask = np.zeros(size, np.int32), np.zeros(size, np.float32)
    known = min(len(found) - 1, size)
    targets[:known] = found[1 : known + 1]
    mask[:known] = 1 if loss_mask is None else loss_mask
    return RowSlice(found[:size].astype(np.int32), targets, mask)


def build_row(corpus: Corpus, pieces: list[Piece], seq_len: int, show: ShowSlice | None = None) -> TokenBatch:
    """Builds one row, [L] per field. A piece's last target is the document's next token; masked without one.

    The loss mask of a corpus is indexed by token and shifts by one with the targets. `show` transforms pieces.
    """
    tokens = np.zeros(seq_len, np.int32)
    targets = np.zeros(seq_len, np.int32)
    mask = np.zeros(seq_len, np.float32)
    segments = np.zeros(seq_len, np.int32)
    positions = np.zeros(seq_len, np.int32)
    at = 0
    for segment, piece in enumerate(pieces, 1):
        document, start, stop = piece
        found = corpus.document(document, start, stop + 1)  # plus the next token, if any
        if show is None:
            part = plain(found, stop - start, corpus.loss_mask(document, start + 1, start + len(found)))
        else:
            part = show(found, piece, segment - 1)
        size = len(part.tokens)
        tokens[at : at + size], targets[at : at + size], mask[at : at + size] = part
        segments[at : at + size] = segment
        positions[at : at + size] = np.arange(size)
        at += size
    return TokenBatch(tokens, targets, mask, segments, positions)
