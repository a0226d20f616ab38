"""Problems with a right answer among several: JSON lines, in the shapes in which evaluations are published.

| fields | shape | example |
|---|---|---|
| `query, choices, gold` | one context, several continuations | PIQA, ARC |
| `context_options, continuation, gold` | several contexts, one continuation | Winogrande |
| `context, continuation` | one continuation, to be found word for word | LAMBADA |
| `sentence_good, sentence_bad`, or `sent_more, sent_less` | two texts, the first to be likelier | BLiMP, CrowS-Pairs |
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """A text to be scored: the continuation alone counts. Without a context, all but its first token does."""

    context: str
    continuation: str


class MultipleChoice(NamedTuple):
    options: tuple[Option, ...]
    gold: int  # the right one; with a single option it has to be the likeliest, token for token
    group: str  # BLiMP's UID, where there are parts


PAIRS = (("sentence_good", "sentence_bad"), ("sent_more", "sent_less"))


def read_multiple_choice(path: Path, *, limit: int = 0, limit_each: int = 0) -> list[MultipleChoice]:
    """The first `limit` problems, and the first `limit_each` of each group; 0: all.

    Raises: ValueError naming file, line, field and reason.
    """
    if not path.is_file():
        raise ValueError(f"task.eval_tasks={path}: there is no such file")
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
            problem = _problem(row, where)
            seen[problem.group] += 1
            if not limit_each or seen[problem.group] <= limit_each:
                found.append(problem)
    if not found:
        raise ValueError(f"task.eval_tasks={path}: holds no problem")
    return found


def _problem(row: Any, where: str) -> MultipleChoice:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object, not {type(row).__name__}")
    for good, bad in PAIRS:
        if good in row and bad in row:
            texts = _text(row, good, where), _text(row, bad, where)
            return MultipleChoice(tuple(Option("", text) for text in texts), 0, str(row.get("UID", "")))
    # The space between belongs to the continuation, as tokens begin with theirs.
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
    shapes = "query+choices+gold, context_options+continuation+gold, context+continuation, sentence_good+sentence_bad"
    raise ValueError(f"{where}: has the fields {', '.join(row)}; known shapes: {shapes}")


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise ValueError(f"{where}: {key}={row.get(key)!r}: must be a text")
    return row[key]


def _texts(row: dict[str, Any], key: str, where: str) -> list[str]:
    texts = row[key]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t for t in texts):
        raise ValueError(f"{where}: {key}: must be a list of at least two texts")
    return texts


def _gold(row: dict[str, Any], count: int, where: str) -> int:
    gold = row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < count:
        raise ValueError(f"{where}: gold={gold!r}: must be the number of the right one, 0 to {count - 1}")
    return gold
