"""Documents to rows of equal length, by a plan that is a pure function of (corpus, seed, seq_len, packing).

Rows are planned once, over the shuffled documents; an epoch then shuffles rows. Packed documents never see each other,
so which of them share a row has no effect on what a model computes.

Shape letters: L length of a row.
"""

import bisect
import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from data.batch import TokenBatch

WINDOW = 8192  # documents among which best fit looks for a place


class Packing(enum.Enum):
    concat = "concat"  # one after the other, cut at the ends of rows: no padding
    best_fit = "best_fit"  # whole documents, only those longer than a row are cut: a little padding


class Corpus(Protocol):
    fingerprint: str
    lengths: np.ndarray

    def document(self, index: int, start: int, stop: int) -> np.ndarray: ...

    def learnt(self, index: int, start: int, stop: int) -> np.ndarray | None: ...

    def values(self, indices: Sequence[int]) -> np.ndarray: ...


class Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


class Plan(Protocol):
    """Which pieces make up each row."""

    num_rows: int

    def pieces(self, row: int) -> list[Piece]: ...


def hashed(seed: int, count: int) -> np.ndarray:
    """[count] u64: SplitMix64 of (seed, i); the same on every platform and version."""
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64) + np.uint64(1)
        x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed & (2**64 - 1)) * np.uint64(0xD1342543DE82EF95)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))


def shuffled(seed: int, count: int) -> np.ndarray:
    """A permutation of range(count)."""
    return np.argsort(hashed(seed, count), kind="stable")


class ConcatPlan:
    """Row r is tokens [r L, (r + 1) L) of all documents in shuffled order."""

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
            begin = int(self.ends[rank - 1]) if rank else 0
            if end > at:
                found.append(Piece(int(self.order[rank]), at - begin, min(stop, end) - begin))
                at = min(stop, end)
            rank += 1
        return found


class BestFitPlan:
    """Each document goes where it leaves the least room, the longest first, among those of a window."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int):
        order = shuffled(seed, len(lengths))
        documents, starts, stops, offsets = [], [], [], [0]
        for first in range(0, len(order), WINDOW):
            for row in _best_fit(order[first : first + WINDOW], lengths, seq_len):
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


def _best_fit(order: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[Piece]]:
    pieces = [
        Piece(int(d), start, min(start + seq_len, int(lengths[d])))
        for d in order
        for start in range(0, int(lengths[d]), seq_len)
    ]
    pieces.sort(key=lambda p: p.start - p.stop)  # stable: equal lengths keep the shuffled order
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for piece in pieces:
        size = piece.stop - piece.start
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            rows.append([piece])
            left, row = seq_len - size, len(rows) - 1
        else:
            left, row = room.pop(at)
            rows[row].append(piece)
            left -= size
        if left:
            bisect.insort(room, (left, row))
    return rows


def make_plan(lengths: np.ndarray, *, seq_len: int, packing: Packing, seed: int) -> Plan:
    plans = {Packing.concat: ConcatPlan, Packing.best_fit: BestFitPlan}
    return plans[packing](lengths, seq_len, seed)


def build_row(corpus: Corpus, pieces: list[Piece], seq_len: int) -> TokenBatch:
    """One row [L] of each field. A piece's last target is the document's next token, or masked where there is none.

    What a corpus says of a token holds for it as a target: the mask moves with it, once.
    """
    tokens = np.zeros(seq_len, np.int32)
    targets = np.zeros(seq_len, np.int32)
    mask = np.zeros(seq_len, np.float32)
    segments = np.zeros(seq_len, np.int32)
    positions = np.zeros(seq_len, np.int32)
    at = 0
    for segment, (document, start, stop) in enumerate(pieces, 1):
        found = corpus.document(document, start, stop + 1)  # with the token that follows, if any
        size = stop - start
        known = len(found) - 1 if len(found) <= size else size
        tokens[at : at + size] = found[:size]
        targets[at : at + known] = found[1 : known + 1]
        learnt = corpus.learnt(document, start + 1, start + 1 + known)
        mask[at : at + known] = 1 if learnt is None else learnt
        segments[at : at + size] = segment
        positions[at : at + size] = np.arange(size)
        at += size
    return TokenBatch(tokens, targets, mask, segments, positions)
