"""Parses published preference formats into pairs of a chosen and a rejected answer to one prompt.

    {"chosen": [message, ...], "rejected": [message, ...]}          full conversations with a common prompt
    {"chosen": "\\n\\nHuman: ...", "rejected": "\\n\\nHuman: ..."}      the same as transcripts (HH-RLHF)
    {"prompt" | "messages" | "conversations", "chosen", "rejected"} a string or messages, and two answers
    {"instruction", "input", "chosen", "rejected"}                  an instruction, and two answers

An answer is a string, a message or a list of messages. "system" and "tools" are optional.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data.records.chat_formats import (
    Conversation,
    InvalidRecord,
    instruction_text,
    message_list,
    read_each,
    read_tools,
    text_of,
)
from data.records.record import BadRecords, Record
from data.sources.readers import SourceConfig, SourceShard

SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Pair(NamedTuple):
    """Two conversations that differ only in the last assistant turn."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0  # margin of the chosen answer over the rejected one, if the record has it


def read_pairs(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, *, margins: bool = False
) -> Iterator[tuple[Record, Pair]]:
    """Yields every usable record with its pair; counts the others in `bad`. `margins` requires a "margin" field."""

    def convert(record: Record) -> Pair:
        pair = to_pair(record.fields)
        return pair._replace(margin=_margin(record.fields)) if margins else pair

    return read_each(source, unit, bad, convert)


def to_pair(fields: Mapping[str, Any]) -> Pair:
    """Parses a record. Raises: BadRow if a field is missing or invalid, or the answers are equal."""
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise InvalidRecord(f"no field {name!r}", f"its fields: {', '.join(map(str, fields))[:200]}")
    prompt = _prompt(fields)
    system = fields.get("system")
    if system not in (None, ""):
        prompt = [{"role": "system", "content": text_of(fields, "system")}, *prompt]
    chosen, rejected = ([*prompt, *_answer(fields[name], name, bool(prompt))] for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise InvalidRecord("chosen equals rejected")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise InvalidRecord(f"field {name!r} does not end with an assistant turn")
        if not (messages[-1]["content"] or "").strip() and not messages[-1].get("tool_calls"):
            raise InvalidRecord("empty answer", f"field {name!r}")
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRecord("chosen and rejected have different prompts")
    tools = read_tools(fields.get("tools"))
    return Pair(Conversation(chosen, tools), Conversation(rejected, tools))


def _margin(fields: Mapping[str, Any]) -> float:
    value = fields.get("margin")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRecord("field 'margin' is not a finite number", repr(value)[:60])
    return float(value)


def _prompt(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    for name in ("messages", "conversations", "prompt"):
        if name in fields:
            value = fields[name]
            if name == "prompt" and isinstance(value, str):
                if not value.strip():
                    raise InvalidRecord("empty prompt")
                return [{"role": "user", "content": value}]
            return message_list(value)
    return [{"role": "user", "content": instruction_text(fields)}] if "instruction" in fields else []


def _answer(value: Any, name: str, prompted: bool) -> list[dict[str, Any]]:
    if isinstance(value, Mapping):
        return message_list([value])
    if not isinstance(value, str):
        return message_list(value)
    return [{"role": "assistant", "content": value}] if prompted else _transcript(value, name)


def _transcript(text: str, name: str) -> list[dict[str, Any]]:
    parts = SPEAKER.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise InvalidRecord(f"field {name!r} is neither messages nor a transcript, and the record has no prompt")
    return [
        {"role": SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
