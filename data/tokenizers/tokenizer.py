"""Tokenizer interface, and the saved description that guards it: policy, chat template, probes.

The description is saved with every checkpoint. Loading a tokenizer re-encodes its probes and fails if an id differs:
a changed tokenizer would otherwise cause no error, only a worse model.
"""

import copy
import dataclasses
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

DESCRIPTION = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

# One for each known difference between library versions or between two conversions of one tokenizer.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\ta tab, trailing  ",
    "one\n\ntwo\r\n\n\nthree",
    "0123456789 3.14 1,000,000 ²",
    "日本語、中文 한국어",
    "na\u00efve nai\u0308ve \ufb01 \u00a0x",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "def f(x):\n    return {x: [1]}",
    "<s> </s> <pad> <|endoftext|><|im_start|>user\n<|im_end|>",
)


@dataclass(frozen=True)
class TokenizerPolicy:
    """BOS and stop tokens, and the chat template."""

    add_bos: bool = False  # prepend BOS, unless the text already has it
    stop_ids: tuple[int, ...] = ()  # tokens that stop generation; EOS first, if the tokenizer has it
    chat_template: str | None = None  # Jinja source for `data.records.chat_template.render`


class Spans(NamedTuple):
    """Tokens of a text with their character ranges [start, stop).

    Tokens of one character share its range, or the first ones have an empty range before it.
    """

    ids: list[int]
    characters: list[tuple[int, int]]


class Tokenizer(ABC):
    """Base of all tokenizer kinds. Immutable; `with_policy` and `with_special` return changed copies."""

    kind: ClassVar[str]
    library: ClassVar[str] = ""  # package whose version may change ids
    vocab_size: int
    bos_id: int | None
    eos_id: int | None  # appended to each document
    pad_id: int | None
    special_tokens: Mapping[str, int]  # text -> id of each control token
    policy: TokenizerPolicy = TokenizerPolicy()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encodes a text without adding or matching special tokens."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encodes many texts, on all cores if the library supports it."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def encode_special(self, text: str) -> Spans:
        """Encodes a text in which texts of special tokens are matched as such, as in a rendered chat."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; special tokens decode to nothing."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Returns [V] i32: UTF-8 bytes per token, 0 for special tokens; used for exact bits per byte."""

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """Returns the bytes of a token within a text: possibly part of a character; empty for special tokens."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns the JSON settings that define the tokenizer, in addition to `own_files`."""

    def own_files(self) -> dict[str, bytes]:
        """Returns the library's own files by name, without the description."""
        return {}

    @property
    def add_bos(self) -> bool:
        return self.policy.add_bos

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.policy.stop_ids

    @property
    def chat_template(self) -> str | None:
        return self.policy.chat_template

    @property
    def special_ids(self) -> dict[str, int | None]:
        return {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}

    @property
    def special_texts(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and `pad_token` as used by templates, without undefined ones."""
        texts = {i: text for text, i in self.special_tokens.items()}
        named = {f"{name[:3]}_token": texts.get(i) for name, i in self.special_ids.items() if i is not None}
        return {name: text for name, text in named.items() if text is not None}

    def with_policy(self, **changes: Any) -> Self:
        """Returns a copy with changes to the policy: `add_bos`, `stop_ids`, `chat_template`.

        Raises: ValueError for add_bos=True if the tokenizer has no BOS token.
        """
        made = copy.copy(self)
        policy = dataclasses.replace(self.policy, **changes)
        if policy.add_bos and self.bos_id is None:
            raise ValueError("tokenizer.add_bos=true: this tokenizer has no BOS token; remove the key")
        eos = () if self.eos_id is None else (self.eos_id,)
        made.policy = dataclasses.replace(policy, stop_ids=tuple(dict.fromkeys([*eos, *policy.stop_ids])))
        return made

    def with_special(self, texts: Sequence[str]) -> "Tokenizer":
        """Returns a copy with additional special tokens, numbered after the existing ids; known ones are unchanged."""
        new = [text for text in dict.fromkeys(texts) if text not in self.special_tokens]
        if not new:
            return self
        policy = {f.name: getattr(self.policy, f.name) for f in dataclasses.fields(TokenizerPolicy)}
        return self._with_added(new).with_policy(**policy)

    @abstractmethod
    def _with_added(self, texts: list[str]) -> "Tokenizer":
        """Returns a copy with new special tokens."""

    def add_bos_token(self, ids: list[int]) -> list[int]:
        """Prepends BOS if the policy requires it and the ids do not start with BOS already."""
        return [self.bos_id, *ids] if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def files(self) -> dict[str, bytes]:
        """Returns all files by name, including the description; `from_files` reads them."""
        files = self.own_files()
        if self.chat_template is not None:
            files[TEMPLATE] = self.chat_template.encode()
        return files | {DESCRIPTION: describe(self, files)}


def fingerprint(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 of everything that affects document tokens; excludes chat template and stop ids."""
    described = json.dumps({"kind": tokenizer.kind, **tokenizer.settings()}, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256()
    for name, content in sorted({**tokenizer.own_files(), DESCRIPTION: described.encode()}.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    if tokenizer.add_bos:
        digest.update(b"BOS")
    return digest.hexdigest()


def first_difference(before: Tokenizer, now: Tokenizer) -> str | None:
    """Returns the name of the first difference between two tokenizers; None if they are equal."""
    if fingerprint(before) != fingerprint(now):
        return "add_bos" if before.add_bos != now.add_bos else "vocabulary"
    fields = [f.name for f in dataclasses.fields(TokenizerPolicy)]
    return next((name for name in fields if getattr(before.policy, name) != getattr(now.policy, name)), None)


def between_special(text: str, special: Mapping[str, int], encode: Callable[[str], Spans]) -> Spans:
    """Splits a text at special tokens, longest match first, and encodes the parts between them separately."""
    if not special:
        return encode(text)
    ids: list[int] = []
    characters: list[tuple[int, int]] = []
    at = 0
    for piece in re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text):
        found = Spans([special[piece]], [(0, len(piece))]) if piece in special else encode(piece)
        ids += found.ids
        characters += [(at + start, at + stop) for start, stop in found.characters]
        at += len(piece)
    return Spans(ids, characters)


def describe(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> bytes:
    """Returns the description that `check_ids` verifies; `files`: the other files by name."""
    policy = dataclasses.asdict(tokenizer.policy)
    del policy["chat_template"]  # saved as a separate file
    texts = [*PROBES, "".join(sorted(tokenizer.special_tokens)[:32])]
    described = {
        "kind": tokenizer.kind,
        **tokenizer.settings(),
        "policy": policy | tokenizer.special_ids,
        "special_tokens": dict(tokenizer.special_tokens),
        "probes": [{"text": text, "ids": _ids(tokenizer, text)} for text in texts],
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
        "library": _installed(tokenizer.library),
    }
    return (json.dumps(described, indent=1, sort_keys=True) + "\n").encode()


def read_policy(
    description: Mapping[str, Any], files: Mapping[str, bytes], default: TokenizerPolicy
) -> TokenizerPolicy:
    """Reads the policy of saved files; files from before policies were saved get the `default`."""
    policy = description.get("policy")
    if policy is None:
        return default
    template = files[TEMPLATE].decode() if TEMPLATE in description["sha256"] else None
    return TokenizerPolicy(policy["add_bos"], tuple(policy["stop_ids"]), template)


def changed_file(description: Mapping[str, Any], files: Mapping[str, bytes]) -> str | None:
    """Returns the name of a file whose hash differs from the saved one. Raises: ValueError if one is missing."""
    digests: dict[str, str] = description.get("sha256", {})
    for name in digests:
        if name not in files:
            raise ValueError(f"tokenizer: {name} is missing; restore it, or use the tokenizer of a checkpoint")
    return next((name for name in digests if hashlib.sha256(files[name]).hexdigest() != digests[name]), None)


def refuse_changed(changed: str | None) -> None:
    if changed is not None:
        key = "tokenizer.chat_template=FILE" if changed == TEMPLATE else "tokenizer.path=FILE"
        raise ValueError(
            f"tokenizer: {changed} was changed after it was saved, and models depend on the old version; restore the "
            f"old file, or start a new run with the changed one: {key}"
        )


def check_ids(description: Mapping[str, Any], tokenizer: Tokenizer, changed: str | None) -> None:
    """Re-encodes the probes. Raises: ValueError naming the first probe with different ids, and the fix.

    `changed`: a file that is known to differ from the saved one.
    """
    saved_with, now = description.get("library", ""), _installed(tokenizer.library)
    if changed is None and saved_with != now:
        likely = f"it was saved with {saved_with}, but {now} is installed: install {saved_with.replace(' ', '==')}"
    else:
        likely = f"{changed or DESCRIPTION} was changed after it was saved: restore the old file"
    for probe in description.get("probes", ()):
        found, saved = _ids(tokenizer, probe["text"]), probe["ids"]
        if found != saved:
            raise ValueError(f"tokenizer: {probe['text']!r} was encoded as {saved} and is now {found}; {likely}")
    policy = description.get("policy", {})
    for name, found in tokenizer.special_ids.items():
        if policy and policy[name] != found:
            raise ValueError(f"tokenizer: {name} was {policy[name]} and is now {found}; {likely}")


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    try:
        return tokenizer.encode_special(text).ids
    except ValueError:  # a character without a token
        return None


def _installed(library: str) -> str:
    try:
        return f"{library} {version(library)}" if library else ""
    except PackageNotFoundError:
        return library
