"""Records of a source, and counts of the unusable ones."""

import enum
from collections.abc import Iterator
from typing import Any, NamedTuple


class Record(NamedTuple):
    """A JSON-like object of a source, with its position for error messages."""

    fields: dict[str, Any]
    file: str
    where: str  # "line 7"


class RecordFormat(enum.Enum):
    """Field layout of records; see `data.records.chat_formats`."""

    auto = "auto"  # detected from the first record of each file with a known layout
    messages = "messages"
    sharegpt = "sharegpt"
    instruction = "instruction"
    completion = "completion"
    text = "text"


class BadRecords:
    """Counts of unusable input by file and reason, with the first position of each reason."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, dict[str, Any]]] = {}

    def add(self, file: str, reason: str, where: str = "") -> None:
        entry = self.found.setdefault(file, {}).setdefault(reason, {"count": 0, "first": where})
        entry["count"] += 1

    def merge(self, found: dict[str, dict[str, dict[str, Any]]]) -> None:
        for file, reasons in found.items():
            for reason, entry in reasons.items():
                mine = self.found.setdefault(file, {}).setdefault(reason, {"count": 0, "first": entry["first"]})
                mine["count"] += entry["count"]

    @property
    def count(self) -> int:
        return sum(entry["count"] for reasons in self.found.values() for entry in reasons.values())


def decode(content: bytes, file: str, bad: BadRecords, where: str = "") -> str | None:
    """Decodes UTF-8; binary data and other encodings are counted in `bad` and return None."""
    if b"\0" in content:
        bad.add(file, "binary", where)
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad.add(file, "not UTF-8", where or f"byte {error.start}")
        return None


def take_record(content: Any, file: str, bad: BadRecords, where: str) -> Iterator[Record]:
    """Yields the record if it is an object; counts it in `bad` otherwise."""
    if isinstance(content, dict):
        yield Record(content, file, where)
    else:
        bad.add(file, "not an object", where)


def take_text(record: Any, text_field: str, file: str, bad: BadRecords, where: str) -> Iterator[str]:
    """Yields the text of a record if it has one; counts the record in `bad` otherwise."""
    if not isinstance(record, dict):
        bad.add(file, "not an object", where)
    elif text_field not in record:
        bad.add(file, f"no field {text_field!r}", f"{where}; its fields: {', '.join(map(str, record))[:200]}")
    elif not isinstance(record[text_field], str):
        bad.add(file, f"field {text_field!r} is not a string", where)
    elif not record[text_field].strip():
        bad.add(file, "empty document", where)
    else:
        yield record[text_field]
