"""The batch of a step is a pure function of (config, seed, step)."""

import itertools

import numpy as np
import pytest

from data.batch import TokenBatch
from data.loader import DataConfig, Mixture, PackedRows, TokenLoader, batch_hash, stack, validation_batches
from data.packing import Packing
from tests.data.test_packing import Documents

B, L = 8, 16


def corpora():
    rng = np.random.default_rng(0)
    found = {}
    for name, count in (("books", 40), ("code", 25), ("wiki", 10)):
        found[name] = Documents(rng.integers(1, 60, count))
        found[name].fingerprint = name
    return found


@pytest.fixture(params=list(Packing))
def mixture(request):
    config = DataConfig(batch_size=B, seq_len=L, packing=request.param)
    return Mixture(corpora(), config, 3, {"books": 5, "code": 3, "wiki": 2})


def source(mixture, slots=range(B), prefetch=2):
    return TokenLoader(mixture, batch_size=B, slots=list(slots), place=lambda batch: batch, prefetch=prefetch)


def take(source, count):
    found = [batch_hash(source.next_batch()) for _ in range(count)]
    source.close()
    return found


@pytest.fixture
def expected(mixture):
    return take(source(mixture, prefetch=0), 12)


@pytest.mark.parametrize("prefetch", [1, 4])
def test_prefetching_changes_nothing(mixture, expected, prefetch):
    assert take(source(mixture, prefetch=prefetch), 12) == expected


@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_of_all_processes_form_the_same_batch(mixture, expected, processes):
    share = B // processes
    parts = [source(mixture, range(i * share, (i + 1) * share)) for i in range(processes)]
    for step in range(6):
        pieces = [part.next_batch() for part in parts]
        assert all(len(piece.tokens) == share for piece in pieces), "a process built rows of another"
        assert batch_hash(TokenBatch(*(np.concatenate(c) for c in zip(*pieces, strict=True)))) == expected[step]
    for part in parts:
        part.close()


def test_a_process_may_own_scattered_rows(mixture):
    slots = [1, 4, 6]
    part = source(mixture, slots)
    full = source(mixture)
    for _ in range(3):
        mine, all_rows = part.next_batch(), full.next_batch()
        assert np.array_equal(mine.tokens, all_rows.tokens[slots])
    part.close()
    full.close()


def test_it_resumes_from_every_state(mixture, expected):
    running = source(mixture)
    for step in range(8):
        state = running.get_state()
        again = source(mixture, prefetch=3)
        again.set_state(state)
        assert take(again, 12 - step) == expected[step:]
        running.next_batch()
    running.close()


def test_skipping_ahead_builds_no_row_in_between(mixture, monkeypatch):
    built = []
    make = PackedRows.transform_row
    monkeypatch.setattr(
        PackedRows, "transform_row", lambda self, row, index: built.append(row) or make(self, row, index)
    )
    far = source(mixture, prefetch=0)
    far.set_state({"next_index": 10**7 * B, "fingerprint": mixture.fingerprint})
    far.next_batch()
    assert B <= len(built) <= 2 * B


def test_sources_are_mixed_by_weight(mixture):
    names = [mixture.locate(i)[0] for i in range(1000)]
    assert {name: names.count(name) / 1000 for name in mixture.names} == pytest.approx(
        {"books": 0.5, "code": 0.3, "wiki": 0.2}, abs=0.005
    )


def test_every_epoch_has_each_row_once_in_its_own_order(mixture):
    found = {name: [] for name in mixture.names}
    for i in itertools.count():
        name, row = mixture.locate(i)
        found[name].append(row)
        if all(len(rows) >= 2 * len(mixture.rows[n]) for n, rows in found.items()):
            break
    for name, rows in found.items():
        count = len(mixture.rows[name])
        first, second = rows[:count], rows[count : 2 * count]
        assert sorted(first) == sorted(second) == list(range(count))
        assert first != second


def test_a_position_in_other_data_is_refused(mixture):
    with pytest.raises(ValueError, match=r"reset=\[data\]"):
        source(mixture).set_state({"next_index": 0, "fingerprint": "another"})


@pytest.mark.parametrize("change", [{"seq_len": 8}, {"packing": None}, {"shuffle": False}])
def test_the_fingerprint_depends_on_everything_that_changes_the_order(change):
    base = DataConfig(batch_size=B, seq_len=L)
    if "packing" in change:
        change = {"packing": Packing.best_fit}
    other = DataConfig(**{"batch_size": B, "seq_len": L, **change})
    assert Mixture(corpora(), base, 0).fingerprint != Mixture(corpora(), other, 0).fingerprint
    assert Mixture(corpora(), base, 0).fingerprint != Mixture(corpora(), base, 1).fingerprint


def test_the_batch_size_does_not_change_the_order_of_rows():
    config = DataConfig(batch_size=B, seq_len=L)
    mixture = Mixture(corpora(), config, 0)
    small = TokenLoader(mixture, batch_size=2, slots=[0, 1], place=lambda b: b, prefetch=0)
    rows = np.concatenate([small.next_batch().tokens for _ in range(4)])
    assert np.array_equal(rows, stack([mixture[i] for i in range(B)]).tokens)


def test_an_error_in_the_background_reaches_the_loop(mixture):
    def place(batch):
        raise OSError("disk gone")

    broken = TokenLoader(mixture, batch_size=B, slots=range(B), place=place, prefetch=2)
    with pytest.raises(Exception, match="disk gone"):
        broken.next_batch()


def test_validation_batches_end_with_padding_and_count_every_token_once():
    rows = PackedRows(corpora()["wiki"], seq_len=L, packing=Packing.concat, seed=0)
    batches = list(validation_batches(rows, batch_size=B, slots=range(B), max_batches=0, place=lambda b: b))
    assert len(batches) == -(-len(rows) // B)
    assert all(batch.tokens.shape == (B, L) for batch in batches)
    tokens = int(corpora()["wiki"].lengths.sum())
    assert sum((batch.segment_ids > 0).sum() for batch in batches) == tokens
    assert sum(batch.loss_mask.sum() for batch in batches) == tokens - len(corpora()["wiki"].lengths)


def test_epochs_bound_the_rows(mixture):
    rows = mixture.num_rows(2)
    names = [mixture.locate(i)[0] for i in range(rows)]
    assert any(names.count(name) >= 2 * len(mixture.rows[name]) - 1 for name in mixture.names)
    assert all(names.count(name) <= 2 * len(mixture.rows[name]) + 1 for name in mixture.names)
