"""Records that are judged as a whole: a text and its class, or texts that belong together.

    {"text", "label"}, {"messages", "label"}     a text, or a conversation in any format of `data.records.chat_formats`
    {"anchor", "positive"}                       two texts that mean alike; `MATCHED` lists the other names

A class is a name out of `data.classes`, or its number there. "negative" is a text, or "negatives" a list of texts, that
should be told from the positive one; what is positive for other records of a batch is told from it anyway.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data.records.chat_formats import BadRow, Conversation, format_of, read_each, text_of, to_conversation
from data.records.record import BadRecords, Record
from data.sources.readers import SourceConfig, SourceShard

LABELS = ("label", "class", "category")
MATCHED = (
    ("anchor", "positive"),
    ("query", "positive"),
    ("query", "passage"),
    ("query", "document"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
)


class Labelled(NamedTuple):
    said: Conversation | str
    label: int  # of data.classes


class Match(NamedTuple):
    """Texts: the first belongs to the second, and not to any that follow."""

    texts: tuple[str, ...]


def read_labelled(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, classes: Sequence[str]
) -> Iterator[tuple[Record, Labelled]]:
    """Every usable record with its text and class; the others are counted."""
    text_field = getattr(source, "text_field", "text")

    def convert(record: Record) -> Labelled:
        label, format = to_label(record.fields, classes), format_of(source.chat_format, record.fields, text_field)
        return Labelled(to_conversation(record.fields, format, text_field), label)

    return read_each(source, unit, bad, convert)


def to_label(fields: Mapping[str, Any], classes: Sequence[str]) -> int:
    """Raises: BadRow where there is no class, or one that `classes` does not name."""
    name = next((name for name in LABELS if name in fields), None)
    if name is None:
        raise BadRow("no field 'label'", f"its fields: {', '.join(map(str, fields))[:200]}")
    value = fields[name]
    if isinstance(value, bool):
        value = int(value)
    if str(value) in classes:
        return list(classes).index(str(value))
    if isinstance(value, int) and 0 <= value < len(classes):
        return value
    raise BadRow(f"field {name!r} is none of data.classes", repr(value)[:60])


def read_matches(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, negatives: int
) -> Iterator[tuple[Record, Match]]:
    """Every usable record with its texts, 2 and `negatives` of them; the others are counted."""
    return read_each(source, unit, bad, lambda record: to_match(record.fields, negatives))


def to_match(fields: Mapping[str, Any], negatives: int) -> Match:
    """Raises: BadRow where a field is missing or no text, and where the two texts are one."""
    names = next((names for names in MATCHED if all(name in fields for name in names)), None)
    if names is None:
        raise BadRow("no two fields that belong together", f"its fields: {', '.join(map(str, fields))[:200]}")
    texts = [text_of(fields, name).strip() for name in names]
    if negatives:
        found = fields.get("negatives", fields.get("negative"))
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise BadRow("no field 'negative' or 'negatives' with texts")
        if len(found) < negatives:
            raise BadRow("fewer negatives than objective.negatives", f"{len(found)}")
        texts += [text.strip() for text in found[:negatives]]
    if not all(texts):
        raise BadRow("empty text")
    if texts[0] == texts[1]:
        raise BadRow("the two texts are the same")
    return Match(tuple(texts))
