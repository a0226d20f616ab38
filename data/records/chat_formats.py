"""Parses published fine-tuning formats into conversations; formats are detected by their fields.

    messages      {"messages": [{"role", "content"}, ...]}
    sharegpt      {"conversations": [{"from", "value"}, ...]}
    instruction   {"instruction", "input", "output" or "response"}, optional "history": [[question, answer], ...]
    completion    {"prompt", "completion" or "response"}: strings, or lists of messages
    text          {"text"}: a plain document; every token contributes to the loss

All but the last accept "system" and "tools"; a list may be JSON-encoded. Messages follow
`data.records.chat_encoding`. Unknown fields are ignored.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from data.records.chat_encoding import RENAMED, ROLES
from data.records.record import BadRecords, Record, RecordFormat
from data.sources.readers import SourceConfig, SourceShard

ANSWERS = {RecordFormat.instruction: ("output", "response"), RecordFormat.completion: ("completion", "response")}


T = TypeVar("T")


class InvalidRecord(ValueError):
    """An unusable record: a reason that is shared by many records, and the detail of this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Conversation(NamedTuple):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_conversations(
    source: SourceConfig, unit: SourceShard, bad: BadRecords
) -> Iterator[tuple[Record, Conversation | str]]:
    """Yields every usable record with its conversation, or its text; counts the others in `bad`.

    The first record with a known format sets the format of its file, so that a later record that lacks a field is
    reported as such and not read in another format.
    """
    formats: dict[str, RecordFormat] = {}
    text_field = getattr(source, "text_field", "text")

    def convert(record: Record) -> Conversation | str:
        if record.file not in formats:
            formats[record.file] = format_of(source.chat_format, record.fields, text_field)
        return to_conversation(record.fields, formats[record.file], text_field)

    return read_each(source, unit, bad, convert)


def read_each(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, convert: Callable[[Record], T]
) -> Iterator[tuple[Record, T]]:
    """Yields every record of a shard with its conversion; counts records for which `convert` raises BadRow."""
    for record in source.records(unit, bad):
        try:
            yield record, convert(record)
        except InvalidRecord as error:
            count_bad(bad, record, error)


def format_of(named: RecordFormat, fields: Mapping[str, Any], text_field: str = "text") -> RecordFormat:
    """Returns the configured format, or detects it if it is auto. Raises: BadRow as `find_format`."""
    return find_format(fields, text_field) if named is RecordFormat.auto else named


def count_bad(bad: BadRecords, record: Record, error: InvalidRecord) -> None:
    bad.add(record.file, error.reason, f"{record.where}: {error.detail}" if error.detail else record.where)


def find_format(fields: Mapping[str, Any], text_field: str = "text") -> RecordFormat:
    """Detects the format of a record by its fields. Raises: BadRow if no format matches."""
    if "messages" in fields:
        return RecordFormat.messages
    if "conversations" in fields:
        return RecordFormat.sharegpt
    if "instruction" in fields and _answer_of(fields, RecordFormat.instruction) is not None:
        return RecordFormat.instruction
    if "prompt" in fields and _answer_of(fields, RecordFormat.completion) is not None:
        return RecordFormat.completion
    if text_field in fields:
        return RecordFormat.text
    raise InvalidRecord("fields of no known format", _names(fields))


def to_conversation(fields: Mapping[str, Any], format: RecordFormat, text_field: str = "text") -> Conversation | str:
    """Parses a record. Raises: BadRow if a field is missing or invalid, or an answer is missing or empty."""
    if format is RecordFormat.text:
        return _filled(text_of(fields, text_field), "empty document")
    if format in (RecordFormat.messages, RecordFormat.sharegpt):
        messages = message_list(_field(fields, "messages" if format is RecordFormat.messages else "conversations"))
    elif format is RecordFormat.instruction:
        messages = _instruction(fields)
    else:
        messages = [
            *_turns(_field(fields, "prompt"), "prompt", "user"),
            *_turns(_field(fields, _answer_name(fields, format)), _answer_name(fields, format), "assistant"),
        ]
    system = fields.get("system")
    if system is not None and system != "":
        messages = [{"role": "system", "content": text_of(fields, "system")}, *messages]
    return _with_answers(Conversation(messages, read_tools(fields.get("tools"))))


def _with_answers(conversation: Conversation) -> Conversation:
    answers = [(i, m) for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    if not answers:
        raise InvalidRecord("no assistant turn")
    for i, message in answers:
        reasoning = any(message.get(key) for key in ("reasoning_content", "thinking", "reasoning"))
        if not (message["content"] or "").strip() and not message.get("tool_calls") and not reasoning:
            raise InvalidRecord("empty answer", f"message {i + 1}")
    return conversation


# Fields


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise InvalidRecord(f"no field {name!r}", _names(fields))
    return fields[name]


def text_of(fields: Mapping[str, Any], name: str) -> str:
    value = _field(fields, name)
    if not isinstance(value, str):
        raise InvalidRecord(f"field {name!r} is not a string", f"it is {_short(value)}")
    return value


def _filled(text: str, reason: str) -> str:
    if not text.strip():
        raise InvalidRecord(reason)
    return text


def _names(fields: Mapping[str, Any]) -> str:
    return f"its fields: {', '.join(map(str, fields))[:200]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _list(value: Any, name: str) -> list[Any]:
    """Parses a list, or the JSON of a list: table columns with one type often hold JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidRecord(f"field {name!r} is invalid JSON", _short(value)) from None
    if not isinstance(value, list):
        raise InvalidRecord(f"field {name!r} is not a list", f"it is {_short(value)}")
    return value


def _answer_of(fields: Mapping[str, Any], format: RecordFormat) -> str | None:
    return next((name for name in ANSWERS[format] if name in fields), None)


def _answer_name(fields: Mapping[str, Any], format: RecordFormat) -> str:
    return _answer_of(fields, format) or ANSWERS[format][0]


# Instructions and completions


def _instruction(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    question = instruction_text(fields)
    answer = text_of(fields, _answer_name(fields, RecordFormat.instruction))
    messages = []
    for pair in _list(fields.get("history") or [], "history"):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise InvalidRecord("field 'history' is not a list of string pairs", f"it has {_short(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def instruction_text(fields: Mapping[str, Any]) -> str:
    """Returns the instruction followed by its input."""
    instruction = text_of(fields, "instruction")
    context = "" if fields.get("input") is None else text_of(fields, "input")
    return _filled("\n\n".join(part for part in (instruction, context) if part.strip()), "empty instruction")


def _turns(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": _filled(value, "empty answer" if role == "assistant" else f"empty {name}")}]
    if isinstance(value, list):
        return message_list(value)
    raise InvalidRecord(f"field {name!r} is neither a string nor a list of messages", f"it is {_short(value)}")


# Messages


def message_list(value: Any) -> list[dict[str, Any]]:
    found = _list(value, "messages")
    if not found:
        raise InvalidRecord("no messages")
    return [_message(i, message) for i, message in enumerate(found)]


def _message(i: int, message: Any) -> dict[str, Any]:
    """Normalizes a message: `role` and `content` keys; content parts become one text, reasoning and tool calls."""
    where = f"message {i + 1}"
    if not isinstance(message, Mapping):
        raise InvalidRecord("a message is not an object", f"{where} is {_short(message)}")
    raw_role = message.get("role", message.get("from"))
    role = RENAMED.get(raw_role, raw_role) if isinstance(raw_role, str) else raw_role
    if role not in ROLES:
        raise InvalidRecord("unknown message role", f"{where}: {_short(raw_role)}")
    content = message.get("content", message.get("value"))
    rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value") and v is not None}
    if raw_role == "function_call":
        return {**rest, "role": role, "content": None, "tool_calls": _calls(content, where)}
    if isinstance(content, list):
        rest, content = _join_parts(content, rest, where)
    if "tool_calls" in rest:
        rest["tool_calls"] = [_call(call, where) for call in _list(rest["tool_calls"], "tool_calls")]
        if not rest["tool_calls"]:
            del rest["tool_calls"]
    if content is None and role != "assistant":
        raise InvalidRecord("a message without content", where)
    if not isinstance(content, str | None):
        raise InvalidRecord("message content is not a string", f"{where}: {_short(content)}")
    return {**rest, "role": role, "content": content if content is not None or rest.get("tool_calls") else ""}


def _join_parts(parts: list[Any], rest: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    texts, reasoning, calls = [], [], []
    for part in parts:
        if not isinstance(part, Mapping):
            raise InvalidRecord("a content part is not an object", f"{where}: {_short(part)}")
        kind = part.get("type")
        value = part.get("value", part.get(kind) if isinstance(kind, str) else None)
        if kind == "tool_call":
            calls += _calls(value, where)
        elif kind not in ("text", "reasoning", "thinking"):
            raise InvalidRecord(
                "a content part is neither text, reasoning nor a tool call", f"{where}: type {_short(kind)}"
            )
        elif not isinstance(value, str):
            raise InvalidRecord("a content part without text", where)
        else:
            (texts if kind == "text" else reasoning).append(value)
    if reasoning:
        rest = {**rest, "reasoning_content": "\n".join(reasoning)}
    if calls:
        rest = {**rest, "tool_calls": calls}
    return rest, "\n".join(texts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Parses one or several tool calls, possibly JSON-encoded, into OpenAI's format."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidRecord("a tool call is invalid JSON", f"{where}: {_short(value)}") from None
    return [_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRecord("a tool call without a name", f"{where}: {_short(call)}")
    function = {**function, "arguments": _parsed(function["arguments"])} if "arguments" in function else dict(function)
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _parsed(arguments: Any) -> Any:
    """Decodes JSON arguments (OpenAI's format) to an object (as templates expect); others are unchanged."""
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, Mapping) else arguments


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Parses tool definitions into OpenAI's format; None without tools."""
    if value is None or value == "":
        return None
    found = _list(value, "tools")
    for tool in found:
        if not isinstance(tool, Mapping):
            raise InvalidRecord("a tool is not an object", _short(tool))
    bare = lambda tool: "name" in tool and "function" not in tool and "type" not in tool
    return [{"type": "function", "function": dict(tool)} if bare(tool) else dict(tool) for tool in found] or None
