"""What every tokenizer promises beyond its ids, and how the promise is kept: policy, template, probes.

All of it is saved with every checkpoint. Whoever reads a tokenizer encodes its probes anew and refuses where an id
differs: tokens of one tokenizer read with another give no error, only a model that is worse than it should be.
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

DESCRIPTION = "tokenizer_config.json"  # names the kind
TEMPLATE = "chat_template.jinja"

# One for each thing on which versions of a library, or two conversions of one tokenizer, have been seen to differ.
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
    """How texts begin and end, and what a chat looks like."""

    add_bos: bool = False  # a text begins with BOS, unless it does so already
    stop_ids: tuple[int, ...] = ()  # any of them ends what a model writes; EOS is the first, where there is one
    chat_template: str | None = None  # Jinja, as `data.chat.render` reads it


class Spans(NamedTuple):
    """Tokens of a text, and the characters [begin, end) that each came from.

    Several tokens of one character share it, or the first of them are empty and stand before it.
    """

    ids: list[int]
    characters: list[tuple[int, int]]


class Tokenizer(ABC):
    """What all kinds have in common; `policy` is theirs to change with `with_policy`, the rest never changes."""

    kind: ClassVar[str]
    library: ClassVar[str] = ""  # the package whose version may change ids
    vocab_size: int
    bos_id: int | None
    eos_id: int | None  # appended to each document
    pad_id: int | None
    special_tokens: Mapping[str, int]  # texts that stand for one control token each
    policy: TokenizerPolicy = TokenizerPolicy()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Tokens of the text alone, without special ones."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts, on all cores where the library can."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def encode_special(self, text: str) -> Spans:
        """Tokens of a text in which the texts of special tokens stand for them, as in a rendered chat."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens have none."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """[V] i32: bytes of text that each token stands for, 0 for special ones; makes bits per byte exact."""

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for inside a text: half a character at times, empty for special tokens."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What defines it beside `own_files`."""

    def own_files(self) -> dict[str, bytes]:
        """Its own files, without the description."""
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
        """`bos_token`, `eos_token`, `pad_token` as templates know them; without those that it does not have."""
        texts = {i: text for text, i in self.special_tokens.items()}
        named = {f"{name[:3]}_token": texts.get(i) for name, i in self.special_ids.items() if i is not None}
        return {name: text for name, text in named.items() if text is not None}

    def with_policy(self, **changes: Any) -> Self:
        """The same tokenizer with another policy: `add_bos`, `stop_ids`, `chat_template`.

        Raises: ValueError where a text shall begin with a BOS that there is not.
        """
        made = copy.copy(self)
        policy = dataclasses.replace(self.policy, **changes)
        if policy.add_bos and self.bos_id is None:
            raise ValueError("tokenizer.add_bos=true: this tokenizer has no BOS token; leave it out")
        eos = () if self.eos_id is None else (self.eos_id,)
        made.policy = dataclasses.replace(policy, stop_ids=tuple(dict.fromkeys([*eos, *policy.stop_ids])))
        return made

    def with_special(self, texts: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with more special tokens, beyond its ids; those that it has stay as they are."""
        new = [text for text in dict.fromkeys(texts) if text not in self.special_tokens]
        if not new:
            return self
        policy = {f.name: getattr(self.policy, f.name) for f in dataclasses.fields(TokenizerPolicy)}
        return self._grown(new).with_policy(**policy)

    @abstractmethod
    def _grown(self, texts: list[str]) -> "Tokenizer":
        """With special tokens that it does not have."""

    def begin(self, ids: list[int]) -> list[int]:
        """The ids of a text, after BOS where the policy says so; never after two."""
        return [self.bos_id, *ids] if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def files(self) -> dict[str, bytes]:
        """All of it, the contract included; `from_files` reads it again."""
        files = self.own_files()
        if self.chat_template is not None:
            files[TEMPLATE] = self.chat_template.encode()
        return files | {DESCRIPTION: describe(self, files)}


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of all that decides the tokens of a document; the chat template and where writing stops do not."""
    described = json.dumps({"kind": tokenizer.kind, **tokenizer.settings()}, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256()
    for name, content in sorted({**tokenizer.own_files(), DESCRIPTION: described.encode()}.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    if tokenizer.add_bos:
        digest.update(b"BOS")
    return digest.hexdigest()


def first_difference(before: Tokenizer, now: Tokenizer) -> str | None:
    """The name of something that two tokenizers do not agree on; None where they are one."""
    if fingerprint(before) != fingerprint(now):
        return "add_bos" if before.add_bos != now.add_bos else "vocabulary"
    fields = [f.name for f in dataclasses.fields(TokenizerPolicy)]
    return next((name for name in fields if getattr(before.policy, name) != getattr(now.policy, name)), None)


def between_special(text: str, special: Mapping[str, int], encode: Callable[[str], Spans]) -> Spans:
    """Cuts a text at the texts of special tokens, the longest first, and encodes what is between them by itself."""
    if not special:
        return encode(text)
    ids: list[int] = []
    characters: list[tuple[int, int]] = []
    at = 0
    for piece in re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text):
        found = Spans([special[piece]], [(0, len(piece))]) if piece in special else encode(piece)
        ids += found.ids
        characters += [(at + begin, at + end) for begin, end in found.characters]
        at += len(piece)
    return Spans(ids, characters)


def describe(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> bytes:
    """The description that `check_ids` reads again; `files`: the others by name."""
    policy = dataclasses.asdict(tokenizer.policy)
    del policy["chat_template"]  # a file of its own
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


def policy_of(description: Mapping[str, Any], files: Mapping[str, bytes], default: TokenizerPolicy) -> TokenizerPolicy:
    """The policy of saved files. Those saved before there was one get the `default`."""
    held = description.get("policy")
    if held is None:
        return default
    template = files[TEMPLATE].decode() if TEMPLATE in description["sha256"] else None
    return TokenizerPolicy(held["add_bos"], tuple(held["stop_ids"]), template)


def changed_file(description: Mapping[str, Any], files: Mapping[str, bytes]) -> str | None:
    """The name of a file that is not the one that was saved. Raises: ValueError where one is missing."""
    digests: dict[str, str] = description.get("sha256", {})
    for name in digests:
        if name not in files:
            raise ValueError(f"tokenizer: {name} is missing; put it back, or take the tokenizer of a checkpoint")
    return next((name for name in digests if hashlib.sha256(files[name]).hexdigest() != digests[name]), None)


def refuse_changed(changed: str | None) -> None:
    if changed is not None:
        key = "tokenizer.chat_template=FILE" if changed == TEMPLATE else "tokenizer.path=FILE"
        raise ValueError(
            f"tokenizer: {changed} was changed after it was saved, and models depend on it as it was; put the old "
            f"file back, or begin a run with the new one: {key}"
        )


def check_ids(description: Mapping[str, Any], tokenizer: Tokenizer, changed: str | None) -> None:
    """Raises: ValueError naming the first probe whose ids are others than when it was saved, and the way out.

    `changed`: a file that is known to be another one.
    """
    saved_with, now = description.get("library", ""), _installed(tokenizer.library)
    if changed is None and saved_with != now:
        likely = f"it was saved with {saved_with}, and this is {now}: install {saved_with.replace(' ', '==')}"
    else:
        likely = f"{changed or DESCRIPTION} was changed after it was saved: put the old file back"
    for probe in description.get("probes", ()):
        found, saved = _ids(tokenizer, probe["text"]), probe["ids"]
        if found != saved:
            raise ValueError(f"tokenizer: {probe['text']!r} gave the ids {saved} and now gives {found}; {likely}")
    held = description.get("policy", {})
    for name, found in tokenizer.special_ids.items():
        if held and held[name] != found:
            raise ValueError(f"tokenizer: {name} was {held[name]} and is now {found}; {likely}")


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    try:
        return tokenizer.encode_special(text).ids
    except ValueError:  # a character that this tokenizer has no token for
        return None


def _installed(library: str) -> str:
    try:
        return f"{library} {version(library)}" if library else ""
    except PackageNotFoundError:
        return library
