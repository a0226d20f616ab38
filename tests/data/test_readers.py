"""Every reader yields the good records and counts the bad ones by file and reason."""

import gzip
import json
from pathlib import Path

import pytest

from data.records.record import BadRecords
from data.sources.readers import (
    ArrayRecordConfig,
    JsonlConfig,
    ParquetConfig,
    PythonStdlibConfig,
    SourceConfig,
    SyntheticConfig,
    TextConfig,
)
from data.sources.tf_example import parse_example

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "pretrain"


def read_all(source: SourceConfig) -> tuple[list[str], dict]:
    bad = BadRecords()
    return [text for unit in source.units() for text in source.read(unit, bad)], bad.found


def reasons(found: dict, file: Path) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in found.get(str(file), {}).items()}


def test_text_takes_files_folders_and_globs_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    source = TextConfig(paths=[str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "a.txt")])
    assert read_all(source) == (["a.txt", "b.txt", "sub/c.txt"], {})


def test_bad_text_files_are_counted_and_the_good_ones_read(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n ")
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "latin.txt").write_bytes("Ümlaut".encode("latin-1"))
    texts, found = read_all(TextConfig(paths=[str(tmp_path)]))
    assert texts == ["good"]
    assert {Path(f).name: list(r) for f, r in found.items()} == {
        "empty.txt": ["empty file"],
        "blank.txt": ["empty document"],
        "binary.txt": ["binary"],
        "latin.txt": ["not UTF-8"],
    }


def test_a_separator_cuts_a_file_into_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n---\ntwo\n---\n")
    texts, found = read_all(TextConfig(paths=[str(tmp_path / "a.txt")], separator="\n---\n"))
    assert texts == ["one", "two"]
    assert reasons(found, tmp_path / "a.txt") == {"empty document": 1}


LINES = [
    b'{"text": "one"}',
    b'{"text": "two"',
    b'{"body": "x"}',
    b'{"text": 3}',
    b'{"text": ""}',
    b'["text"]',
    b'{"text": "\xff"}',
    b'{"text": "last"}',
]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_jsonl_counts_each_kind_of_bad_line(tmp_path, packing):
    content = b"\n".join(LINES)
    if packing == ".gz":
        content = gzip.compress(content)
    elif packing == ".zst":
        content = pytest.importorskip("zstandard").compress(content)
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(content)
    texts, found = read_all(JsonlConfig(paths=[str(tmp_path)]))
    assert texts == ["one", "last"]
    assert reasons(found, path) == {
        "invalid JSON": 1,
        "no field 'text'": 1,
        "field 'text' is not a string": 1,
        "empty document": 1,
        "not an object": 1,
        "not UTF-8": 1,
    }
    assert found[str(path)]["invalid JSON"]["first"] == "line 2"


def test_a_truncated_archive_yields_the_records_before_the_cut(tmp_path):
    content = gzip.compress(b"\n".join(json.dumps({"text": f"row {i} {i * 7919}"}).encode() for i in range(20_000)))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(content[: len(content) // 2])
    texts, found = read_all(JsonlConfig(paths=[str(path)]))
    assert texts[0] == "row 0 0" and 0 < len(texts) < 20_000
    assert reasons(found, path) == {"unreadable or truncated": 1}


def test_parquet_reads_its_column_and_names_a_wrong_one(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "x.parquet")
    texts, found = read_all(ParquetConfig(paths=[str(tmp_path)]))
    assert texts == ["a", "b"]
    assert reasons(found, tmp_path / "x.parquet") == {"field 'text' is not a string": 1}
    with pytest.raises(ValueError, match="has the columns text, n"):
        read_all(ParquetConfig(paths=[str(tmp_path)], text_field="body"))


def test_a_broken_parquet_file_is_counted(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    assert reasons(read_all(ParquetConfig(paths=[str(tmp_path)]))[1], tmp_path / "x.parquet") == {
        "unreadable or truncated": 1
    }


def test_arrayrecord_reads_text_json_and_examples(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = str(tmp_path / "x.array_record")
    writer = module.ArrayRecordWriter(path, "group_size:1")
    for record in (b"plain", b'{"text": "in json"}', example(text=b"in an example"), example(url=b"u")):
        writer.write(record)
    writer.close()
    texts, found = read_all(ArrayRecordConfig(paths=[path]))
    assert texts == ["plain", "in json", "in an example"]
    assert reasons(found, Path(path)) == {"no field 'text'": 1}


def example(**features: bytes) -> bytes:
    """A tf.train.Example in protobuf's wire format."""

    def lengthy(number: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    entries = [
        lengthy(1, lengthy(1, name.encode()) + lengthy(2, lengthy(1, lengthy(1, value))))
        for name, value in features.items()
    ]
    return lengthy(1, b"".join(entries))


def test_an_example_is_distinguished_from_text():
    assert parse_example(example(a=b"1", b=b"2")) == {"a": [b"1"], "b": [b"2"]}
    assert parse_example(b"Just text.") is None
    assert parse_example(b"") is None


@pytest.mark.skipif(not REAL.exists(), reason="needs the shared data")
def test_real_shards_are_read():
    pytest.importorskip("array_record")
    texts, found = read_all(ArrayRecordConfig(paths=[str(next((REAL / "native").glob("*array_record*")))]))
    assert len(texts) == 125 and not found


def test_a_missing_path_suggests_a_similar_one(tmp_path):
    (tmp_path / "novels.txt").write_text("x")
    with pytest.raises(ValueError, match=r"novel.txt' does not exist; did you mean .*novels.txt"):
        TextConfig(paths=[str(tmp_path / "novel.txt")]).units()


def test_the_synthetic_source_is_the_same_every_time():
    texts = read_all(SyntheticConfig(num_documents=5))[0]
    assert texts == read_all(SyntheticConfig(num_documents=5))[0] and len(set(texts)) == 5


def test_the_standard_library_is_read_up_to_its_limit():
    texts, found = read_all(PythonStdlibConfig(max_bytes=300_000))
    size = sum(len(text.encode()) for text in texts)
    assert 50_000 < size < 900_000 and not found
    assert any("def " in text for text in texts)
