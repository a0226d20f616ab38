"""Text to token shards, once: memory-mapped afterwards, by every process and every later run.

    FOLDER/shard_00000.train.tokens.npy   u16 or u32, the documents one after the other
          /shard_00000.train.offsets.npy  i64 [documents + 1]
          /shard_00000.train.learnt.npy   bool, beside the tokens of conversations: which of them are to be learnt
          /shard_00000.train.values.npy   f32 [documents]: margins of pairs, where they have any
          /shard_00000.heldout.*          documents that are never trained on
          /shard_00000.json               what the shard was made of; written last
          /manifest.json                  settings, hashes, counts, bad records; written when all shards stand

A shard is one unit of a source. A run that is killed goes on with the next shard; one whose files changed is made anew.
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
    LossMask,
    OnOverflow,
    examples_per_record,
    read_examples,
)
from data.records.record import BadRecords
from data.sources.readers import SourceConfig, SourceShard
from data.tokenizers.tokenizer import Tokenizer, fingerprint

SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
VERSION = 1
EXAMPLES_VERSION = 1  # of how conversations become examples
BATCH_CHARACTERS = 1 << 22  # of text that is tokenised at once
# Names in manifests, which predate those of the config: changing them would discard every prepared folder.
SAVED_KEYS = {"validation_fraction": "heldout_fraction"}
SAVED_FORMATS = {
    DataFormat.text: "documents",
    DataFormat.chat: "conversations",
    DataFormat.unpaired_preference: "completions",
    DataFormat.preference: "pairs",
    DataFormat.classification: "labelled",
    DataFormat.retrieval: "matches",
}
SAVED_LOSS_MASKS = {LossMask.assistant: "assistant", LossMask.last_turn: "last", LossMask.all: "all"}
SAVED_OVERFLOWS = {OnOverflow.truncate_turns: "whole_turns", OnOverflow.truncate: "cut", OnOverflow.drop: "drop"}
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

    @property
    def masked(self) -> bool:
        """Whether it holds conversations, of which not every token is to be learnt."""
        return "examples" in self.content["settings"]

    def count(self, split: str, what: str) -> int:
        """`documents`, `tokens` or `bytes` of a split; of conversations also `loss_mask` tokens and those `truncated`."""
        return self.content["counts"][split][what]


def settings(source: SourceConfig, tokenizer: Tokenizer, rules: EncodingConfig | None = None) -> dict[str, Any]:
    """All that decides which tokens come out, but for the content of the files.

    Of conversations that is the chat template, too, and the length of a row, at which they end.
    """
    plain = {
        SAVED_KEYS.get(f.name, f.name): v.name if isinstance(v := getattr(source, f.name), enum.Enum) else v
        for f in dataclasses.fields(source)
        if f.name not in ("weight", "chat_format")
    }
    found = {"version": VERSION, "source": plain, "tokenizer": fingerprint(tokenizer)}
    if rules is None:
        return found
    return found | {
        "examples": {
            "version": EXAMPLES_VERSION,
            "records": SAVED_FORMATS[rules.records],
            "format": source.chat_format.name,
            "loss_on": SAVED_LOSS_MASKS[rules.loss_on],
            "overlong": SAVED_OVERFLOWS[rules.overlong],
            "max_length": rules.max_length,
            "chat_template": tokenizer.chat_template,
            "stop_ids": list(tokenizer.stop_ids),
            **{key: value for key in ("classes", "margins", "negatives") if (value := _plain(getattr(rules, key)))},
        }
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def shard_folder(
    root: Path, name: str, source: SourceConfig, tokenizer: Tokenizer, rules: EncodingConfig | None = None
) -> Path:
    """Where the shards of a source stand: other settings, another folder."""
    return root / f"{name}-{_sha(settings(source, tokenizer, rules))[:12]}"


def prepare_source(
    source: SourceConfig,
    tokenizer: Tokenizer,
    folder: Path,
    progress: Progress = lambda *_: None,
    *,
    rules: EncodingConfig | None = None,
    max_bad_share: float = 1.0,
) -> Manifest:
    """Tokenises what is not tokenised yet and returns the manifest. With `encoding`, records are conversations.

    Raises: ValueError where nothing in the source can be used, or more than `max_bad_share` cannot, saying why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = settings(source, tokenizer, rules)
    units, of_record = source.units(), 1 if rules is None else rules.examples_per_record
    shards, tokens = [], 0
    left = source.max_documents
    for index, unit in enumerate(units):
        made_of = {"settings": _sha(wanted), "unit": _state_of(unit), "left": left}
        shard = _finished(folder, index, made_of)
        if shard is None:
            shard = _make_shard(source, tokenizer, unit, folder / f"shard_{index:05d}", made_of, left, rules)
        shards.append(shard)
        documents = sum(shard["counts"][split]["documents"] for split in SPLITS)
        left = None if left is None else left - documents // of_record
        tokens += sum(shard["counts"][split]["tokens"] for split in SPLITS)
        progress(index + 1, len(units), tokens)
    manifest = _manifest(wanted, shards)
    if not manifest["counts"]["train"]["tokens"]:
        raise ValueError(f"source {source.kind}: no text to train on{_reasons(manifest['bad_records'])}")
    _refuse_too_many(source, manifest, max_bad_share)
    _write(folder / MANIFEST, manifest)
    return Manifest(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """What `prepare_source` left there. Raises: ValueError where it has not, or not on a disk that is seen here."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(
            f"{path} is not there: process 0 has prepared this source, but on a disk that this process does not see; "
            "let `runs` (or `data.cache_dir`) be on storage that all hosts share, or in an object store"
        )
    return Manifest(folder, json.loads(path.read_text()))


class ShardCache:
    """Prepared folders that an object store keeps, and their copies on this machine: hosts need share no disk."""

    def __init__(self, url: str | None, root: Path, folders: list[Path]):
        """Without a `url` there is only `root`, and nothing is done."""
        self._stores = {} if url is None else {f: Store(f"{url}/{f.relative_to(root).as_posix()}") for f in folders}

    def fetch(self) -> None:
        """Downloads what is whole there and different here."""
        for folder, store in self._stores.items():
            manifest = store.read(MANIFEST)
            if manifest is None or _content(folder / MANIFEST) == manifest:
                continue
            (folder / MANIFEST).unlink(missing_ok=True)
            store.get([name for name in store.top()[0] if name != MANIFEST], folder)
            store.get([MANIFEST], folder)

    def send(self) -> None:
        """Uploads what is not there yet, the manifest last."""
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


def _refuse_too_many(source: SourceConfig, manifest: dict[str, Any], max_bad_share: float) -> None:
    bad = sum(e["count"] for reasons in manifest["bad_records"].values() for e in reasons.values())
    total = bad + sum(manifest["counts"][split]["documents"] for split in SPLITS)
    if bad > max_bad_share * total:
        raise ValueError(
            f"data.max_bad_fraction={max_bad_share:g}: {bad:,} of {total:,} records of source {source.kind} cannot be used"
            f"{_reasons(manifest['bad_records'])}; mend them, or allow more (for those that are too long: a longer "
            "data.seq_len, or data.on_overflow=truncate)"
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
    kinds = ("documents", "tokens", "bytes", *(("learnt", "shortened") if "examples" in wanted else ()))
    counts = {split: {what: sum(s["counts"][split][what] for s in shards) for what in kinds} for split in SPLITS}
    return {
        "settings": wanted,
        "fingerprint": _sha([wanted, [shard["content"] for shard in shards]]),
        "counts": counts,
        "bad_records": bad.found,
        "shards": shards,
    }


class _Document(NamedTuple):
    digest: bytes  # of what it was made of
    content: bytes  # what the fingerprint of the shard is made of
    size: int  # bytes of text
    ids: np.ndarray
    learnt: np.ndarray | None = None
    shortened: bool = False
    value: float = 0.0


def _documents(
    source: SourceConfig, tokenizer: Tokenizer, unit: SourceShard, bad: BadRecords, left: int | None
) -> Iterator[_Document]:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for batch in _batches(source.read(unit, bad), left):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            content = text.encode("utf-8", "surrogatepass")
            digest = hashlib.sha256(content).digest()
            yield _Document(digest, digest, len(content), np.array(tokenizer.begin(ids) + end))


def _examples(
    source: SourceConfig,
    tokenizer: Tokenizer,
    unit: SourceShard,
    bad: BadRecords,
    left: int | None,
    rules: EncodingConfig,
) -> Iterator[_Document]:
    # Templates are programs, and some ask for the date: the fingerprint is of what came out.
    for said, examples in itertools.islice(read_examples(source, unit, bad, tokenizer, rules), left):
        content = json.dumps(said, sort_keys=True).encode()
        for example in examples:  # those of a pair one after the other, on the same side of the split
            made = example.ids.astype("<i4").tobytes() + example.loss_mask.tobytes()
            made += np.array(example.value, "<f4").tobytes() if rules.margins else b""
            yield _Document(hashlib.sha256(content).digest(), hashlib.sha256(made).digest(), len(content), *example)


def _make_shard(
    source: SourceConfig,
    tokenizer: Tokenizer,
    unit: SourceShard,
    stem: Path,
    made_of: dict[str, Any],
    left: int | None,
    rules: EncodingConfig | None,
) -> dict[str, Any]:
    bad, content = BadRecords(), hashlib.sha256()
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    arrays: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    learnt: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    values: dict[str, list[float]] = {split: [] for split in SPLITS}
    sizes, shortened = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    if rules is None:
        found = _documents(source, tokenizer, unit, bad, left)
    else:
        found = _examples(source, tokenizer, unit, bad, left, rules)
    for document in found:
        content.update(document.content)
        # By content: a document keeps its side wherever it stands and whatever stands beside it.
        share = int.from_bytes(document.digest[:8], "big") / 2**64
        split = "heldout" if share < source.validation_fraction else "train"
        arrays[split].append(document.ids.astype(dtype))
        sizes[split] += document.size
        shortened[split] += document.shortened
        values[split].append(document.value)
        if document.learnt is not None:
            learnt[split].append(document.learnt)
    for split in SPLITS:
        lengths = np.array([0] + [len(a) for a in arrays[split]], np.int64)
        save = lambda what, array, split=split: _save(stem.with_name(f"{stem.name}.{split}.{what}.npy"), array)
        save("tokens", np.concatenate([np.zeros(0, dtype), *arrays[split]]))
        save("offsets", np.cumsum(lengths))
        if rules is not None:
            save("learnt", np.concatenate([np.zeros(0, bool), *learnt[split]]))
        if rules is not None and rules.margins:
            save("values", np.array(values[split], np.float32))
    counts: dict[str, dict[str, int]] = {
        s: {"documents": len(arrays[s]), "tokens": int(sum(map(len, arrays[s]))), "bytes": sizes[s]} for s in SPLITS
    }
    if rules is not None:
        for split in SPLITS:
            targets = sum(int(mask[1:].sum()) for mask in learnt[split])
            counts[split] |= {"learnt": targets, "shortened": shortened[split]}
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
        except OSError:  # a name on a hub, not a file
            found.append([file])
    return [found, unit.start, unit.stop]


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _save(path: Path, array: np.ndarray) -> None:
    with _whole(path) as file:
        try:
            np.save(file, array, allow_pickle=False)
        except OSError as error:  # NumPy says how much it could write, but no number of an error
            raise OSError(error.errno or errno.ENOSPC, f"{path} could not be written: {error}") from error


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
    held out instead: of n tokens the first int(n (1 - heldout_fraction)) are trained on. Conversations are not cut:
    of those the last ones are held out whole.
    """

    def __init__(self, manifest: Manifest, split: str):
        shards = [s["name"] for s in manifest.content["shards"]]
        self.fingerprint = f"{manifest.fingerprint}:{split}"
        carve = self._splitting(manifest)
        source = "train" if carve and split == "heldout" else split
        load = lambda name, what: np.load(
            manifest.folder / f"{name}.{source}.{what}.npy", mmap_mode="r", allow_pickle=False
        )
        self._tokens = [load(name, "tokens") for name in shards]
        examples = manifest.content["settings"].get("examples", {})
        saved = examples.get("records", SAVED_FORMATS[DataFormat.text])
        records = next(format for format, name in SAVED_FORMATS.items() if name == saved)
        self.together = examples_per_record(records, examples.get("negatives", 0))
        # The class of a text is a target, and never a token to be read.
        self._beyond = int(records is DataFormat.classification)
        self._learnt = [load(name, "learnt") for name in shards] if manifest.masked else None
        offsets = [load(name, "offsets") for name in shards]
        self._shard = np.concatenate([np.full(len(o) - 1, i, np.int32) for i, o in enumerate(offsets)])
        self._start = np.concatenate([np.asarray(o[:-1]) for o in offsets])
        self.lengths = np.concatenate([np.diff(o) for o in offsets]) - self._beyond
        self._values = [load(name, "values") for name in shards] if examples.get("margins") else None
        self._number = np.concatenate([np.arange(len(o) - 1) for o in offsets])  # in its shard
        fraction = manifest.content["settings"]["source"]["heldout_fraction"]
        if carve and manifest.masked:
            self._part(split, fraction)
        elif carve:
            self._split(split, fraction)

    @staticmethod
    def _splitting(manifest: Manifest) -> bool:
        fraction = manifest.content["settings"]["source"]["heldout_fraction"]
        return fraction > 0 and manifest.count("heldout", "documents") == 0

    def _split(self, split: str, fraction: float) -> None:
        longest, total = int(np.argmax(self.lengths)), int(self.lengths.sum())
        size = min(total - int(total * (1 - fraction)), int(self.lengths[longest]) // 2)
        if split == "train":
            self.lengths[longest] -= size
        else:
            at = slice(longest, longest + 1)
            self._shard, self._start = self._shard[at], self._start[at] + self.lengths[at] - size
            self.lengths = np.array([size], np.int64)

    def _part(self, split: str, fraction: float) -> None:
        last = min(max(1, round(self.num_documents * fraction)), self.num_documents // 2)
        last = -(-last // self.together) * self.together
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
        """Tokens [start, stop) of a document; less where it ends sooner."""
        return self._cut(self._tokens, index, start, stop)

    def learnt(self, index: int, start: int, stop: int) -> np.ndarray | None:
        """Which of the tokens [start, stop) are to be learnt; None where all are."""
        return None if self._learnt is None else self._cut(self._learnt, index, start, stop)

    def values(self, indices: Sequence[int]) -> np.ndarray:
        """[documents] f32: what is known of them beforehand."""
        assert self._values is not None
        return np.array([self._values[self._shard[i]][self._number[i]] for i in indices], np.float32)

    def _cut(self, arrays: list[np.ndarray], index: int, start: int, stop: int) -> np.ndarray:
        stop = min(stop, int(self.lengths[index]) + self._beyond)
        first = int(self._start[index])
        return arrays[self._shard[index]][first + start : first + stop]
