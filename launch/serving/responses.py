"""From tokens to what OpenAI's clients read: pieces of text with their log-probabilities, answers, stream events."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.tokenizers.tokenizer import Tokenizer
from launch.generation import StopText
from models.decode.engine import Event

LEAST = -9999.0  # stands for minus infinity, which JSON cannot say


class GeneratedToken(NamedTuple):
    """A token of an answer."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int  # the character of the answer at which its text begins


class TextDelta(NamedTuple):
    """What became certain with one token."""

    text: str
    tokens: list[GeneratedToken]
    finish_reason: str | None


class Choice:
    """One answer while it is written. Text and tokens are held back while they may belong to a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, strip: bool):
        """`strip`: whether space at the very beginning is dropped, which some chat templates provoke."""
        self._fresh: list[str] = []
        self._text = StopText(tokenizer, stop, self._fresh.append)
        self._held: list[GeneratedToken] = []
        self._begun = not strip
        self.num_tokens = 0  # the one that ends it does not count

    def push(self, event: Event) -> TextDelta:
        """Nothing may follow a piece with a finish reason."""
        if event.finish_reason == "eos":
            self._text.finish()
            return self._piece("stop")
        self.num_tokens += 1
        self._held.append(GeneratedToken(event.token, event.logprob, event.top, len(self._text.text)))
        if self._text.push(event.token):
            # Tokens of the stop text are not part of the answer.
            self._held = [written for written in self._held if written.offset < len(self._text.text)]
            return self._piece("stop")
        if event.finish_reason is not None:
            self._text.finish()
        return self._piece(event.finish_reason)

    def _piece(self, finish_reason: str | None) -> TextDelta:
        text = "".join(self._fresh)
        self._fresh.clear()
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        # A token whose character is not whole has the offset of that character, and is let out with it.
        ready = [w for w in self._held if finish_reason is not None or w.offset < self._text.shown]
        self._held = self._held[len(ready) :]
        return TextDelta(text, ready, finish_reason)


@dataclass
class FullText:
    """A choice put together again from its pieces."""

    text: str = ""
    tokens: list[GeneratedToken] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: TextDelta) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


# Log-probabilities


def _shown(tokenizer: Tokenizer, token: int, names: Mapping[int, str]) -> tuple[str, list[int] | None]:
    """(text, bytes) of a token; a special one has its name and no bytes."""
    piece = tokenizer.piece(token)
    if piece or token not in names:
        return piece.decode(errors="replace"), list(piece)
    return names[token], None


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST  # true of NaN, too


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[GeneratedToken]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    names = {i: text for text, i in tokenizer.special_tokens.items()}

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, octets = _shown(tokenizer, token, names)
        return {"token": text, "logprob": _finite(logprob), "bytes": octets}

    content = [entry(w.token, w.logprob) | {"top_logprobs": [entry(t, p) for t, p in w.top]} for w in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
    """The `logprobs` of a completion's choice, and the tokens' bytes. Half a character is written as its bytes."""
    names = {i: text for text, i in tokenizer.special_tokens.items()}

    def text(token: int) -> str:
        shown, octets = _shown(tokenizer, token, names)
        if "\ufffd" in shown and octets is not None:
            return "bytes:" + "".join(f"\\x{octet:02x}" for octet in octets)
        return shown

    return {
        "tokens": [text(w.token) for w in tokens],
        "token_logprobs": [_finite(w.logprob) for w in tokens],
        "top_logprobs": [{text(t): _finite(p) for t, p in w.top} for w in tokens],
        "text_offset": [w.offset for w in tokens],
        "bytes": [_shown(tokenizer, w.token, names)[1] for w in tokens],
    }


# Server-sent events


def sent(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"
ALIVE = ": still at work\n\n"  # a comment, so that nothing between here and the client gives up


# The two endpoints


class Chat:
    """The shape of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def choice(self, index: int, whole: FullText) -> dict[str, Any]:
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(whole.tokens),
            "finish_reason": whole.finish_reason,
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def chunks(self, index: int, piece: TextDelta) -> list[dict[str, Any]]:
        found = []
        if piece.text or (piece.tokens and self.logprobs):
            found.append(self._chunk(index, {"content": piece.text}, self._logprobs(piece.tokens)))
        if piece.finish_reason is not None:
            found.append(self._chunk(index, {}) | {"finish_reason": piece.finish_reason})
        return found

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any] | None:
        return chat_logprobs(self.tokenizer, tokens) if self.logprobs else None


class Text:
    """The shape of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def choice(self, index: int, whole: FullText | TextDelta) -> dict[str, Any]:
        logprobs = completion_logprobs(self.tokenizer, whole.tokens) if self.logprobs else None
        return {"index": index, "text": whole.text, "logprobs": logprobs, "finish_reason": whole.finish_reason}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, piece: TextDelta) -> list[dict[str, Any]]:
        told = piece.text or piece.finish_reason is not None or (piece.tokens and self.logprobs)
        return [self.choice(index, piece)] if told else []


Shape = Chat | Text
