"""Reads multiple-choice questions from JSON lines, in the layouts of published evaluation sets.

| fields | layout | example |
|---|---|---|
| `query, choices, gold` | one context, several continuations | PIQA, ARC |
| `context_options, continuation, gold` | several contexts, one continuation | Winogrande |
| `context, continuation` | one continuation, correct if greedy decoding reproduces it | LAMBADA |
| `sentence_good, sentence_bad` or `sent_more, sent_less` | two texts; the first should win | BLiMP, CrowS-Pairs |
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """A text to score: only the continuation counts. Without a context, all tokens but the first count."""

    context: str
    continuation: str


class MultipleChoice(NamedTuple):
    options: tuple[Option, ...]
    gold: int  # index of the correct option; a single option is correct if every token of it is the argmax
    group: str  # subset of the evaluation set (BLiMP's UID); empty without subsets


PAIRS = (("sentence_good", "sentence_bad"), ("sent_more", "sent_less"))


def read_multiple_choice(path: Path, *, limit: int = 0, limit_each: int = 0) -> list[MultipleChoice]:
    """Returns the first `limit` questions, at most `limit_each` per group; 0 means all.

    Raises: ValueError naming file, line, field and reason.
    """
    if not path.is_file():
        raise ValueError(f"task.eval_tasks={path}: file not found")
    found: list[MultipleChoice] = []
    seen: Counter[str] = Counter()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if limit and len(found) >= limit:
                break
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: is not JSON: {error}") from None
            question = _question(row, where)
            seen[question.group] += 1
            if not limit_each or seen[question.group] <= limit_each:
                found.append(question)
    if not found:
        raise ValueError(f"task.eval_tasks={path}: contains no questions")
    return found


def _question(row: Any, where: str) -> MultipleChoice:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object, not {type(row).__name__}")
    for good, bad in PAIRS:
        if good in row and bad in row:
            texts = _text(row, good, where), _text(row, bad, where)
            return MultipleChoice(tuple(Option("", text) for text in texts), 0, str(row.get("UID", "")))
    # The separating space is part of the continuation: tokens carry their leading space.
    if "query" in row and "choices" in row:
        query, choices = _text(row, "query", where), _texts(row, "choices", where)
        return MultipleChoice(tuple(Option(query, " " + c) for c in choices), _gold(row, len(choices), where), "")
    if "continuation" in row:
        continuation = " " + _text(row, "continuation", where)
        if "context_options" in row:
            contexts = _texts(row, "context_options", where)
            return MultipleChoice(
                tuple(Option(c, continuation) for c in contexts), _gold(row, len(contexts), where), ""
            )
        return MultipleChoice((Option(_text(row, "context", where), continuation),), 0, "")
    layouts = "query+choices+gold, context_options+continuation+gold, context+continuation, sentence_good+sentence_bad"
    raise ValueError(f"{where}: has the fields {', '.join(row)}; known layouts: {layouts}")


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise ValueError(f"{where}: {key}={row.get(key)!r}: must be a non-empty string")
    return row[key]


def _texts(row: dict[str, Any], key: str, where: str) -> list[str]:
    texts = row[key]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t for t in texts):
        raise ValueError(f"{where}: {key}: must be a list of at least two non-empty strings")
    return texts


def _gold(row: dict[str, Any], count: int, where: str) -> int:
    gold = row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < count:
        raise ValueError(f"{where}: gold={gold!r}: must be the index of the correct option, 0 to {count - 1}")
    return gold
