"""Shards are resumable, verified and reproducible."""

import json

import numpy as np
import pytest

from data.sources.readers import SourceShard, SyntheticConfig, TextConfig
from data.tokenize_shards import Manifest, TokenCorpus, shard_folder, tokenize_source
from data.tokenizers.kinds import Bytes, Characters


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Twenty files that form ten shards."""
    monkeypatch.setattr("data.sources.readers.SHARD_BYTES", 60)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"document number {i} " * 2)
    return TextConfig(paths=[str(folder)], validation_fraction=0.3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(manifest: Manifest, split: str) -> list[str]:
    corpus = TokenCorpus(manifest, split)
    return [Bytes().decode(corpus.document(i, 0, 10**9)) for i in range(corpus.num_documents)]


def test_train_and_validation_are_disjoint_and_complete(texts, tmp_path):
    manifest = tokenize_source(texts, Bytes(), tmp_path / "out")
    train, validation = documents(manifest, "train"), documents(manifest, "validation")
    assert sorted(train + validation) == sorted(f"document number {i} " * 2 for i in range(20))
    assert train and validation


def test_a_document_stays_in_its_split_regardless_of_position(texts, tmp_path):
    before = documents(tokenize_source(texts, Bytes(), tmp_path / "out"), "validation")
    first = sorted(p for p in (tmp_path / "texts").iterdir())[0]
    first.rename(first.with_name("zz.txt"))
    (tmp_path / "texts" / "new.txt").write_text("something else")
    after = documents(tokenize_source(texts, Bytes(), tmp_path / "out"), "validation")
    assert set(before) <= set(after) <= {*before, "something else"}


def test_a_killed_preparation_resumes_with_the_same_result(texts, tmp_path):
    full = tokenize_source(texts, Bytes(), tmp_path / "full")

    class Killed(Exception):
        pass

    def kill(done, total, tokens):
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        tokenize_source(texts, Bytes(), tmp_path / "cut", kill)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("shard_*.json")}
    assert len(finished) == 4
    again = tokenize_source(texts, Bytes(), tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "full")
    assert again.fingerprint == full.fingerprint
    for name, when in finished.items():
        assert (tmp_path / "cut" / name).stat().st_mtime_ns == when, "a finished shard was rebuilt"


def test_only_the_shard_of_a_changed_file_is_rebuilt(texts, tmp_path):
    before = tokenize_source(texts, Bytes(), tmp_path / "out")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard_*.json")}
    (tmp_path / "texts" / "07.txt").write_text("another document, of another length")
    after = tokenize_source(texts, Bytes(), tmp_path / "out")
    made = [n for n, t in times.items() if (tmp_path / "out" / n).stat().st_mtime_ns != t]
    assert 1 <= len(made) < len(times)
    assert after.fingerprint != before.fingerprint


def test_other_settings_or_another_tokenizer_use_another_folder(texts, tmp_path):
    folders = {
        shard_folder(tmp_path, "x", texts, Bytes()),
        shard_folder(tmp_path, "x", texts, Characters("abc")),
        shard_folder(tmp_path, "x", TextConfig(paths=texts.paths, validation_fraction=0.5), Bytes()),
    }
    assert len(folders) == 3
    same = TextConfig(paths=texts.paths, validation_fraction=0.3, weight=7.0)
    assert shard_folder(tmp_path, "x", same, Bytes()) in folders, "a weight does not change the tokens"


def test_validation_is_the_end_of_a_single_long_document(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1001))
    (tmp_path / "a.txt").write_text(text)
    source = TextConfig(paths=[str(tmp_path / "a.txt")], validation_fraction=0.1)
    tokenizer = Characters("abcdefghijklmnopqrstuvwxyz")
    manifest = tokenize_source(source, tokenizer, tmp_path / "out")
    train, validation = TokenCorpus(manifest, "train"), TokenCorpus(manifest, "validation")
    n = int(1001 * 0.9)
    assert tokenizer.decode(train.document(0, 0, 2000)) == text[:n]
    assert tokenizer.decode(validation.document(0, 0, 2000)) == text[n:]


def test_max_documents_is_respected_across_shards(texts, tmp_path):
    texts.max_documents = 5
    manifest = tokenize_source(texts, Bytes(), tmp_path / "out")
    assert sum(manifest.count(split, "documents") for split in ("train", "validation")) == 5


def test_a_source_of_only_bad_records_fails_with_the_reasons(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"no text to train on; .*a.txt: binary"):
        tokenize_source(TextConfig(paths=[str(tmp_path / "a.txt")]), Bytes(), tmp_path / "out")


def test_the_manifest_counts_bytes_tokens_and_bad_records(texts, tmp_path):
    (tmp_path / "texts" / "05.txt").write_bytes(b"\0\0")
    manifest = tokenize_source(texts, Bytes(), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert saved["counts"] == manifest.content["counts"]
    totals = {w: sum(saved["counts"][s][w] for s in saved["counts"]) for w in ("documents", "tokens", "bytes")}
    assert totals["documents"] == 19 and totals["tokens"] == totals["bytes"] + 19  # one end token each
    assert list(manifest.bad.values()) == [{"binary": {"count": 1, "first": ""}}]


def test_small_vocabularies_use_16_bit_tokens(tmp_path):
    manifest = tokenize_source(SyntheticConfig(num_documents=3), Bytes(), tmp_path / "out")
    tokens = np.load(tmp_path / "out" / "shard_00000.train.tokens.npy")
    assert tokens.dtype == np.uint16 and tokens.size == manifest.count("train", "tokens")


def test_units_are_stable():
    assert SyntheticConfig(num_documents=3).units() == [SourceShard((), 0, 3)]


def test_documents_start_and_end_as_the_policy_says(texts, tmp_path):
    class WithBos(Bytes):
        bos_id = 1

    tokenizer = WithBos().with_policy(add_bos=True)
    folders = [shard_folder(tmp_path, "a", texts, t) for t in (tokenizer, WithBos())]
    assert folders[0] != folders[1]
    for folder, made, prefix in zip(folders, (tokenizer, WithBos()), ([1], []), strict=True):
        corpus = TokenCorpus(tokenize_source(texts, made, folder), "train")
        for i in range(corpus.num_documents):
            ids = corpus.document(i, 0, 10**9).tolist()
            assert ids[: len(prefix)] == prefix and ids[len(prefix)] == ord("d") and ids[-1] == 256
