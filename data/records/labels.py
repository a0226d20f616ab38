"""Parses labeled records: a text and its class, or an anchor text with its positive and negatives.

    {"text", "label"}, {"messages", "label"}     a text, or a conversation in any format of `data.records.chat_formats`
    {"anchor", "positive"}                       two texts with the same meaning; `MATCHED` lists the other field names

A class is a name from `data.classes` or its index. "negative" is a text and "negatives" a list of texts to contrast
with the positive; the positives of the other records in a batch serve as in-batch negatives in any case.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data.records.chat_formats import Conversation, InvalidRecord, format_of, read_each, text_of, to_conversation
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
    content: Conversation | str
    label: int  # index in data.classes


class Match(NamedTuple):
    """Texts for contrastive training: the anchor, its positive, then negatives."""

    texts: tuple[str, ...]


def read_labelled(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, classes: Sequence[str]
) -> Iterator[tuple[Record, Labelled]]:
    """Yields every usable record with its text and class; counts the others in `bad`."""
    text_field = getattr(source, "text_field", "text")

    def convert(record: Record) -> Labelled:
        label, format = to_label(record.fields, classes), format_of(source.chat_format, record.fields, text_field)
        return Labelled(to_conversation(record.fields, format, text_field), label)

    return read_each(source, unit, bad, convert)


def to_label(fields: Mapping[str, Any], classes: Sequence[str]) -> int:
    """Returns the class index of a record. Raises: BadRow if the class is missing or not in `classes`."""
    name = next((name for name in LABELS if name in fields), None)
    if name is None:
        raise InvalidRecord("no field 'label'", f"its fields: {', '.join(map(str, fields))[:200]}")
    value = fields[name]
    if isinstance(value, bool):
        value = int(value)
    if str(value) in classes:
        return list(classes).index(str(value))
    if isinstance(value, int) and 0 <= value < len(classes):
        return value
    raise InvalidRecord(f"field {name!r} is not one of data.classes", repr(value)[:60])


def read_matches(
    source: SourceConfig, unit: SourceShard, bad: BadRecords, negatives: int
) -> Iterator[tuple[Record, Match]]:
    """Yields every usable record with its 2 + `negatives` texts; counts the others in `bad`."""
    return read_each(source, unit, bad, lambda record: to_match(record.fields, negatives))


def to_match(fields: Mapping[str, Any], negatives: int) -> Match:
    """Returns the texts of a record. Raises: BadRow if a field is missing or not a string, or the texts are equal."""
    names = next((names for names in MATCHED if all(name in fields for name in names)), None)
    if names is None:
        raise InvalidRecord("no anchor and positive fields", f"its fields: {', '.join(map(str, fields))[:200]}")
    texts = [text_of(fields, name).strip() for name in names]
    if negatives:
        found = fields.get("negatives", fields.get("negative"))
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise InvalidRecord("no field 'negative' or 'negatives' with strings")
        if len(found) < negatives:
            raise InvalidRecord("fewer negatives than objective.negatives", f"{len(found)}")
        texts += [text.strip() for text in found[:negatives]]
    if not all(texts):
        raise InvalidRecord("empty text")
    if texts[0] == texts[1]:
        raise InvalidRecord("anchor and positive are equal")
    return Match(tuple(texts))
