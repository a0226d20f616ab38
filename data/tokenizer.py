"""Text to tokens and back: SentencePiece, `tokenizer.json`, raw bytes, characters.

A tokenizer is a few files; they are saved beside every checkpoint, and a fingerprint of them in everything made with
it, so that tokens of one are never read with another.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from omegaconf import MISSING

DESCRIPTION = "tokenizer_config.json"  # names the kind


class Tokenizer(Protocol):
    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None  # appended to each document
    pad_id: int | None

    def encode(self, text: str) -> list[int]:
        """Tokens of the text alone, without special ones."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts, on all cores where the library can."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self) -> np.ndarray:
        """[V] i32: bytes of text that each token stands for, 0 for special ones; makes bits per byte exact."""
        ...

    def files(self) -> dict[str, bytes]: ...


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that defines it."""
    digest = hashlib.sha256()
    for name, content in sorted(tokenizer.files().items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


class SentencePiece:
    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.processor.vocab_size()
        none = lambda i: None if i < 0 else i
        self.bos_id, self.eos_id = none(self.processor.bos_id()), none(self.processor.eos_id())
        self.pad_id = none(self.processor.pad_id())

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        p = self.processor

        def size(i: int) -> int:
            if p.is_control(i) or p.is_unknown(i):
                return 0
            return 1 if p.is_byte(i) else len(p.id_to_piece(i).replace("\u2581", " ").encode())

        return np.array([size(i) for i in range(self.vocab_size)], np.int32)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model, DESCRIPTION: _describe(self.kind)}


class TokenizerJson:
    """A Hugging Face `tokenizer.json`, through the `tokenizers` library alone."""

    kind = "tokenizer_json"

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

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.inner.encode_batch(texts, add_special_tokens=False)]

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

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.content, DESCRIPTION: _describe(self.kind, special=self.special)}


class Bytes:
    """UTF-8 bytes, then one token that ends a document."""

    kind = "bytes"
    vocab_size = 257
    bos_id, eos_id, pad_id = None, 256, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def files(self) -> dict[str, bytes]:
        return {DESCRIPTION: _describe(self.kind)}


class Characters:
    """One token a character of the corpus; nothing else, so that losses compare with nanoGPT's."""

    kind = "characters"
    bos_id, eos_id, pad_id = None, None, None

    def __init__(self, alphabet: str):
        self.alphabet = alphabet
        self.ids = {c: i for i, c in enumerate(alphabet)}
        self.vocab_size = len(alphabet)

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            raise ValueError(f"tokenizer=characters: {error.args[0]!r} did not occur in the training text") from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[int(i)] for i in ids)

    def token_bytes(self) -> np.ndarray:
        return np.array([len(c.encode()) for c in self.alphabet], np.int32)

    def files(self) -> dict[str, bytes]:
        return {DESCRIPTION: _describe(self.kind, alphabet=self.alphabet)}


def _describe(kind: str, **more: object) -> bytes:
    return (json.dumps({"kind": kind, **more}, indent=1, sort_keys=True) + "\n").encode()


def from_files(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer whose `files()` these are."""
    if DESCRIPTION not in files:
        raise ValueError(f"tokenizer: {DESCRIPTION} is missing; these files were not saved by this project")
    description = json.loads(files[DESCRIPTION])
    kind = description["kind"]
    if kind == "sentencepiece":
        return SentencePiece(files["tokenizer.model"])
    if kind == "tokenizer_json":
        return TokenizerJson(files["tokenizer.json"], description["special"])
    if kind == "characters":
        return Characters(description["alphabet"])
    if kind == "bytes":
        return Bytes()
    raise ValueError(f"tokenizer.kind={kind!r}: is none of sentencepiece, tokenizer_json, bytes, characters")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The description last: with it the folder is whole.
    for name, content in sorted(tokenizer.files().items(), key=lambda item: item[0] == DESCRIPTION):
        half = folder / (name + ".tmp")
        half.write_bytes(content)
        half.replace(folder / name)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None where there is none yet."""
    if not (folder / DESCRIPTION).exists():
        return None
    return from_files({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"})


Documents = Callable[[], Iterator[str]]


@dataclass
class TokenizerConfig:
    kind: str = ""

    def build(self, documents: Documents) -> Tokenizer:
        """`documents` iterates over the training text, for tokenizers that learn from it."""
        raise TypeError(f"tokenizer.kind={self.kind}: choose one with tokenizer=NAME")


@dataclass
class SentencePieceConfig(TokenizerConfig):
    kind: str = "sentencepiece"
    path: str | None = None  # a trained tokenizer.model; null: train one on the sources
    vocab_size: int = 8192  # of a trained one; text too small for it gives fewer
    train_bytes: int = 8_000_000  # of text that it is trained on, at most

    def build(self, documents: Documents) -> Tokenizer:
        if self.path is not None:
            if not Path(self.path).is_file():
                raise ValueError(f"tokenizer.path={self.path}: there is no such file; null trains one on the sources")
            return SentencePiece(Path(self.path).read_bytes())
        if self.vocab_size < 300:
            raise ValueError(f"tokenizer.vocab_size={self.vocab_size}: must be at least 300, 256 of them for bytes")
        return SentencePiece(self._train(documents()))

    def _train(self, documents: Iterable[str]) -> bytes:
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents, self.train_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=self.vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,  # no text is unknown
            split_digits=True,
            allow_whitespace_only_pieces=True,  # indentation is one token
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # decode(encode(x)) == x
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,  # the same model on every machine
            train_extremely_large_corpus=False,
            minloglevel=2,
        )
        return model.getvalue()


def _lines(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Text by lines, as the trainer wants it: it takes newlines for borders, and they have a token of their own."""
    seen = 0
    for document in documents:
        for line in document.split("\n"):
            if line:
                yield line.replace("\0", " ")
                seen += len(line.encode()) + 1
        if seen >= limit:
            return


@dataclass
class TokenizerJsonConfig(TokenizerConfig):
    kind: str = "tokenizer_json"
    path: str = MISSING  # tokenizer.json, or the folder that holds it
    bos: str | None = None  # texts of special tokens; null: those that tokenizer_config.json beside it names
    eos: str | None = None
    pad: str | None = None

    def build(self, documents: Documents) -> Tokenizer:
        path = Path(self.path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"tokenizer.path={self.path}: there is no tokenizer.json")
        beside = path.with_name(DESCRIPTION)
        named = json.loads(beside.read_text()) if beside.exists() else {}

        def special(name: str) -> str | None:
            token = getattr(self, name) or named.get(f"{name}_token")
            return token["content"] if isinstance(token, dict) else token

        return TokenizerJson(path.read_bytes(), {name: special(name) for name in ("bos", "eos", "pad")})


@dataclass
class BytesConfig(TokenizerConfig):
    kind: str = "bytes"

    def build(self, documents: Documents) -> Tokenizer:
        return Bytes()


@dataclass
class CharactersConfig(TokenizerConfig):
    kind: str = "characters"

    def build(self, documents: Documents) -> Tokenizer:
        alphabet: set[str] = set()
        for document in documents():
            alphabet.update(document)
        return Characters("".join(sorted(alphabet)))


class StreamDecoder:
    """Text of tokens as they come; half a character waits for the rest of it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.done = 0  # tokens whose text is out
        self.text = ""  # all text that is out

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self.ids.append(int(token))
        # Tokens before `done` are decoded along: some tokenizers write a token differently at the start.
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
        """What is still held back, with U+FFFD for a character that never became whole."""
        new = self.tokenizer.decode(self.ids[self.done :])
        self.done = len(self.ids)
        self.text += new
        return new
