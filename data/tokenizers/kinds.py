"""Tokenizer kinds: SentencePiece, `tokenizer.json`, bytes, characters.

A tokenizer is saved with every checkpoint: its own files and a description (`data/tokenizers/tokenizer.py`).
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from data.tokenizers.huggingface_tokenizer import TokenizerSettings, read_published
from data.tokenizers.tokenizer import (
    DESCRIPTION,
    Spans,
    Tokenizer,
    TokenizerPolicy,
    between_special,
    changed_file,
    check_ids,
    read_policy,
    refuse_changed,
)
from data.tokenizers.train_sentencepiece import train_sentencepiece


class SentencePiece(Tokenizer):
    """A SentencePiece `tokenizer.model`, plus control tokens with higher ids (`added`)."""

    kind = "sentencepiece"
    library = "sentencepiece"

    def __init__(self, model: bytes, added: Mapping[str, int] | None = None):
        import sentencepiece

        self.model = model
        self.processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
        own = p.vocab_size()
        self.added = {text: i for text, i in (added or {}).items() if i >= own}
        self.vocab_size = max([own, *(i + 1 for i in self.added.values())])
        none = lambda i: None if i < 0 else i
        self.bos_id, self.eos_id, self.pad_id = none(p.bos_id()), none(p.eos_id()), none(p.pad_id())
        self.special_tokens = {p.id_to_piece(i): i for i in range(own) if p.is_control(i)} | self.added
        self.policy = self.with_policy(add_bos=self.bos_id is not None).policy

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=os.cpu_count() or 1)

    def encode_special(self, text: str) -> Spans:
        def encode(piece: str) -> Spans:
            found = self.processor.encode(piece, return_type="offset_mapping")
            return Spans(found["ids"], found["offsets"])

        return between_special(text, self.special_tokens, encode)

    def decode(self, ids: Sequence[int]) -> str:
        own = self.processor.vocab_size()
        return self.processor.decode([int(i) for i in ids if i < own])

    def token_bytes(self) -> np.ndarray:
        p = self.processor

        def size(i: int) -> int:
            if p.is_control(i) or p.is_unknown(i):
                return 0
            return 1 if p.is_byte(i) else len(p.id_to_piece(i).replace("\u2581", " ").encode())

        sizes = np.zeros(self.vocab_size, np.int32)
        sizes[: p.vocab_size()] = [size(i) for i in range(p.vocab_size())]
        return sizes

    def piece(self, token: int) -> bytes:
        p = self.processor
        if token >= p.vocab_size() or p.is_control(token) or p.is_unknown(token):
            return b""
        text = p.id_to_piece(token)
        return bytes([int(text[3:5], 16)]) if p.is_byte(token) else text.replace("\u2581", " ").encode()

    def settings(self) -> dict[str, Any]:
        return {"added": self.added} if self.added else {}

    def _with_added(self, texts: list[str]) -> "SentencePiece":
        return SentencePiece(self.model, self.added | {text: self.vocab_size + i for i, text in enumerate(texts)})

    def own_files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model}


def _byte_of() -> dict[str, bytes]:
    # ByteLevel vocabularies write printable Latin-1 bytes as is, and the others, in order, from U+0100.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): bytes([b]) for b in printed} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


BYTE_OF = _byte_of()


class TokenizerJson(Tokenizer):
    """A Hugging Face `tokenizer.json`, loaded with the `tokenizers` library alone.

    `special`: texts of `bos`, `eos` and `pad`. Texts of special tokens are always encoded as those tokens.
    """

    kind = "tokenizer_json"
    library = "tokenizers"

    def __init__(self, content: bytes, special: dict[str, str | None]):
        try:
            from tokenizers import Tokenizer as HfTokenizer
        except ImportError:
            raise ValueError("tokenizer=tokenizer_json: needs the extra: pip install -e '.[tokenizers]'") from None
        self.content, self.special = content, special
        self.inner = HfTokenizer.from_str(content.decode())
        self.vocab_size = self.inner.get_vocab_size()
        find = lambda name: None if special.get(name) is None else self.inner.token_to_id(str(special[name]))
        self.bos_id, self.eos_id, self.pad_id = find("bos"), find("eos"), find("pad")
        known = {token.content for token in self.inner.get_added_tokens_decoder().values() if token.special}
        named = {str(text) for text in special.values() if text and self.inner.token_to_id(str(text)) is not None}
        self.inner.add_special_tokens(sorted(named - known))  # they have ids but are not yet matched in text
        self.added = self.inner.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(self.added.items()) if token.special}
        first = self.inner.encode("a", add_special_tokens=True).ids[:1]
        self.policy = self.with_policy(add_bos=self.bos_id is not None and first == [self.bos_id]).policy

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.inner.encode_batch(texts, add_special_tokens=False)]

    def encode_special(self, text: str) -> Spans:
        found = self.inner.encode(text, add_special_tokens=False)
        return Spans(found.ids, found.offsets)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        special = {i for i, token in self.inner.get_added_tokens_decoder().items() if token.special}
        byte_level = b'"ByteLevel"' in self.content
        sizes = np.zeros(self.vocab_size, np.int32)
        for piece, i in self.inner.get_vocab().items():
            if i in special:
                continue
            if len(piece) == 6 and piece.startswith("<0x"):
                sizes[i] = 1
            else:
                sizes[i] = len(piece) if byte_level else len(piece.replace("\u2581", " ").encode())
        return sizes

    def piece(self, token: int) -> bytes:
        added, text = self.added.get(token), self.inner.id_to_token(token)
        if text is None or (added is not None and added.special):
            return b""
        if added is not None:  # added tokens are stored as plain text
            return text.encode()
        if b'"ByteLevel"' in self.content:
            return b"".join(BYTE_OF[c] if c in BYTE_OF else c.encode() for c in text)
        if len(text) == 6 and text.startswith("<0x"):
            return bytes([int(text[3:5], 16)])
        return text.replace("\u2581", " ").encode()

    def settings(self) -> dict[str, Any]:
        return {"special": self.special}

    def _with_added(self, texts: list[str]) -> "TokenizerJson":
        inner = type(self.inner).from_str(self.content.decode())
        inner.add_special_tokens(texts)
        return TokenizerJson(inner.to_str().encode(), self.special)

    def own_files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.content}


class Bytes(Tokenizer):
    """UTF-8 bytes, one end-of-document token, and added special tokens."""

    kind = "bytes"
    bos_id, eos_id, pad_id = None, 256, None
    policy = TokenizerPolicy(stop_ids=(256,))

    def __init__(self, added: Sequence[str] = ()):
        self.added = list(added)
        # Matched as special tokens in rendered chats; in documents their texts are encoded as bytes.
        self.special_tokens = {text: 256 + i for i, text in enumerate(["<|endoftext|>", *added])}
        self.vocab_size = 256 + len(self.special_tokens)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_special(self, text: str) -> Spans:
        return between_special(text, self.special_tokens, lambda piece: _by_character(self, piece))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0] * (self.vocab_size - 256), np.int32)

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def settings(self) -> dict[str, Any]:
        return {"added": self.added} if self.added else {}

    def _with_added(self, texts: list[str]) -> "Bytes":
        return Bytes([*self.added, *texts])


class Characters(Tokenizer):
    """One token per character of the corpus and no others unless added; losses are comparable with nanoGPT's."""

    kind = "characters"
    bos_id, eos_id, pad_id = None, None, None

    def __init__(self, alphabet: str, added: Sequence[str] = ()):
        self.alphabet, self.added = alphabet, list(added)
        self.ids = {c: i for i, c in enumerate(alphabet)}
        self.special_tokens = {text: len(alphabet) + i for i, text in enumerate(added)}
        self.vocab_size = len(alphabet) + len(self.added)

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            raise ValueError(f"tokenizer=characters: {error.args[0]!r} is not in the training text") from None

    def encode_special(self, text: str) -> Spans:
        return between_special(text, self.special_tokens, lambda piece: _by_character(self, piece))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[int(i)] for i in ids if i < len(self.alphabet))

    def token_bytes(self) -> np.ndarray:
        return np.array([len(c.encode()) for c in self.alphabet] + [0] * len(self.added), np.int32)

    def piece(self, token: int) -> bytes:
        return self.alphabet[token].encode() if token < len(self.alphabet) else b""

    def settings(self) -> dict[str, Any]:
        return {"alphabet": self.alphabet} | ({"added": self.added} if self.added else {})

    def _with_added(self, texts: list[str]) -> "Characters":
        return Characters(self.alphabet, [*self.added, *texts])


def _by_character(tokenizer: Tokenizer, text: str) -> Spans:
    pairs = [(i, (at, at + 1)) for at, character in enumerate(text) for i in tokenizer.encode(character)]
    return Spans([i for i, _ in pairs], [span for _, span in pairs])


def from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """Loads a tokenizer from its saved `files()`.

    Raises: ValueError if a file is missing or changed, or a probe encodes to other ids than when it was saved.
    """
    if DESCRIPTION not in files:
        raise ValueError(f"tokenizer: {DESCRIPTION} is missing; these files were not saved by Meshwright")
    description = json.loads(files[DESCRIPTION])
    changed = changed_file(description, files)
    try:
        tokenizer = _of_kind(description, files)
    except Exception:
        refuse_changed(changed)  # more helpful than the library's error for a corrupt file
        raise
    policy = read_policy(description, files, tokenizer.policy)
    tokenizer = tokenizer.with_policy(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(TokenizerPolicy)})
    check_ids(description, tokenizer, changed)
    refuse_changed(changed)
    return tokenizer


def _of_kind(description: Mapping[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
    kind = description["kind"]
    if kind == "sentencepiece":
        return SentencePiece(files["tokenizer.model"], description.get("added"))
    if kind == "tokenizer_json":
        return TokenizerJson(files["tokenizer.json"], description["special"])
    if kind == "characters":
        return Characters(description["alphabet"], description.get("added", ()))
    if kind == "bytes":
        return Bytes(description.get("added", ()))
    raise ValueError(f"tokenizer.kind={kind!r}: must be one of sentencepiece, tokenizer_json, bytes, characters")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The description is written last: it marks the folder as complete.
    for name, content in sorted(tokenizer.files().items(), key=lambda item: item[0] == DESCRIPTION):
        partial = folder / (name + ".tmp")
        partial.write_bytes(content)
        partial.replace(folder / name)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Loads the tokenizer saved in a folder; None if the folder has none."""
    if not (folder / DESCRIPTION).exists():
        return None
    try:
        return from_files({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


Documents = Callable[[], Iterator[str]]


@dataclass
class TokenizerConfig:
    kind: str = ""
    # chat template or its file: chatml, gemma, llama3, mistral, plain; null: the tokenizer's own
    chat_template: str | None = None
    add_bos: bool | None = None  # prepend BOS to every text; null: as in the tokenizer's files
    special_tokens: list[str] = field(default_factory=list)  # special tokens to add if missing, such as '<|im_start|>'

    def build(self, documents: Documents) -> Tokenizer:
        """Builds the tokenizer. `documents` iterates over the training text, for tokenizers that are trained on it.

        `data.records.chat_encoding.configured` then applies the chat template and the policy of this config.
        """
        raise TypeError(f"tokenizer.kind={self.kind}: choose one with tokenizer=NAME")


@dataclass
class SentencePieceConfig(TokenizerConfig):
    """A SentencePiece model, read from a file or trained on the sources."""

    kind: str = "sentencepiece"
    path: str | None = None  # a trained tokenizer.model; null: train one on the sources
    vocab_size: int = 8192  # vocabulary size for training; a small corpus yields fewer tokens
    train_max_bytes: int = 8_000_000  # maximum bytes of training text

    def build(self, documents: Documents) -> Tokenizer:
        if self.path is not None:
            path = Path(self.path)
            path = path / "tokenizer.model" if path.is_dir() else path
            if not path.is_file():
                raise ValueError(f"tokenizer.path={self.path}: file not found; null trains one on the sources")
            saved = _load_saved(path.parent)
            if saved is not None:
                return saved
            published = read_published(path.parent)
            return _with_published(SentencePiece(path.read_bytes(), published.added), published)
        if self.vocab_size < 300:
            raise ValueError(f"tokenizer.vocab_size={self.vocab_size}: must be at least 300 (256 are byte tokens)")
        options = {"vocab_size": self.vocab_size, "limit": self.train_max_bytes, "special_tokens": self.special_tokens}
        return SentencePiece(train_sentencepiece(documents(), **options))


@dataclass
class TokenizerJsonConfig(TokenizerConfig):
    """A tokenizer.json of Hugging Face."""

    kind: str = "tokenizer_json"
    path: str = MISSING  # tokenizer.json, or the folder that contains it
    bos: str | None = None  # text of the BOS token; null: from tokenizer_config.json in the same folder
    eos: str | None = None  # text of the EOS token; null: from tokenizer_config.json
    pad: str | None = None  # text of the padding token; null: from tokenizer_config.json

    def build(self, documents: Documents) -> Tokenizer:
        path = Path(self.path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"tokenizer.path={self.path}: tokenizer.json not found")
        saved = _load_saved(path.parent)
        if saved is not None:
            return saved
        published = read_published(path.parent)
        special = {name: getattr(self, name) or text for name, text in published.special.items()}
        return _with_published(TokenizerJson(path.read_bytes(), special), published)


def _load_saved(folder: Path) -> Tokenizer | None:
    """Loads a tokenizer written by `save_tokenizer`, with its policy; None for other folders."""
    described = folder / DESCRIPTION
    return load_tokenizer(folder) if described.exists() and "kind" in json.loads(described.read_text()) else None


def _with_published(tokenizer: Tokenizer, published: TokenizerSettings) -> Tokenizer:
    add_bos = tokenizer.add_bos if published.add_bos is None else published.add_bos and tokenizer.bos_id is not None
    stops = tuple(i for i in published.stop_ids if i < tokenizer.vocab_size)
    return tokenizer.with_policy(add_bos=add_bos, stop_ids=stops, chat_template=published.chat_template)


@dataclass
class BytesConfig(TokenizerConfig):
    """The 256 bytes of UTF-8."""

    kind: str = "bytes"

    def build(self, documents: Documents) -> Tokenizer:
        return Bytes()


@dataclass
class CharactersConfig(TokenizerConfig):
    """The characters that the sources contain."""

    kind: str = "characters"

    def build(self, documents: Documents) -> Tokenizer:
        alphabet: set[str] = set()
        for document in documents():
            alphabet.update(document)
        return Characters("".join(sorted(alphabet)))


def build_tokenizer(
    config: TokenizerConfig, documents: Documents, missing: Callable[[Sequence[str]], list[str]] = lambda known: []
) -> Tokenizer:
    """Builds a tokenizer with the configured special tokens and those returned by `missing` for the known ones.

    A newly trained SentencePiece model includes them in its `vocab_size`; other kinds append them to their own ids.
    """
    if isinstance(config, SentencePieceConfig) and config.path is None:
        wanted = [*config.special_tokens, *missing(config.special_tokens)]
        config = dataclasses.replace(config, special_tokens=wanted)
    made = config.build(documents).with_special(config.special_tokens)
    return made.with_special(missing(list(made.special_tokens)))


class StreamDecoder:
    """Decodes a token stream incrementally; an incomplete UTF-8 character is held back."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.done = 0  # number of tokens already decoded
        self.text = ""  # text returned so far

    def push(self, token: int) -> str:
        """Adds a token; returns the text that it completes, empty while a character is incomplete."""
        self.ids.append(int(token))
        # Includes some tokens before `done`: some tokenizers decode a token differently at the start of a text.
        start = max(0, self.done - 8)
        before = self.tokenizer.decode(self.ids[start : self.done])
        now = self.tokenizer.decode(self.ids[start:])
        if now.endswith("\ufffd") and len(self.ids) - self.done < 4:
            return ""
        self.done = len(self.ids)
        new = now[len(before) :]
        self.text += new
        return new

    def flush(self) -> str:
        """Returns the remaining text, with U+FFFD for an incomplete character."""
        new = self.tokenizer.decode(self.ids[self.done :])
        self.done = len(self.ids)
        self.text += new
        return new
