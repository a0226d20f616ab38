"""Tokenizes text into shards once; every process and every later run memory-maps them.

    FOLDER/shard_00000.train.tokens.npy   u16 or u32, concatenated documents
          /shard_00000.train.offsets.npy  i64 [documents + 1]
          /shard_00000.train.loss_mask.npy   bool per token: the loss mask; only for formats other than text
          /shard_00000.train.values.npy   f32 [documents]: preference margins, if the objective reads them
          /shard_00000.validation.*          the validation split, never trained on
          /shard_00000.json               inputs and counts of the shard; written last
          /manifest.json                  settings, hashes, counts, bad records; written after all shards

A shard is one unit of a source. A killed run resumes at the next shard; a shard is rebuilt if its files changed.
"""

import dataclasses
import enum
import errno
import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data.object_store import Store, is_url, stored
from data.records.encoding import (
    DataFormat,
    EncodingConfig,
    examples_per_record,
    read_examples,
)
from data.records.record import BadRecords
from data.sources.readers import SourceConfig, SourceShard
from data.tokenizers.tokenizer import Tokenizer, fingerprint

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
VERSION = 1
EXAMPLES_VERSION = 1  # version of the record encoding
BATCH_CHARACTERS = 1 << 22  # characters tokenized per batch
Progress = Callable[[int, int, int], None]  # (shards done, total shards, tokens so far)


class Manifest(NamedTuple):
    """Contents of a prepared folder."""

    folder: Path
    content: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the tokens."""
        return self.content["fingerprint"]

    @property
    def bad(self) -> dict[str, Any]:
        return self.content["bad_records"]

    @property
    def masked(self) -> bool:
        """True if the shards have a loss mask: every format but text."""
        return "examples" in self.content["settings"]

    def count(self, split: str, kind: str) -> int:
        """Returns a count of a split: `documents`, `tokens` or `bytes`.

        Formats other than text also have `loss_tokens` and `truncated` (truncated examples).
        """
        return self.content["counts"][split][kind]


def settings(source: SourceConfig, tokenizer: Tokenizer, encoding: EncodingConfig | None = None) -> dict[str, Any]:
    """Returns everything that determines the tokens except the file contents.

    For formats other than text this includes the chat template and the maximum example length.
    """
    plain = {
        f.name: v.name if isinstance(v := getattr(source, f.name), enum.Enum) else v
        for f in dataclasses.fields(source)
        if f.name not in ("weight", "chat_format")
    }
    found = {"version": VERSION, "source": plain, "tokenizer": fingerprint(tokenizer)}
    if encoding is None:
        return found
    return found | {
        "examples": {
            "version": EXAMPLES_VERSION,
            "format": encoding.format.name,
            "chat_format": source.chat_format.name,
            "loss_mask": encoding.loss_mask.name,
            "on_overflow": encoding.on_overflow.name,
            "max_length": encoding.max_length,
            "chat_template": tokenizer.chat_template,
            "stop_ids": list(tokenizer.stop_ids),
            **{key: value for key in ("classes", "margins", "negatives") if (value := _plain(getattr(encoding, key)))},
        }
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def shard_folder(
    root: Path, name: str, source: SourceConfig, tokenizer: Tokenizer, encoding: EncodingConfig | None = None
) -> Path:
    """Returns the shard folder of a source; its name contains a hash of the settings."""
    return root / f"{name}-{_sha(settings(source, tokenizer, encoding))[:12]}"


def tokenize_source(
    source: SourceConfig,
    tokenizer: Tokenizer,
    folder: Path,
    progress: Progress = lambda *_: None,
    *,
    encoding: EncodingConfig | None = None,
    max_bad_share: float = 1.0,
) -> Manifest:
    """Tokenizes the missing shards and returns the manifest. `encoding` None: records are plain documents.

    Raises: ValueError if the source has no usable record or more than `max_bad_share` bad ones, with the reasons.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = settings(source, tokenizer, encoding)
    units, per_record = source.units(), 1 if encoding is None else encoding.examples_per_record
    shards, tokens = [], 0
    left = source.max_documents
    for index, unit in enumerate(units):
        made_of = {"settings": _sha(wanted), "unit": _state_of(unit), "left": left}
        shard = _finished(folder, index, made_of)
        if shard is None:
            shard = _make_shard(source, tokenizer, unit, folder / f"shard_{index:05d}", made_of, left, encoding)
        shards.append(shard)
        documents = sum(shard["counts"][split]["documents"] for split in SPLITS)
        left = None if left is None else left - documents // per_record
        tokens += sum(shard["counts"][split]["tokens"] for split in SPLITS)
        progress(index + 1, len(units), tokens)
    manifest = _manifest(wanted, shards)
    if not manifest["counts"]["train"]["tokens"]:
        raise ValueError(f"source {source.kind}: no text to train on{_reasons(manifest['bad_records'])}")
    _check_bad_fraction(source, manifest, max_bad_share)
    _write(folder / MANIFEST, manifest)
    return Manifest(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest that `prepare_source` wrote. Raises: ValueError if this process cannot see it."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(
            f"{path}: not found; process 0 prepared this source on a disk that this process cannot see. "
            "Set output_dir (or data.cache_dir) to storage shared by all hosts, or to an object store"
        )
    return Manifest(folder, json.loads(path.read_text()))


class ShardCache:
    """Syncs prepared folders between this machine and an object store, so that hosts need no shared disk."""

    def __init__(self, url: str | None, root: Path, folders: list[Path]):
        """`folders` are below `root`. `url` None: `fetch` and `send` do nothing."""
        self._stores = {} if url is None else {f: Store(f"{url}/{f.relative_to(root).as_posix()}") for f in folders}

    def fetch(self) -> None:
        """Downloads folders that are complete in the store and differ from the local copy."""
        for folder, store in self._stores.items():
            manifest = store.read(MANIFEST)
            if manifest is None or _content(folder / MANIFEST) == manifest:
                continue
            (folder / MANIFEST).unlink(missing_ok=True)
            store.get([name for name in store.list_dir()[0] if name != MANIFEST], folder)
            store.get([MANIFEST], folder)

    def send(self) -> None:
        """Uploads folders that the store lacks, the manifest last."""
        for folder, store in self._stores.items():
            manifest = _content(folder / MANIFEST)
            if manifest is None or store.read(MANIFEST) == manifest:
                continue
            store.delete([MANIFEST])
            files = {path.name: path for path in folder.glob("shard_*") if path.suffix in (".npy", ".json")}
            store.put(files)
            store.write(MANIFEST, manifest)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _check_bad_fraction(source: SourceConfig, manifest: dict[str, Any], max_bad_share: float) -> None:
    bad = sum(e["count"] for reasons in manifest["bad_records"].values() for e in reasons.values())
    total = bad + sum(manifest["counts"][split]["documents"] for split in SPLITS)
    if bad > max_bad_share * total:
        raise ValueError(
            f"data.max_bad_fraction={max_bad_share:g}: {bad:,} of {total:,} records of source {source.kind} are "
            f"unusable{_reasons(manifest['bad_records'])}; fix them or raise data.max_bad_fraction (if records are "
            "too long, raise data.seq_len or set data.on_overflow=truncate)"
        )


def _reasons(bad: dict[str, Any]) -> str:
    found = [(file, reason, entry) for file, reasons in bad.items() for reason, entry in reasons.items()]
    found.sort(key=lambda case: -case[2]["count"])
    lines = [
        f"{file}: {reason} ({entry['count']}, first: {entry['first'] or 'the file'})" for file, reason, entry in found
    ]
    return "; " + "; ".join(lines[:5]) if lines else ""


def _manifest(wanted: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    bad = BadRecords()
    for shard in shards:
        bad.merge(shard["bad_records"])
    kinds = ("documents", "tokens", "bytes", *(("loss_tokens", "truncated") if "examples" in wanted else ()))
    counts = {split: {kind: sum(s["counts"][split][kind] for s in shards) for kind in kinds} for split in SPLITS}
    return {
        "settings": wanted,
        "fingerprint": _sha([wanted, [shard["content"] for shard in shards]]),
        "counts": counts,
        "bad_records": bad.found,
        "shards": shards,
    }


class _Document(NamedTuple):
    digest: bytes  # hash of the source record; selects the split
    content: bytes  # contribution to the fingerprint of the shard
    size: int  # bytes of text
    ids: np.ndarray
    loss_mask: np.ndarray | None = None
    truncated: bool = False
    value: float = 0.0


def _documents(
    source: SourceConfig, tokenizer: Tokenizer, unit: SourceShard, bad: BadRecords, left: int | None
) -> Iterator[_Document]:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for batch in _batches(source.read(unit, bad), left):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            content = text.encode("utf-8", "surrogatepass")
            digest = hashlib.sha256(content).digest()
            yield _Document(digest, digest, len(content), np.array(tokenizer.add_bos_token(ids) + end))


def _examples(
    source: SourceConfig,
    tokenizer: Tokenizer,
    unit: SourceShard,
    bad: BadRecords,
    left: int | None,
    encoding: EncodingConfig,
) -> Iterator[_Document]:
    # Templates are programs, and some read the date, so the fingerprint hashes the encoded examples.
    for record, examples in itertools.islice(read_examples(source, unit, bad, tokenizer, encoding), left):
        content = json.dumps(record, sort_keys=True).encode()
        for example in examples:  # examples of one record are adjacent and in the same split
            encoded = example.ids.astype("<i4").tobytes() + example.loss_mask.tobytes()
            encoded += np.array(example.value, "<f4").tobytes() if encoding.margins else b""
            hashes = hashlib.sha256(content).digest(), hashlib.sha256(encoded).digest()
            yield _Document(*hashes, len(content), *example)


def _make_shard(
    source: SourceConfig,
    tokenizer: Tokenizer,
    unit: SourceShard,
    stem: Path,
    made_of: dict[str, Any],
    left: int | None,
    encoding: EncodingConfig | None,
) -> dict[str, Any]:
    bad, content = BadRecords(), hashlib.sha256()
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    arrays: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    masks: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    values: dict[str, list[float]] = {split: [] for split in SPLITS}
    sizes, truncated = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    if encoding is None:
        found = _documents(source, tokenizer, unit, bad, left)
    else:
        found = _examples(source, tokenizer, unit, bad, left, encoding)
    for document in found:
        content.update(document.content)
        # Split by content: a document stays in its split regardless of its position and its neighbors.
        share = int.from_bytes(document.digest[:8], "big") / 2**64
        split = "validation" if share < source.validation_fraction else "train"
        arrays[split].append(document.ids.astype(dtype))
        sizes[split] += document.size
        truncated[split] += document.truncated
        values[split].append(document.value)
        if document.loss_mask is not None:
            masks[split].append(document.loss_mask)
    for split in SPLITS:
        lengths = np.array([0] + [len(a) for a in arrays[split]], np.int64)
        save = lambda kind, array, split=split: _save(stem.with_name(f"{stem.name}.{split}.{kind}.npy"), array)
        save("tokens", np.concatenate([np.zeros(0, dtype), *arrays[split]]))
        save("offsets", np.cumsum(lengths))
        if encoding is not None:
            save("loss_mask", np.concatenate([np.zeros(0, bool), *masks[split]]))
        if encoding is not None and encoding.margins:
            save("values", np.array(values[split], np.float32))
    counts: dict[str, dict[str, int]] = {
        s: {"documents": len(arrays[s]), "tokens": int(sum(map(len, arrays[s]))), "bytes": sizes[s]} for s in SPLITS
    }
    if encoding is not None:
        for split in SPLITS:
            targets = sum(int(mask[1:].sum()) for mask in masks[split])
            counts[split] |= {"loss_tokens": targets, "truncated": truncated[split]}
    shard = {
        "name": stem.name,
        "made_of": made_of,
        "content": content.hexdigest(),
        "counts": counts,
        "bad_records": bad.found,
    }
    _write(stem.with_name(stem.name + ".json"), shard)
    return shard


def _batches(documents: Iterator[str], left: int | None) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for taken, document in enumerate(documents):
        if left is not None and taken >= left:
            break
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _finished(folder: Path, index: int, made_of: dict[str, Any]) -> dict[str, Any] | None:
    path = folder / f"shard_{index:05d}.json"
    if not path.exists():
        return None
    shard = json.loads(path.read_text())
    return shard if shard["made_of"] == json.loads(json.dumps(made_of)) else None


def _state_of(unit: SourceShard) -> list[Any]:
    found = []
    for file in unit.files:
        if is_url(file):
            found.append([file, stored(file).size, stored(file).version])
            continue
        try:
            stat = os.stat(file)
            found.append([file, stat.st_size, stat.st_mtime_ns])
        except OSError:  # a dataset name on the Hub, not a file
            found.append([file])
    return [found, unit.start, unit.stop]


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _save(path: Path, array: np.ndarray) -> None:
    with _atomic_write(path) as file:
        try:
            np.save(file, array, allow_pickle=False)
        except OSError as error:  # NumPy reports the bytes written but sets no errno
            raise OSError(error.errno or errno.ENOSPC, f"{path}: cannot be written: {error}") from error


def _write(path: Path, content: Any) -> None:
    with _atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


@contextmanager
def _atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Writes a temporary file and renames it when complete; safe if two runs write the same path."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class TokenCorpus:
    """Memory-mapped documents of one split of a prepared folder.

    If no document was assigned to the validation split (a corpus of one file, for example), validation uses the end of
    the longest document: of n tokens the first int(n (1 - validation_fraction)) are trained on. Formats other than text
    are not cut: validation uses the last examples instead.
    """

    def __init__(self, manifest: Manifest, split: str):
        shards = [s["name"] for s in manifest.content["shards"]]
        self.fingerprint = f"{manifest.fingerprint}:{split}"
        carve = self._needs_split(manifest)
        source = "train" if carve and split == "validation" else split
        load = lambda name, kind: np.load(
            manifest.folder / f"{name}.{source}.{kind}.npy", mmap_mode="r", allow_pickle=False
        )
        self._tokens = [load(name, "tokens") for name in shards]
        examples = manifest.content["settings"].get("examples", {})
        format = DataFormat[examples.get("format", DataFormat.text.name)]
        self.examples_per_record = examples_per_record(format, examples.get("negatives", 0))
        # A class label follows the last token: it is a target, never an input.
        self._num_labels = int(format is DataFormat.classification)
        self._loss_masks = [load(name, "loss_mask") for name in shards] if manifest.masked else None
        offsets = [load(name, "offsets") for name in shards]
        self._shard = np.concatenate([np.full(len(o) - 1, i, np.int32) for i, o in enumerate(offsets)])
        self._start = np.concatenate([np.asarray(o[:-1]) for o in offsets])
        self.lengths = np.concatenate([np.diff(o) for o in offsets]) - self._num_labels
        self._values = [load(name, "values") for name in shards] if examples.get("margins") else None
        self._number = np.concatenate([np.arange(len(o) - 1) for o in offsets])  # index within the shard
        fraction = manifest.content["settings"]["source"]["validation_fraction"]
        if carve and manifest.masked:
            self._split_examples(split, fraction)
        elif carve:
            self._split_longest(split, fraction)

    @staticmethod
    def _needs_split(manifest: Manifest) -> bool:
        fraction = manifest.content["settings"]["source"]["validation_fraction"]
        return fraction > 0 and manifest.count("validation", "documents") == 0

    def _split_longest(self, split: str, fraction: float) -> None:
        longest, total = int(np.argmax(self.lengths)), int(self.lengths.sum())
        size = min(total - int(total * (1 - fraction)), int(self.lengths[longest]) // 2)
        if split == "train":
            self.lengths[longest] -= size
        else:
            at = slice(longest, longest + 1)
            self._shard, self._start = self._shard[at], self._start[at] + self.lengths[at] - size
            self.lengths = np.array([size], np.int64)

    def _split_examples(self, split: str, fraction: float) -> None:
        last = min(max(1, round(self.num_documents * fraction)), self.num_documents // 2)
        last = -(-last // self.examples_per_record) * self.examples_per_record
        at = slice(None, self.num_documents - last) if split == "train" else slice(self.num_documents - last, None)
        self._shard, self._start, self.lengths = self._shard[at], self._start[at], self.lengths[at]
        self._number = self._number[at]

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def document(self, index: int, start: int, stop: int) -> np.ndarray:
        """Returns tokens [start, stop) of a document, fewer if it ends earlier."""
        return self._slice(self._tokens, index, start, stop)

    def loss_mask(self, index: int, start: int, stop: int) -> np.ndarray | None:
        """Returns the bool mask of the tokens [start, stop) that contribute to the loss; None: all of them."""
        return None if self._loss_masks is None else self._slice(self._loss_masks, index, start, stop)

    def values(self, indices: Sequence[int]) -> np.ndarray:
        """Returns [documents] f32: the saved value of each, such as a preference margin."""
        assert self._values is not None
        return np.array([self._values[self._shard[i]][self._number[i]] for i in indices], np.float32)

    def _slice(self, arrays: list[np.ndarray], index: int, start: int, stop: int) -> np.ndarray:
        stop = min(stop, int(self.lengths[index]) + self._num_labels)
        first = int(self._start[index])
        return arrays[self._shard[index]][first + start : first + stop]
