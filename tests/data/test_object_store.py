"""Object stores: the same documents as from a folder, bounded retries, and no silent data loss."""

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("fsspec", reason="pip install -e '.[test]'")

import fsspec

from data import object_store as store
from data.object_store import ObjectStoreError, Store, check_url, find_files, is_url, on_disk, with_retries
from data.records.record import BadRecords
from data.sources.readers import ArrayRecordConfig, JsonlConfig, ParquetConfig, SourceConfig, TextConfig
from data.tokenize_shards import ShardCache, tokenize_source
from data.tokenizers.kinds import BytesConfig, build_tokenizer
from tests.stores import flaky_store, s3_server


@pytest.fixture
def flaky(monkeypatch):
    with flaky_store(monkeypatch) as file_system:
        yield file_system


@pytest.fixture(scope="module")
def s3():
    with s3_server() as environment:
        yield environment


def documents(source: SourceConfig) -> list[str]:
    return [text for unit in source.units() for text in source.read(unit, BadRecords())]


def fill(folder: Path) -> None:
    """Writes files of all formats, some with several documents, one hidden."""
    texts = [f"document {i}: " + "word " * (i % 7) for i in range(40)]
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text(texts[0])
    (folder / "sub" / "b.txt").write_text(texts[1])
    (folder / ".hidden.txt").write_text("not this one")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines[:20]))
    (folder / "sub" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[20:]).encode()))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": texts}), folder / "a.parquet")
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()


SOURCES = [
    lambda root: TextConfig(paths=[root], suffix=".txt"),
    lambda root: TextConfig(paths=[f"{root}/*.txt"]),
    lambda root: JsonlConfig(paths=[root]),
    lambda root: ParquetConfig(paths=[f"{root}/a.parquet"]),
    lambda root: ArrayRecordConfig(paths=[f"{root}/a.array_record"]),
]


@pytest.mark.parametrize("make", SOURCES, ids=["folder", "glob", "jsonl", "parquet", "arrayrecord"])
@pytest.mark.parametrize("kind", ["flaky", "s3"])
def test_a_source_reads_from_a_store_what_it_reads_from_a_folder(tmp_path, request, kind, make):
    request.getfixturevalue(kind)
    fill(tmp_path / "files")
    root = f"{kind}://bucket/{tmp_path.name}"
    Store(root).put({str(p.relative_to(tmp_path / "files")): p for p in (tmp_path / "files").rglob("*.*")})
    local, remote = make(str(tmp_path / "files")), make(root)
    assert documents(remote) == documents(local) != []
    tokenizer = build_tokenizer(BytesConfig(), lambda: iter([]))
    from_folder = tokenize_source(local, tokenizer, tmp_path / "local")
    from_store = tokenize_source(remote, tokenizer, tmp_path / "remote")
    content = lambda manifest: [shard["content"] for shard in manifest.content["shards"]]
    assert content(from_store) == content(from_folder)
    assert from_store.content["counts"] == from_folder.content["counts"]


def test_a_file_that_changed_in_the_store_is_prepared_again(tmp_path, flaky):
    folder, tokenizer = Store("flaky://bucket/text"), build_tokenizer(BytesConfig(), lambda: iter([]))
    folder.write("a.txt", b"the first text")
    make = lambda: tokenize_source(TextConfig(paths=["flaky://bucket/text"]), tokenizer, tmp_path)
    before, asked = make().fingerprint, len(flaky.asked)
    assert (
        make().fingerprint == before and len(flaky.asked) == asked
    )  # its metadata is checked, its content is not read again
    folder.write("a.txt", b"another  text!")
    assert make().fingerprint != before


def test_transient_failures_are_retried_and_logged_once(flaky):
    logged: list[str] = []
    folder = Store("flaky://bucket/x", logged.append)
    flaky.failures = 2
    folder.write("a", b"content")
    assert folder.read("a") == b"content"
    assert logged == ["flaky://bucket/x/a: 503 Slow Down; retrying up to 3 times"]


def test_a_store_that_continues_to_fail_is_an_error_and_no_text_is_lost(flaky):
    Store("flaky://bucket/text").write("a.txt", b"a text")
    source = TextConfig(paths=["flaky://bucket/text"])
    flaky.failures = 100
    with pytest.raises(ObjectStoreError, match=r"text/a.txt: .*503 Slow Down.*tried 4 times"):
        documents(source)
    flaky.failures = 0
    assert documents(source) == ["a text"]


def test_an_incomplete_download_is_an_error(flaky, monkeypatch):
    Store("flaky://bucket/text").write("a.txt", b"a text")
    [file] = find_files("flaky://bucket/text")
    with on_disk(file) as copy:
        assert Path(copy).read_text() == "a text"
    assert not Path(copy).exists()
    monkeypatch.setattr(flaky, "get_file", lambda self, path, local, **more: Path(local).write_text("a t") and None)
    with pytest.raises(ObjectStoreError, match="received 3 of 6 bytes"), on_disk(file):
        pass


def test_permanent_errors_are_not_retried():
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise PermissionError("AccessDenied")

    with pytest.raises(ValueError, match=r"s3://b/x: access denied .*AWS_PROFILE"):
        with_retries("s3://b/x", fail)
    assert tries == [1]


def test_a_secret_in_a_url_is_refused_without_repeating_it():
    for url in ("s3://KEY:HUSH@bucket/x", "https://host/file.jsonl?X-Amz-Signature=HUSH", "s3://HUSH@bucket"):
        with pytest.raises(ValueError, match="the URL contains a secret") as raised:
            check_url(url, "runs")
        assert "HUSH" not in str(raised.value)
    check_url("hf://datasets/user/name@main/data", "runs")
    assert is_url("gs://bucket") and not is_url("/disk/x") and not is_url("C:/x")


def test_a_backend_that_is_not_installed_names_its_extra(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    store.file_system.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=r"gs://: needs a package .*pip install -e '\.\[gcs\]'"):
        TextConfig(paths=["gs://bucket/text"]).units()


def test_a_missing_bucket_folder_or_glob_is_named(s3):
    with pytest.raises(ValueError, match=r"s3://nowhere/text: does not exist .*bucket does not exist"):
        TextConfig(paths=["s3://nowhere/text"]).units()
    with pytest.raises(ValueError, match=r"'s3://bucket/none' is neither a file nor a folder with files"):
        TextConfig(paths=["s3://bucket/none"]).units()
    with pytest.raises(ValueError, match=r"'s3://bucket/\*.txt' matches no file"):
        TextConfig(paths=["s3://bucket/*.txt"]).units()


def test_missing_credentials_are_named(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "_cache", {})
    store.file_system.cache_clear()
    with pytest.raises(ValueError, match=r"credentials are missing or have expired.*AWS_ACCESS_KEY_ID"):
        Store("s3://bucket/x").read("a")
    store.file_system.cache_clear()


def test_a_prepared_folder_is_transferred_completely_or_not_at_all(tmp_path, flaky):
    (tmp_path / "a.txt").write_text("a text of some words")
    tokenizer = build_tokenizer(BytesConfig(), lambda: iter([]))
    source = TextConfig(paths=[str(tmp_path / "a.txt")])
    tokenize_source(source, tokenizer, tmp_path / "one" / "p")
    copies = lambda host: ShardCache("flaky://bucket/prepared", tmp_path / host, [tmp_path / host / "p"])
    flaky.failures = 100
    with pytest.raises(ObjectStoreError):
        copies("one").send()
    flaky.failures = 0
    copies("two").fetch()
    assert not (tmp_path / "two").exists()
    copies("one").send()
    copies("two").fetch()
    names = sorted(p.name for p in (tmp_path / "one" / "p").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two" / "p").iterdir())
    assert all((tmp_path / "one/p" / n).read_bytes() == (tmp_path / "two/p" / n).read_bytes() for n in names)
