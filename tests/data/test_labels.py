import json

import numpy as np
import pytest

from data.loader import DataConfig, PairRows, batch_hash, make_rows
from data.packing import Packing, make_plan
from data.packing import build_row as row_of
from data.records.chat_formats import InvalidRecord
from data.records.encoding import (
    BadRecords,
    DataFormat,
    DataNeeds,
    EncodingConfig,
    LossMask,
    OnOverflow,
    encode_full_text,
    encode_labelled,
    read_examples,
)
from data.records.labels import Labelled, to_label, to_match
from data.sources.readers import JsonlConfig
from data.tokenize_shards import TokenCorpus, tokenize_source
from data.tokenizers.kinds import Bytes

CLASSES = ("ham", "spam")


def encoding(format: DataFormat, length: int = 16, **changes) -> EncodingConfig:
    return EncodingConfig(LossMask.assistant, OnOverflow.truncate, length, format, **changes)


def write(path, rows) -> JsonlConfig:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return JsonlConfig(paths=[str(path)], validation_fraction=0.0)


@pytest.mark.parametrize("value,want", [("ham", 0), ("spam", 1), (0, 0), (1, 1), (True, 1)])
def test_a_class_is_given_by_name_or_index(value, want):
    assert to_label({"label": value}, CLASSES) == want


def test_a_name_that_looks_like_a_number_is_a_name():
    assert to_label({"label": 1}, ("1", "0")) == 0


@pytest.mark.parametrize(
    "fields,reason",
    [
        ({}, "no field 'label'"),
        ({"label": "eggs"}, "field 'label' is not one of data.classes"),
        ({"class": 2}, "field 'class' is not one of data.classes"),
        ({"label": None}, "field 'label' is not one of data.classes"),
        ({"label": -1}, "field 'label' is not one of data.classes"),
    ],
)
def test_records_without_a_known_class_are_refused(fields, reason):
    with pytest.raises(InvalidRecord, match=reason):
        to_label(fields, CLASSES)


@pytest.mark.parametrize(
    "fields,negatives,reason",
    [
        ({"anchor": "a"}, 0, "no anchor and positive fields"),
        ({"anchor": "a", "positive": 3}, 0, "field 'positive' is not a string"),
        ({"anchor": "a", "positive": " "}, 0, "empty text"),
        ({"query": "a", "passage": "a "}, 0, "anchor and positive are equal"),
        ({"query": "a", "passage": "b"}, 1, "no field 'negative'"),
        ({"query": "a", "passage": "b", "negatives": ["c"]}, 2, "fewer negatives than"),
        ({"query": "a", "passage": "b", "negative": 3}, 1, "no field 'negative'"),
    ],
)
def test_invalid_matches_are_refused(fields, negatives, reason):
    with pytest.raises(InvalidRecord, match=reason):
        to_match(fields, negatives)


def test_matches_are_found_by_their_usual_names():
    assert to_match({"question": "a", "answer": "b", "negative": "c"}, 1).texts == ("a", "b", "c")
    assert to_match({"query": "a", "passage": "b", "negatives": ["c", "d", "e"]}, 2).texts == ("a", "b", "c", "d")
    assert to_match({"sentence1": "a", "sentence2": "b", "negative": "c"}, 0).texts == ("a", "b")


def test_a_text_keeps_its_end_when_it_is_cut():
    tokenizer = Bytes()
    example = encode_full_text(tokenizer, "a long text indeed, too long", encoding(DataFormat.classification))
    assert len(example.ids) == 16 and example.ids[-1] == tokenizer.eos_id and example.truncated
    with pytest.raises(InvalidRecord, match=r"longer than data\.seq_len=16"):
        encode_full_text(
            tokenizer, "a long text indeed", encoding(DataFormat.classification)._replace(on_overflow=OnOverflow.drop)
        )


def test_the_class_is_the_target_of_the_last_token_and_never_an_input(tmp_path):
    tokenizer = Bytes()
    made = encode_labelled(tokenizer, Labelled("hi", 1), encoding(DataFormat.classification))
    assert made.ids.tolist() == [*tokenizer.encode("hi"), tokenizer.eos_id, 1]
    source = write(
        tmp_path / "a.jsonl", [{"text": "hi", "label": 1}, {"text": "yes", "label": 0}, {"text": "", "label": 0}]
    )
    manifest = tokenize_source(
        source, tokenizer, tmp_path / "made", encoding=encoding(DataFormat.classification, classes=CLASSES)
    )
    corpus = TokenCorpus(manifest, "train")
    assert sorted(corpus.lengths.tolist()) == [3, 4]  # with the end of text, without the class
    plan = make_plan(corpus.lengths, seq_len=16, packing=Packing.best_fit, seed=0)
    assert plan.num_rows == 1
    row = row_of(corpus, plan.pieces(0), 16)
    assert row.loss_mask.sum() == 2 and (row.segment_ids > 0).sum() == 7
    for end in np.flatnonzero(row.loss_mask):
        assert row.tokens[end] == tokenizer.eos_id
        text = tokenizer.decode(row.tokens[row.segment_ids == row.segment_ids[end]][:-1].tolist())
        assert row.targets[end] == {"hi": 1, "yes": 0}[text]


def test_a_row_holds_all_texts_of_a_match(tmp_path):
    rows = [{"anchor": f"a{i}", "positive": f"b{i}", "negative": f"c{i}"} for i in range(8)]
    source = write(tmp_path / "a.jsonl", rows)
    config = DataConfig(seq_len=8, format=DataFormat.retrieval)
    needs = DataNeeds(formats=(DataFormat.retrieval,), num_negatives=1)
    manifest = tokenize_source(source, Bytes(), tmp_path / "made", encoding=config.encoding(needs))
    made = make_rows(TokenCorpus(manifest, "train"), config, 0, "a", needs=needs)
    assert len(made) == 8 and made[3].tokens.shape == (3, 8)
    texts = [Bytes().decode(row[:2].tolist()) for row in made[3].tokens]
    assert texts == ["a3", "b3", "c3"]


def test_margins_reach_the_batch_and_pairs_without_one_are_counted(tmp_path):
    rows = [{"prompt": "1?", "chosen": f"good {i}", "rejected": "no", "margin": i / 4} for i in range(6)]
    bad = [{"prompt": "1?", "chosen": "a", "rejected": "b"}, {**rows[0], "margin": "much"}, {**rows[0], "margin": True}]
    source = write(tmp_path / "a.jsonl", [*rows, *bad])
    config, needs = DataConfig(seq_len=64, format=DataFormat.preference), DataNeeds(margins=True)
    tokenizer = Bytes().with_policy(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    manifest = tokenize_source(source, tokenizer, tmp_path / "made", encoding=config.encoding(needs))
    assert sum(e["count"] for e in manifest.bad[str(tmp_path / "a.jsonl")].values()) == 3
    made = make_rows(TokenCorpus(manifest, "train"), config, 0, "a", needs=needs)
    assert isinstance(made, PairRows) and [made[i].columns["margin"].tolist() for i in (0, 5)] == [[0.0], [1.25]]
    assert batch_hash(made[0]) != batch_hash(made[0]._replace(columns={"margin": made[0].columns["margin"] + 1}))


def test_pairs_share_rows_as_far_as_they_fit(tmp_path):
    rows = [
        {"prompt": "?", "chosen": "a" * n, "rejected": "b" * m, "margin": n}
        for n, m in zip(range(1, 9), range(8, 0, -1), strict=True)
    ]
    config, needs = DataConfig(seq_len=32, format=DataFormat.preference), DataNeeds(margins=True)
    encoding = config.encoding(needs)
    tokenizer = Bytes().with_policy(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    manifest = tokenize_source(write(tmp_path / "a.jsonl", rows), tokenizer, tmp_path / "made", encoding=encoding)
    corpus = TokenCorpus(manifest, "train")
    alone = make_rows(corpus, config, 0, "a", needs=needs)
    packed = make_rows(corpus, config, 0, "a", needs=DataNeeds(margins=True, pairs_per_row=3))
    assert len(alone) == 8 and len(packed) < 5

    def texts(rows) -> list[tuple]:
        """Returns the margin of every pair, and tokens, targets and mask of both sides."""
        found = []
        for row in (rows[i] for i in range(len(rows))):
            count = row.segment_ids.max()
            assert row.segment_ids.shape == (2, 32) and count <= 3 and (row.columns["margin"][count:] == 0).all()
            for pair in range(count):
                sides = [row.segment_ids[side] == pair + 1 for side in range(2)]
                assert all((row.positions[s][at] == np.arange(at.sum())).all() for s, at in enumerate(sides))
                of = [tuple(field[s][at].tolist()) for field in row[:3] for s, at in enumerate(sides)]
                found.append((float(row.columns["margin"][pair]), *of))
        return sorted(found)

    assert texts(packed) == texts(alone)


def test_malformed_records_are_named_and_the_rest_is_read(tmp_path):
    rows = [{"text": "a", "label": "ham"}, {"text": 3, "label": "ham"}, '{"text": ', {"label": "ham"}, "[1]"]
    source, bad = write(tmp_path / "a.jsonl", rows), BadRecords()
    read = lambda: read_examples(
        source, source.units()[0], bad, Bytes(), encoding(DataFormat.classification, classes=CLASSES)
    )
    assert len(list(read())) == 1 and bad.count == 4
    assert all(entry["first"].startswith("line ") for entry in bad.found[str(tmp_path / "a.jsonl")].values())
