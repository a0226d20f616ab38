"""Records to answers that are good or not, each by itself (KTO's data): a conversation, and a label beside it.

{"prompt", "completion", "label": true}     or "messages", "conversations", "instruction" as in data.conversations
{"prompt", "chosen", "rejected"}            as in data.preferences: two answers, one good and one not
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data.records.chat_formats import BadRow, Conversation, format_of, read_each, to_conversation
from data.records.preference import to_pair
from data.records.record import BadRecords, Record, RecordFormat
from data.sources.readers import SourceConfig, SourceShard


class UnpairedExample(NamedTuple):
    """A conversation that ends with the assistant's turn, and whether that is as it should be."""

    conversation: Conversation
    label: bool


def read_unpaired(source: SourceConfig, unit: SourceShard, bad: BadRecords) -> Iterator[tuple[Record, UnpairedExample]]:
    """Every usable answer with its record, which a pair has two of; the others are counted."""
    for record, answers in read_each(source, unit, bad, lambda record: to_unpaired(record.fields, source.chat_format)):
        for judged in answers:
            yield record, judged


def to_unpaired(fields: Mapping[str, Any], format: RecordFormat = RecordFormat.auto) -> list[UnpairedExample]:
    """Raises: BadRow where a field is missing or holds something else."""
    if "chosen" in fields and "rejected" in fields:
        pair = to_pair(fields)
        return [UnpairedExample(pair.chosen, True), UnpairedExample(pair.rejected, False)]
    if "label" not in fields:
        raise BadRow("no field 'label'", f"its fields: {', '.join(map(str, fields))[:200]}")
    label = fields["label"]
    if label not in (True, False):  # 0 and 1, too
        raise BadRow("field 'label' is neither true nor false", f"it is {label!r}"[:80])
    conversation = to_conversation(fields, format_of(format, fields))
    if isinstance(conversation, str):
        raise BadRow("a text without a prompt")
    if conversation.messages[-1]["role"] != "assistant":
        raise BadRow("it does not end with the assistant's turn")
    if len(conversation.messages) < 2:
        raise BadRow("an answer without a prompt")
    return [UnpairedExample(conversation, bool(label))]


def pair_with_next(
    found: Iterator[tuple[Record, UnpairedExample]],
) -> Iterator[tuple[Record, UnpairedExample, UnpairedExample | None]]:
    """Each with the next answer of another record, the last with the first; None where there is no other record."""
    first: tuple[Record, UnpairedExample] | None = None
    waiting: list[tuple[Record, UnpairedExample]] = []
    for record, judged in found:
        first = first or (record, judged)
        if waiting and waiting[0][0] is not record:
            yield from ((*one, judged) for one in waiting)
            waiting = []
        waiting.append((record, judged))
    for record, judged in waiting:
        yield record, judged, first[1] if first and first[0] is not record else None
