"""Parses unpaired preferences (KTO): a conversation labeled desirable or undesirable.

{"prompt", "completion", "label": true}     or "messages", "conversations", "instruction" as in `chat_formats`
{"prompt", "chosen", "rejected"}            as in `preference`: one desirable and one undesirable answer
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data.records.chat_formats import Conversation, InvalidRecord, format_of, read_each, to_conversation
from data.records.preference_pairs import to_pair
from data.records.record import BadRecords, Record, RecordFormat
from data.sources.readers import SourceConfig, SourceShard


class UnpairedExample(NamedTuple):
    """A conversation that ends with an assistant turn, and whether that turn is desirable."""

    conversation: Conversation
    label: bool


def read_unpaired(source: SourceConfig, unit: SourceShard, bad: BadRecords) -> Iterator[tuple[Record, UnpairedExample]]:
    """Yields every usable answer with its record (a pair yields two); counts bad records in `bad`."""
    for record, answers in read_each(source, unit, bad, lambda record: to_unpaired(record.fields, source.chat_format)):
        for unpaired in answers:
            yield record, unpaired


def to_unpaired(fields: Mapping[str, Any], format: RecordFormat = RecordFormat.auto) -> list[UnpairedExample]:
    """Parses the one or two answers of a record. Raises: BadRow if a field is missing or invalid."""
    if "chosen" in fields and "rejected" in fields:
        pair = to_pair(fields)
        return [UnpairedExample(pair.chosen, True), UnpairedExample(pair.rejected, False)]
    if "label" not in fields:
        raise InvalidRecord("no field 'label'", f"its fields: {', '.join(map(str, fields))[:200]}")
    label = fields["label"]
    if label not in (True, False):  # 0 and 1, too
        raise InvalidRecord("field 'label' is neither true nor false", f"it is {label!r}"[:80])
    conversation = to_conversation(fields, format_of(format, fields))
    if isinstance(conversation, str):
        raise InvalidRecord("a text without a prompt")
    if conversation.messages[-1]["role"] != "assistant":
        raise InvalidRecord("the conversation does not end with an assistant turn")
    if len(conversation.messages) < 2:
        raise InvalidRecord("an answer without a prompt")
    return [UnpairedExample(conversation, bool(label))]


def pair_with_next(
    found: Iterator[tuple[Record, UnpairedExample]],
) -> Iterator[tuple[Record, UnpairedExample, UnpairedExample | None]]:
    """Pairs each answer with the next record's, the last with the first record's; None without another record."""
    first: tuple[Record, UnpairedExample] | None = None
    waiting: list[tuple[Record, UnpairedExample]] = []
    for record, unpaired in found:
        first = first or (record, unpaired)
        if waiting and waiting[0][0] is not record:
            yield from ((*one, unpaired) for one in waiting)
            waiting = []
        waiting.append((record, unpaired))
    for record, unpaired in waiting:
        yield record, unpaired, first[1] if first and first[0] is not record else None
