"""Text to token shards, once: memory-mapped afterwards, by every process and every later run.

    FOLDER/shard_00000.train.tokens.npy   u16 or u32, the documents one after the other
          /shard_00000.train.offsets.npy  i64 [documents + 1]
          /shard_00000.heldout.*          documents that are never trained on
          /shard_00000.json               what the shard was made of; written last
          /manifest.json                  settings, hashes, counts, bad records; written when all shards stand

A shard is one unit of a source. A run that is killed goes on with the next shard; one whose files changed is made anew.
"""

import dataclasses
import enum
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data.sources import BadRecords, SourceConfig, Unit
from data.tokenizer_contract import Tokenizer, fingerprint

SPLITS = ("train", "heldout")
VERSION = 1
BATCH_CHARACTERS = 1 << 22  # of text that is tokenised at once
Progress = Callable[[int, int, int], None]  # shards done, shards in all, tokens so far


class Manifest(NamedTuple):
    """What a prepared folder holds."""

    folder: Path
    content: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of all that defines the tokens."""
        return self.content["fingerprint"]

    @property
    def bad(self) -> dict[str, Any]:
        return self.content["bad_records"]

    def count(self, split: str, what: str) -> int:
        """`documents`, `tokens` or `bytes` of a split."""
        return self.content["counts"][split][what]


def settings(source: SourceConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides which tokens come out, but for the content of the files."""
    plain = {
        f.name: v.name if isinstance(v := getattr(source, f.name), enum.Enum) else v
        for f in dataclasses.fields(source)
        if f.name not in ("weight", "format")
    }
    return {"version": VERSION, "source": plain, "tokenizer": fingerprint(tokenizer)}


def prepared_folder(root: Path, name: str, source: SourceConfig, tokenizer: Tokenizer) -> Path:
    """Where the shards of a source stand: other settings, another folder."""
    return root / f"{name}-{_sha(settings(source, tokenizer))[:12]}"


def prepare_source(
    source: SourceConfig, tokenizer: Tokenizer, folder: Path, progress: Progress = lambda *_: None
) -> Manifest:
    """Tokenises what is not tokenised yet and returns the manifest.

    Raises: ValueError where nothing in the source can be used, saying why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = settings(source, tokenizer)
    units = source.units()
    shards, tokens = [], 0
    left = source.max_documents
    for index, unit in enumerate(units):
        made_of = {"settings": _sha(wanted), "unit": _state_of(unit), "left": left}
        shard = _finished(folder, index, made_of)
        if shard is None:
            shard = _make_shard(source, tokenizer, unit, folder / f"shard_{index:05d}", made_of, left)
        shards.append(shard)
        documents = sum(shard["counts"][split]["documents"] for split in SPLITS)
        left = None if left is None else left - documents
        tokens += sum(shard["counts"][split]["tokens"] for split in SPLITS)
        progress(index + 1, len(units), tokens)
    manifest = _manifest(wanted, shards)
    if not manifest["counts"]["train"]["tokens"]:
        raise ValueError(f"source {source.kind}: no text to train on{_reasons(manifest['bad_records'])}")
    _write(folder / "manifest.json", manifest)
    return Manifest(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """What `prepare_source` left there. Raises: ValueError where it has not, or not on a disk that is seen here."""
    path = folder / "manifest.json"
    if not path.exists():
        raise ValueError(
            f"{path} is not there: process 0 has prepared this source, but on a disk that this process does not see; "
            "let `runs` (or `data.prepared`) be on storage that all hosts share"
        )
    return Manifest(folder, json.loads(path.read_text()))


def _reasons(bad: dict[str, Any]) -> str:
    lines = [
        f"{file}: {reason} ({entry['count']}, first: {entry['first'] or 'the file'})"
        for file, reasons in bad.items()
        for reason, entry in reasons.items()
    ]
    return "; " + "; ".join(lines[:5]) if lines else ""


def _manifest(wanted: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    bad = BadRecords()
    for shard in shards:
        bad.merge(shard["bad_records"])
    counts = {
        split: {what: sum(s["counts"][split][what] for s in shards) for what in ("documents", "tokens", "bytes")}
        for split in SPLITS
    }
    return {
        "settings": wanted,
        "fingerprint": _sha([wanted, [shard["content"] for shard in shards]]),
        "counts": counts,
        "bad_records": bad.found,
        "shards": shards,
    }


def _make_shard(
    source: SourceConfig,
    tokenizer: Tokenizer,
    unit: Unit,
    stem: Path,
    made_of: dict[str, Any],
    left: int | None,
) -> dict[str, Any]:
    bad, content = BadRecords(), hashlib.sha256()
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    arrays: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for batch in _batches(source.read(unit, bad), left):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            content.update(digest)
            # By content: a document keeps its side wherever it stands and whatever stands beside it.
            share = int.from_bytes(digest[:8], "big") / 2**64
            split = "heldout" if share < source.heldout_fraction else "train"
            arrays[split].append(np.array(tokenizer.begin(ids) + end, dtype))
            sizes[split] += len(text.encode("utf-8", "surrogatepass"))
    for split in SPLITS:
        lengths = np.array([0] + [len(a) for a in arrays[split]], np.int64)
        _save(
            stem.with_name(f"{stem.name}.{split}.tokens.npy"),
            np.concatenate([np.zeros(0, dtype), *arrays[split]]),
        )
        _save(stem.with_name(f"{stem.name}.{split}.offsets.npy"), np.cumsum(lengths))
    shard = {
        "name": stem.name,
        "made_of": made_of,
        "content": content.hexdigest(),
        "counts": {
            s: {"documents": len(arrays[s]), "tokens": int(sum(map(len, arrays[s]))), "bytes": sizes[s]} for s in SPLITS
        },
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


def _state_of(unit: Unit) -> list[Any]:
    found = []
    for file in unit.files:
        try:
            stat = os.stat(file)
            found.append([file, stat.st_size, stat.st_mtime_ns])
        except OSError:  # a name on a hub, not a file
            found.append([file])
    return [found, unit.start, unit.stop]


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _save(path: Path, array: np.ndarray) -> None:
    with _whole(path) as file:
        np.save(file, array, allow_pickle=False)


def _write(path: Path, content: Any) -> None:
    with _whole(path) as file:
        file.write(json.dumps(content, indent=1).encode())


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is all there; two runs may make the same one at a time."""
    half = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    with open(half, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


class TokenCorpus:
    """The documents of one split of a prepared folder, read from memory maps.

    Where no document fell into the held-out split (a corpus of one file, say), the end of the longest document is
    held out instead: of n tokens the first int(n (1 - heldout_fraction)) are trained on.
    """

    def __init__(self, manifest: Manifest, split: str):
        shards = [s["name"] for s in manifest.content["shards"]]
        self.fingerprint = f"{manifest.fingerprint}:{split}"
        carve = self._carving(manifest)
        source = "train" if carve and split == "heldout" else split
        load = lambda name, what: np.load(
            manifest.folder / f"{name}.{source}.{what}.npy", mmap_mode="r", allow_pickle=False
        )
        self._tokens = [load(name, "tokens") for name in shards]
        offsets = [load(name, "offsets") for name in shards]
        self._shard = np.concatenate([np.full(len(o) - 1, i, np.int32) for i, o in enumerate(offsets)])
        self._start = np.concatenate([np.asarray(o[:-1]) for o in offsets])
        self.lengths = np.concatenate([np.diff(o) for o in offsets])
        if carve:
            self._carve(split, manifest.content["settings"]["source"]["heldout_fraction"])

    @staticmethod
    def _carving(manifest: Manifest) -> bool:
        fraction = manifest.content["settings"]["source"]["heldout_fraction"]
        return fraction > 0 and manifest.count("heldout", "documents") == 0

    def _carve(self, split: str, fraction: float) -> None:
        longest, total = int(np.argmax(self.lengths)), int(self.lengths.sum())
        size = min(total - int(total * (1 - fraction)), int(self.lengths[longest]) // 2)
        if split == "train":
            self.lengths[longest] -= size
        else:
            at = slice(longest, longest + 1)
            self._shard, self._start = self._shard[at], self._start[at] + self.lengths[at] - size
            self.lengths = np.array([size], np.int64)

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def document(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document; less where it ends sooner."""
        stop = min(stop, int(self.lengths[index]))
        first = int(self._start[index])
        return self._tokens[self._shard[index]][first + start : first + stop]
