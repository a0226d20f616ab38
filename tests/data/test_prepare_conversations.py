"""Shards of conversations: the loss mask is saved with the tokens; every setting has its own folder."""

import hashlib
import json

import numpy as np
import pytest

from data.loader import PackedRows, batch_hash
from data.packing import Packing
from data.records.chat_encoding import with_template
from data.records.encoding import DataFormat, EncodingConfig, LossMask, OnOverflow
from data.records.record import RecordFormat
from data.sources.readers import JsonlConfig, SyntheticConfig
from data.tokenize_shards import TokenCorpus, shard_folder, tokenize_source
from data.tokenizers.kinds import Bytes

L = 64
ENCODING = EncodingConfig(LossMask.assistant, OnOverflow.truncate_turns, L)


@pytest.fixture
def tokenizer():
    return with_template(Bytes(), "plain")


def record(i, question="q"):
    return {"messages": [{"role": "user", "content": f"{question}{i}"}, {"role": "assistant", "content": f"a{i}"}]}


def source_of(tmp_path, records, **fields):
    path = tmp_path / "a.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return JsonlConfig(paths=[str(path)], **fields)


def test_shards_of_documents_are_pinned(tmp_path):
    source = SyntheticConfig(num_documents=30)
    folder = shard_folder(tmp_path, "x", source, Bytes())
    manifest = tokenize_source(source, Bytes(), folder)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    row = PackedRows(TokenCorpus(manifest, "train"), seq_len=64, packing=Packing.best_fit, seed=0)[3]
    # Pinned: prepared folders are reused, and resumed runs must get the same batches.
    assert folder.name == "x-7b7560ed3c6b"
    assert manifest.fingerprint == "22d7f7a3f94eda6f54a4147e221adb3024ce919cd20375f4fe4480c289c12f7c"
    assert digest.hexdigest() == "3155f2e3ece9b7990d6275b5ad943b21ad73afaa9e4ac5c245089062ecffcdff"
    assert batch_hash(row) == "98369feb53a76948e6676b8bdcdf31c9b4ee8747f2bbdef142a5b27232736534"


@pytest.mark.parametrize(
    ("format", "loss_mask", "on_overflow", "digest"),
    [
        (DataFormat.chat, LossMask.assistant, OnOverflow.truncate_turns, "41cfdfb5bc62"),
        (DataFormat.unpaired_preference, LossMask.last_turn, OnOverflow.truncate, "380c2553609e"),
        (DataFormat.preference, LossMask.all, OnOverflow.drop, "50066af454f9"),
        (DataFormat.classification, LossMask.assistant, OnOverflow.truncate_turns, "f89ae1bbccef"),
        (DataFormat.retrieval, LossMask.last_turn, OnOverflow.truncate, "b74ff0b95ae8"),
    ],
)
def test_folders_of_other_formats_are_pinned(tmp_path, format, loss_mask, on_overflow, digest):
    encoding = EncodingConfig(loss_mask, on_overflow, L, format)
    assert shard_folder(tmp_path, "n", JsonlConfig(paths=["a.jsonl"]), Bytes(), encoding).name == f"n-{digest}"


def test_only_answers_and_their_end_tokens_contribute_to_the_loss(tmp_path, tokenizer):
    source = source_of(tmp_path, map(record, range(20)), validation_fraction=0.0)
    manifest = tokenize_source(source, tokenizer, tmp_path / "out", encoding=ENCODING)
    corpus = TokenCorpus(manifest, "train")
    rows = PackedRows(corpus, seq_len=L, packing=Packing.best_fit, seed=0)
    found = []
    for row in (rows[i] for i in range(len(rows))):
        in_loss = row.loss_mask > 0
        assert (row.segment_ids[in_loss] > 0).all()
        found += tokenizer.decode([10 if t == 256 else t for t in row.targets[in_loss].tolist()]).split("\n")[:-1]
    assert sorted(found) == sorted(f" a{i}" for i in range(20))
    assert manifest.count("train", "loss_tokens") == sum(int(rows[i].loss_mask.sum()) for i in range(len(rows)))
    assert manifest.masked and manifest.count("train", "truncated") == 0


def test_every_choice_that_changes_tokens_or_mask_has_a_folder(tmp_path, tokenizer):
    source = source_of(tmp_path, [record(0)])
    folder = lambda source=source, tokenizer=tokenizer, encoding=ENCODING: shard_folder(
        tmp_path, "x", source, tokenizer, encoding
    )
    assert folder() == folder()
    others = [
        folder(encoding=None),
        folder(encoding=ENCODING._replace(loss_mask=LossMask.last_turn)),
        folder(encoding=ENCODING._replace(on_overflow=OnOverflow.truncate)),
        folder(encoding=ENCODING._replace(max_length=L - 1)),
        folder(source=JsonlConfig(paths=source.paths, chat_format=RecordFormat.messages)),
        folder(tokenizer=tokenizer.with_policy(chat_template=tokenizer.chat_template + " ")),
    ]
    assert len({folder(), *others}) == 1 + len(others)
    named = JsonlConfig(paths=source.paths, chat_format=RecordFormat.messages)
    assert folder(encoding=None) == folder(source=named, encoding=None), "documents have no format"


def test_the_fingerprint_covers_tokens_and_mask(tmp_path, tokenizer):
    source = source_of(tmp_path, map(record, range(3)))
    made = [
        tokenize_source(source, tokenizer, tmp_path / loss_mask.name, encoding=ENCODING._replace(loss_mask=loss_mask))
        for loss_mask in LossMask
    ]
    contents = [manifest.content["shards"][0]["content"] for manifest in made]
    assert contents[0] == contents[1] != contents[2], "with one turn, the last turn is all of them"
    assert len({manifest.fingerprint for manifest in made}) == 3


def test_validation_conversations_are_not_cut(tmp_path, tokenizer):
    records = [record(i) for i in range(9)]
    source = source_of(tmp_path, records, validation_fraction=1e-9)
    manifest = tokenize_source(source, tokenizer, tmp_path / "out", encoding=ENCODING)
    train, validation = TokenCorpus(manifest, "train"), TokenCorpus(manifest, "validation")
    assert (train.num_documents, validation.num_documents) == (8, 1)
    text = tokenizer.decode(validation.document(0, 0, L))
    assert text.startswith("User: q") and "Assistant: a" in text
    assert np.array_equal(validation.loss_mask(0, 0, L), train.loss_mask(0, 0, L))
    one = tokenize_source(source_of(tmp_path, records[:1]), tokenizer, tmp_path / "one", encoding=ENCODING)
    assert TokenCorpus(one, "train").num_documents == 1 and not TokenCorpus(one, "validation").num_documents


def test_too_many_bad_records_stop_and_name_the_worst_reason_first(tmp_path, tokenizer):
    records = [*map(record, range(6)), "{", record(1, "q" * 99), record(2, "q" * 99), {"messages": []}]
    source = source_of(tmp_path, records)
    with pytest.raises(
        ValueError, match=r"max_bad_fraction=0.3: 4 of 10 records of source jsonl are unusable"
    ) as error:
        tokenize_source(source, tokenizer, tmp_path / "out", encoding=ENCODING, max_bad_share=0.3)
    text = str(error.value)
    assert "longer than data.seq_len=64 (2, first: line 8: " in text
    assert "invalid JSON (1, first: line 7)" in text
    assert text.index("longer") < text.index("invalid") and str(tmp_path / "a.jsonl") in text
    manifest = tokenize_source(source, tokenizer, tmp_path / "out", encoding=ENCODING, max_bad_share=0.4)
    assert sum(manifest.count(split, "documents") for split in ("train", "validation")) == 6


def test_max_documents_counts_good_ones(tmp_path, tokenizer):
    source = source_of(tmp_path, ["{", *map(record, range(6))], max_documents=4)
    manifest = tokenize_source(source, tokenizer, tmp_path / "out", encoding=ENCODING)
    assert sum(manifest.count(split, "documents") for split in ("train", "validation")) == 4


def test_texts_may_be_mixed_with_conversations_and_may_be_long(tmp_path, tokenizer):
    source = source_of(tmp_path, [{"text": "x" * 3 * L}, {"text": "y"}], validation_fraction=0.0)
    corpus = TokenCorpus(tokenize_source(source, tokenizer, tmp_path / "out", encoding=ENCODING), "train")
    rows = PackedRows(corpus, seq_len=L, packing=Packing.best_fit, seed=0)
    targets = sum(int(rows[i].loss_mask.sum()) for i in range(len(rows)))
    assert targets == int(corpus.lengths.sum()) - 2, "all but the first token of each"
