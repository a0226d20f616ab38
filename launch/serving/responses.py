"""Converts generated tokens to OpenAI-compatible responses: text deltas, log-probabilities and stream events."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.tokenizers.tokenizer import Tokenizer
from launch.generation import StopText
from models.decode.engine import Event

LEAST = -9999.0  # represents minus infinity, which JSON does not support


class GeneratedToken(NamedTuple):
    """A generated token."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int  # start of its text in the completion, in characters


class TextDelta(NamedTuple):
    """Text and tokens that became final with one generated token."""

    text: str
    tokens: list[GeneratedToken]
    finish_reason: str | None


class Choice:
    """A completion in progress. Withholds text and tokens that may be part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, strip: bool):
        """`strip`: removes leading whitespace, which models produce with some chat templates."""
        self._fresh: list[str] = []
        self._text = StopText(tokenizer, stop, self._fresh.append)
        self._held: list[GeneratedToken] = []
        self._started = not strip
        self.num_tokens = 0  # excludes the end-of-sequence token

    def push(self, event: Event) -> TextDelta:
        """Adds a token. Must not be called after a delta with a finish reason."""
        if event.finish_reason == "eos":
            self._text.finish()
            return self._piece("stop")
        self.num_tokens += 1
        self._held.append(GeneratedToken(event.token, event.logprob, event.top, len(self._text.text)))
        if self._text.push(event.token):
            # Tokens of the stop string are not part of the completion.
            self._held = [written for written in self._held if written.offset < len(self._text.text)]
            return self._piece("stop")
        if event.finish_reason is not None:
            self._text.finish()
        return self._piece(event.finish_reason)

    def _piece(self, finish_reason: str | None) -> TextDelta:
        text = "".join(self._fresh)
        self._fresh.clear()
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        # A token of an incomplete character has that character's offset and is released with it.
        ready = [w for w in self._held if finish_reason is not None or w.offset < self._text.shown]
        self._held = self._held[len(ready) :]
        return TextDelta(text, ready, finish_reason)


@dataclass
class FullText:
    """A complete choice, assembled from its deltas."""

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
    """Returns text and bytes of a token; a special token has its name and no bytes."""
    piece = tokenizer.piece(token)
    if piece or token not in names:
        return piece.decode(errors="replace"), list(piece)
    return names[token], None


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST  # also replaces NaN


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[GeneratedToken]) -> dict[str, Any]:
    """Returns the `logprobs` of a chat choice."""
    names = {i: text for text, i in tokenizer.special_tokens.items()}

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, octets = _shown(tokenizer, token, names)
        return {"token": text, "logprob": _finite(logprob), "bytes": octets}

    content = [entry(w.token, w.logprob) | {"top_logprobs": [entry(t, p) for t, p in w.top]} for w in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
    """Returns the `logprobs` of a completion choice, with the bytes of the tokens.

    Tokens that are not valid UTF-8 are written as `bytes:\\x..`.
    """
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


def sse_event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"  # an SSE comment that keeps proxies from closing an idle connection


# Endpoints


class Chat:
    """Response format of /v1/chat/completions."""

    prefix, full_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def choice(self, index: int, full: FullText) -> dict[str, Any]:
        message = {"role": "assistant", "content": full.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(full.tokens),
            "finish_reason": full.finish_reason,
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
    """Response format of /v1/completions."""

    prefix, full_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def choice(self, index: int, part: FullText | TextDelta) -> dict[str, Any]:
        logprobs = completion_logprobs(self.tokenizer, part.tokens) if self.logprobs else None
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish_reason}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, piece: TextDelta) -> list[dict[str, Any]]:
        has_content = piece.text or piece.finish_reason is not None or (piece.tokens and self.logprobs)
        return [self.choice(index, piece)] if has_content else []


Shape = Chat | Text
