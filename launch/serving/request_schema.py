"""Request bodies: the supported parameters of OpenAI's API and their ranges.

An unsupported parameter is an error if it would change the output, and is ignored otherwise.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from data.records.chat_encoding import ROLES
from launch.config_errors import did_you_mean
from models.decode.engine import MAX_TOP_LOGPROBS
from models.decode.sampling import SamplingConfig

MAX_CHOICES = 128
MAX_STOPS = 4
GREEDY_BELOW = 1e-4  # lower temperatures decode greedily, as scaled logits would overflow float32

# Ignored, because they do not change the output: user identity, storage, latency.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prediction", "parallel_tool_calls")
IGNORED += ("prompt_cache_key", "prompt_cache_retention")
# Rejected, because they would change the output, except with these values, which have no effect.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
}

Stop = Annotated[str, Field(max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; accepted, but not implemented


class Body(Strict):
    """Parameters of both endpoints."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = None
    stop: str | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    # Extensions to OpenAI's parameters:
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        try:  # any part of the body may be encoded again later
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _refusal("body", "contains a lone surrogate, which is not valid Unicode text") from None
        except RecursionError:
            raise _refusal("body", "is nested too deeply") from None
        accepted = {}
        for name, value in given.items():
            if name in cls.model_fields:
                accepted[name] = value
            elif name in REFUSED:
                if not any(value == allowed and type(value) is type(allowed) for allowed in REFUSED[name]):
                    raise _refusal(name, "is not supported by this server and would change the output; remove it")
            elif name not in IGNORED:
                raise _refusal(name, f"unknown parameter{did_you_mean(name, cls.model_fields)}")
        return accepted

    @model_validator(mode="after")
    def _consistent(self) -> "Body":
        if self.stream_options is not None and not self.stream:
            raise _refusal("stream_options", "requires stream=true")
        if isinstance(self.stop, str) and len(self.stop) > 1000:
            raise _refusal("stop", "should have at most 1000 characters")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_new_tokens: int) -> SamplingConfig:
        """Returns the engine's sampling settings, with a random seed if none is given."""
        names = (field.name for field in fields(SamplingConfig))
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        found = replace(SamplingConfig(max_new_tokens=max_new_tokens, seed=secrets.randbits(32)), **given)
        temperature = found.temperature if found.temperature >= GREEDY_BELOW else 0.0
        return replace(found, temperature=temperature, top_p=max(found.top_p, 1e-6))  # top_p 0: only the top token


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A chat message. Other keys (`tool_calls`, `reasoning_content`, ...) are passed to the chat template unchanged."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """Returns the message for the chat template, with text parts joined by newlines."""
        content = self.content
        text = "\n".join(part.text for part in content) if isinstance(content, list) else content
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fitting(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise _refusal("top_logprobs", "requires logprobs=true")
        if self.tool_choice not in (None, "auto", "none"):
            raise _refusal("tool_choice", "must be 'auto' or 'none': this server cannot force a function call")
        return self


class CompletionBody(Body):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [list(self.prompt)] if isinstance(self.prompt[0], int) else list(self.prompt)  # type: ignore[list-item]


def _refusal(name: str, why: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{why}", {"param": name, "why": why})
