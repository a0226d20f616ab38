"""Data sources: each is divided into shards, and a shard yields documents or records.

Records are objects with the fields of the file; formats other than text read them (`data.records.chat_formats`).

Unreadable input does not stop a run, and it is never skipped silently: it is counted by file and reason, with the
position of the first case, and the counts are written to the run's summary.
"""

import glob
import gzip
import io
import json
import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omegaconf import MISSING

from data.object_store import check_url, find_files, is_url, on_disk, stored
from data.records.record import BadRecords, Record, RecordFormat, decode, take_record, take_text
from data.sources.tf_example import parse_example

T = TypeVar("T")
SHARD_BYTES = 16 << 20  # file bytes per shard; smaller files are grouped
RECORD_BYTES = 4 << 20  # maximum bytes of a record's line; longer lines are treated as corrupt


class SourceShard(NamedTuple):
    """A unit of work: yields the same documents as long as its files do not change."""

    files: tuple[str, ...]
    start: int = 0  # first record, row group or byte of a single file, depending on the source
    stop: int = -1  # exclusive end; -1: end of the file


@dataclass
class SourceConfig:
    kind: str = ""
    # mixture weight; null for all sources: proportional to their tokens
    weight: float | None = field(
        default=None, metadata={"above": 0, "hint": "leave the source out of source=[...] instead"}
    )
    validation_fraction: float = 0.01  # fraction of documents for validation, selected by a hash of their content
    max_documents: int | None = None  # maximum number of documents; null: all
    chat_format: RecordFormat = RecordFormat.auto  # record layout, for formats other than text; auto: detect

    def units(self) -> list[SourceShard]:
        """Returns the shards. Raises: ValueError naming key, value and fix if the source is empty."""
        raise TypeError(f"source.kind={self.kind}: choose one with source=[NAME]")

    def read(self, unit: SourceShard, bad: BadRecords) -> Iterator[str]:
        raise TypeError(f"source.kind={self.kind}: choose one with source=[NAME]")

    def records(self, unit: SourceShard, bad: BadRecords) -> Iterator[Record]:
        """Yields records; a source of plain text yields `{"text": ...}`."""
        for index, text in enumerate(self.read(unit, bad)):
            yield Record({"text": text}, self.kind, f"document {unit.start + index + 1}")


@dataclass
class FileSourceConfig(SourceConfig):
    paths: list[str] = MISSING  # files, folders (recursive) and globs; local or in object stores (s3://BUCKET/...)

    def suffixes(self) -> tuple[str, ...]:
        """Returns the file suffixes to read from folders; empty: every file."""
        return ()

    def files(self) -> list[str]:
        """Returns all files without duplicates, in a fixed order."""
        if not self.paths:
            raise ValueError(f"data.sources.{self.kind}.paths=[]: name at least one file, folder or glob")
        found: dict[str, None] = {}
        for path in self.paths:
            if is_url(path):
                check_url(path, f"data.sources.{self.kind}.paths")
            matches = find_files(path, self.suffixes()) if is_url(path) else _matching(path, self.suffixes())
            if not matches:
                raise ValueError(f"data.sources.{self.kind}.paths: {path!r} {_why_no_files(path, self.suffixes())}")
            found.update(dict.fromkeys(matches))
        return list(found)

    def units(self) -> list[SourceShard]:
        """Groups files in order into shards of at least `SHARD_BYTES`."""
        units: list[SourceShard] = []
        group: list[str] = []
        size = 0
        for file in self.files():
            size += _size(file)
            group.append(file)
            if size >= SHARD_BYTES:
                units.append(SourceShard(tuple(group)))
                group, size = [], 0
        return [*units, SourceShard(tuple(group))] if group else units

    def read(self, unit: SourceShard, bad: BadRecords) -> Iterator[str]:
        return self._each(unit, bad, self.read_file)

    def records(self, unit: SourceShard, bad: BadRecords) -> Iterator[Record]:
        return self._each(unit, bad, self.read_records)

    def _each(self, unit: SourceShard, bad: BadRecords, read: Callable[[str, BadRecords], Iterator[T]]) -> Iterator[T]:
        for file in unit.files:
            try:
                if _size(file) == 0:
                    bad.add(file, "empty file")
                    continue
                yield from read(file, bad)
            except (OSError, EOFError, ValueError) as error:  # a file may be truncated at any point
                if isinstance(error, ValueError) and str(error).startswith("data.sources"):
                    raise
                bad.add(file, "unreadable or truncated", str(error)[:200])

    def read_file(self, file: str, bad: BadRecords) -> Iterator[str]:
        raise TypeError(self.kind)

    def read_records(self, file: str, bad: BadRecords) -> Iterator[Record]:
        for index, text in enumerate(self.read_file(file, bad)):
            yield Record({"text": text}, file, f"document {index + 1}")


def _size(file: str) -> int:
    return stored(file).size if is_url(file) else Path(file).stat().st_size


def _matching(path: str, suffixes: tuple[str, ...]) -> list[str]:
    path = str(Path(path).expanduser())
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        files = sorted(p for p in Path(path).rglob("*") if p.is_file() and not _hidden(p, Path(path)))
        return [str(p) for p in files if not suffixes or p.name.endswith(suffixes)]
    return sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _why_no_files(path: str, suffixes: tuple[str, ...]) -> str:
    import difflib

    wanted = f" ending in {', '.join(suffixes)}" if suffixes else ""
    if is_url(path):
        is_glob = any(c in path for c in "*?[")
        return "matches no file" if is_glob else f"is neither a file nor a folder with files{wanted}"
    if Path(path).is_dir():
        return f"is a folder without files{wanted}"
    parent = Path(path).parent
    if any(c in path for c in "*?["):
        return "matches no file"
    if not parent.is_dir():
        return f"does not exist, and neither does the folder {str(parent)!r}"
    near = difflib.get_close_matches(Path(path).name, [p.name for p in parent.iterdir()], n=3)
    return "does not exist" + (f"; did you mean {' or '.join(repr(str(parent / n)) for n in near)}?" if near else "")


@dataclass
class TextConfig(FileSourceConfig):
    """Text files with one document each, or several divided by a separator."""

    kind: str = "text"
    suffix: str = ""  # read only files with this suffix from folders; empty: all files
    separator: str = ""  # text between documents of a file; empty: each file is one document

    def suffixes(self) -> tuple[str, ...]:
        return (self.suffix,) if self.suffix else ()

    def read_file(self, file: str, bad: BadRecords) -> Iterator[str]:
        with on_disk(file) as path:
            text = decode(Path(path).read_bytes(), file, bad)
        if text is None:
            return
        for index, document in enumerate(text.split(self.separator) if self.separator else [text]):
            if document.strip():
                yield document
            else:
                bad.add(file, "empty document", f"document {index + 1}")


@dataclass
class JsonlConfig(FileSourceConfig):
    """JSON lines, one object per line; .gz and .zst files are decompressed on the fly."""

    kind: str = "jsonl"
    text_field: str = "text"  # field with the document text

    def suffixes(self) -> tuple[str, ...]:
        return tuple(f"{end}{packed}" for end in (".jsonl", ".json", ".ndjson") for packed in ("", ".gz", ".zst"))

    def read_file(self, file: str, bad: BadRecords) -> Iterator[str]:
        for content, where in self._objects(file, bad, None):
            yield from take_text(content, self.text_field, file, bad, where)

    def read_records(self, file: str, bad: BadRecords) -> Iterator[Record]:
        for content, where in self._objects(file, bad, RECORD_BYTES):
            yield from take_record(content, file, bad, where)

    def _objects(self, file: str, bad: BadRecords, limit: int | None) -> Iterator[tuple[Any, str]]:
        with on_disk(file) as path, _open_packed(path) as lines:
            for number, line in enumerate(_lines(lines, limit), 1):
                if not line.strip():
                    continue
                where = f"line {number}"
                if limit is not None and len(line) > limit:
                    bad.add(file, f"a line longer than {limit >> 20} MiB", where)
                    continue
                text = decode(line, file, bad, where)
                if text is None:
                    continue
                try:
                    content = json.loads(text)
                except (ValueError, RecursionError):
                    bad.add(file, "invalid JSON", where)
                    continue
                yield content, where


def _lines(file: Any, limit: int | None) -> Iterator[bytes]:
    """Yields the lines of a file; a line longer than `limit` is cut to limit + 1 bytes."""
    if limit is None:
        yield from file
        return
    while line := file.readline(limit + 1):
        rest = line
        while len(rest) > limit and not rest.endswith(b"\n"):
            rest = file.readline(limit + 1)
        yield line


def _open_packed(file: str) -> Any:
    if file.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.endswith(".zst"):
        return io.BufferedReader(_require("zstandard", "zstd", file).ZstdDecompressor().stream_reader(open(file, "rb")))
    return open(file, "rb")


def _require(module: str, extra: str, feature: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"data.sources: {feature} needs an extra: pip install -e '.[{extra}]'") from None


@dataclass
class ParquetConfig(FileSourceConfig):
    """Parquet files, one record per row."""

    kind: str = "parquet"
    text_field: str = "text"  # column with the document text

    def suffixes(self) -> tuple[str, ...]:
        return (".parquet",)

    def read_file(self, file: str, bad: BadRecords) -> Iterator[str]:
        parquet = _require("pyarrow.parquet", "parquet", "parquet")
        with on_disk(file) as path:
            table = parquet.ParquetFile(path)
            if self.text_field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise ValueError(f"data.sources.parquet.text_field={self.text_field}: {file} has the columns {names}")
            row = 0
            for batch in table.iter_batches(columns=[self.text_field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield from take_text({self.text_field: value}, self.text_field, file, bad, f"row {row}")

    def read_records(self, file: str, bad: BadRecords) -> Iterator[Record]:
        parquet = _require("pyarrow.parquet", "parquet", "parquet")
        with on_disk(file) as path:
            row = 0
            for batch in parquet.ParquetFile(path).iter_batches():
                for content in batch.to_pylist():
                    row += 1
                    yield Record(content, file, f"row {row}")


@dataclass
class ArrayRecordConfig(FileSourceConfig):
    """ArrayRecord files whose records are text, JSON objects or tf.train.Example messages."""

    kind: str = "arrayrecord"
    text_field: str = "text"  # field with the document text, in JSON objects and examples

    def files(self) -> list[str]:
        return [f for f in super().files() if "array_record" in Path(f).name or len(self.paths) == 1]

    def read_file(self, file: str, bad: BadRecords) -> Iterator[str]:
        for content, where in self._contents(file, bad):
            yield from self._text(content, file, bad, where)

    def read_records(self, file: str, bad: BadRecords) -> Iterator[Record]:
        for content, where in self._contents(file, bad):
            example = parse_example(content)
            if example is not None:
                firsts = {name: values[0] for name, values in example.items() if values}
                texts = {name: decode(value, file, bad, where) for name, value in firsts.items()}
                if None not in texts.values():
                    yield Record(texts, file, where)
                continue
            text = decode(content, file, bad, where)
            if text is None:
                continue
            if not text.lstrip().startswith("{"):
                yield Record({self.text_field: text}, file, where)
                continue
            try:
                yield from take_record(json.loads(text), file, bad, where)
            except (ValueError, RecursionError):
                bad.add(file, "invalid JSON", where)

    def _contents(self, file: str, bad: BadRecords) -> Iterator[tuple[bytes, str]]:
        module = _require("array_record.python.array_record_module", "arrayrecord", "arrayrecord")
        with on_disk(file) as path:
            try:
                reader = module.ArrayRecordReader(path)
            except Exception as error:
                bad.add(file, "unreadable or truncated", str(error)[:200])
                return
            for index in range(reader.num_records()):
                yield reader.read(), f"record {index + 1}"
            reader.close()

    def _text(self, record: bytes, file: str, bad: BadRecords, where: str) -> Iterator[str]:
        example = parse_example(record)
        if example is not None:
            values = example.get(self.text_field)
            content = values[0] if values else None
            if content is None:
                bad.add(file, f"no field {self.text_field!r}", f"{where}; its fields: {', '.join(example)}")
                return
            record = content
        text = decode(record, file, bad, where)
        if text is None:
            return
        if example is None and text.lstrip().startswith("{"):
            try:
                yield from take_text(json.loads(text), self.text_field, file, bad, where)
            except ValueError:
                bad.add(file, "invalid JSON", where)
            return
        yield from take_text({"text": text}, "text", file, bad, where)


@dataclass
class HuggingFaceConfig(SourceConfig):
    """A Hugging Face dataset: a `save_to_disk` folder, or a name on the Hub."""

    kind: str = "huggingface"
    path: str = MISSING  # folder, or dataset name on the Hub
    name: str | None = None  # dataset configuration; null: the default one
    split: str = "train"  # split of the dataset to read
    text_field: str = "text"  # column with the document text
    streaming: bool = False  # stream the dataset from the Hub without downloading it first

    def units(self) -> list[SourceShard]:
        return [SourceShard((self.path,))]

    def read(self, unit: SourceShard, bad: BadRecords) -> Iterator[str]:
        for record in self.records(unit, bad):
            yield from take_text(record.fields, self.text_field, self.path, bad, record.where)

    def records(self, unit: SourceShard, bad: BadRecords) -> Iterator[Record]:
        datasets = _require("datasets", "huggingface", "huggingface")
        if Path(self.path).is_dir() and (
            (Path(self.path) / "dataset_info.json").exists() or (Path(self.path) / "dataset_dict.json").exists()
        ):
            rows = datasets.load_from_disk(self.path)
            rows = rows[self.split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(self.path, self.name, split=self.split, streaming=self.streaming)
        for index, row in enumerate(rows):
            yield Record(dict(row), self.path, f"row {index + 1}")


@dataclass
class SyntheticConfig(SourceConfig):
    """Sentences from a small synthetic grammar, for tests and demos without data."""

    kind: str = "synthetic"
    validation_fraction: float = 0.05  # fraction of documents for validation, selected by a hash of their content
    num_documents: int = 2000  # number of documents to generate
    seed: int = 0  # random seed of the generated text

    def units(self) -> list[SourceShard]:
        return [SourceShard((), 0, self.num_documents)]

    def read(self, unit: SourceShard, bad: BadRecords) -> Iterator[str]:
        words = {
            "noun": ["cat", "dog", "tree", "river", "stone", "king", "queen", "bird"],
            "verb": ["sees", "follows", "finds", "loves", "leaves"],
            "how": ["slowly", "gladly", "often", "never"],
        }
        for index in range(unit.start, unit.stop):
            draw = random.Random(f"{self.seed}:{index}")  # string seeds are identical on every platform
            sentences = [
                f"the {draw.choice(words['noun'])} {draw.choice(words['how'])} {draw.choice(words['verb'])} "
                f"the {draw.choice(words['noun'])}."
                for _ in range(draw.randint(1, 12))
            ]
            yield " ".join(sentences) + f" {index}"


@dataclass
class PythonStdlibConfig(SourceConfig):
    """Source files of the running Python's standard library: real text available on every machine."""

    kind: str = "python_stdlib"
    validation_fraction: float = 0.02  # fraction of documents for validation, selected by a hash of their content
    max_bytes: int = 6_000_000  # maximum bytes of text, sampled evenly across the library

    def units(self) -> list[SourceShard]:
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {
            "site-packages",
            "dist-packages",
            "test",
            "tests",
            "idlelib",
            "lib2to3",
            "turtledemo",
            "__pycache__",
        }
        # pydoc_data and the codec tables are data, not code.
        skipped |= {"pydoc_data", "encodings"}
        found: list[Path] = []
        for folder, folders, names in os.walk(root):
            folders[:] = set(folders) - skipped  # do not descend: site-packages is many times larger than the library
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        files = [p for p in sorted(found) if 500 <= p.stat().st_size <= 400_000]
        total = sum(p.stat().st_size for p in files)
        if total > self.max_bytes:
            step = total / self.max_bytes
            taken = sorted({int(i * step) for i in range(int(len(files) / step))})
            files = [files[i] for i in taken if i < len(files)]
        size = 40
        return [SourceShard(tuple(str(p) for p in files[i : i + size])) for i in range(0, len(files), size)]

    def read(self, unit: SourceShard, bad: BadRecords) -> Iterator[str]:
        yield from TextConfig(paths=list(unit.files)).read(unit, bad)
