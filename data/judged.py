"""Records to answers that are good or not, each by itself (KTO's data): a conversation, and a label beside it.

{"prompt", "completion", "label": true}     or "messages", "conversations", "instruction" as in data.conversations
{"prompt", "chosen", "rejected"}            as in data.preferences: two answers, one good and one not
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data.conversations import BadRow, Conversation, format_of, read_each, to_conversation
from data.preferences import to_pair
from data.records import BadRecords, Record, RecordFormat
from data.sources import SourceConfig, Unit


class Judged(NamedTuple):
    """A conversation that ends with the assistant's turn, and whether that is as it should be."""

    conversation: Conversation
    good: bool


def read_judged(source: SourceConfig, unit: Unit, bad: BadRecords) -> Iterator[tuple[Record, Judged]]:
    """Every usable answer with its record, which a pair has two of; the others are counted."""
    for record, answers in read_each(source, unit, bad, lambda record: to_judged(record.fields, source.format)):
        for judged in answers:
            yield record, judged


def to_judged(fields: Mapping[str, Any], format: RecordFormat = RecordFormat.auto) -> list[Judged]:
    """Raises: BadRow where a field is missing or holds something else."""
    if "chosen" in fields and "rejected" in fields:
        pair = to_pair(fields)
        return [Judged(pair.chosen, True), Judged(pair.rejected, False)]
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
    return [Judged(conversation, bool(label))]


def with_next(found: Iterator[tuple[Record, Judged]]) -> Iterator[tuple[Record, Judged, Judged | None]]:
    """Each with the next answer of another record, the last with the first; None where there is no other record."""
    first: tuple[Record, Judged] | None = None
    waiting: list[tuple[Record, Judged]] = []
    for record, judged in found:
        first = first or (record, judged)
        if waiting and waiting[0][0] is not record:
            yield from ((*one, judged) for one in waiting)
            waiting = []
        waiting.append((record, judged))
    for record, judged in waiting:
        yield record, judged, first[1] if first and first[0] is not record else None
