"""Range checks of single keys, declared in the metadata of config fields.

`field(default=1, metadata={"min": 1})`: `min` and `max` are inclusive, `above` and `below` exclusive. For a list or
dict the range applies to each element; null is always valid. `hint` is appended to the error, e.g. "0 disables it".
"""

import operator
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

_TESTS = {"min": operator.ge, "above": operator.gt, "max": operator.le, "below": operator.lt}
_WORDS = {"min": "at least", "above": "above", "max": "at most", "below": "below"}


def check_ranges(config: Any, path: str = "") -> None:
    """Checks all fields of a config dataclass and of nested ones. `path`: its key, e.g. "objective".

    Raises: ValueError naming the full key, its value, the range and the nearest valid value.
    """
    for key, value, allowed, hint in _ranged(config, path):
        for each in value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]:
            if each is not None and not _in_range(each, allowed):
                raise ValueError(f"{key}={value}: must be {describe_range(allowed)}{_nearest(each, allowed)}{hint}")


def _ranged(config: Any, path: str) -> Iterator[tuple[str, Any, dict[str, float], str]]:
    for one in fields(config):
        key, value = f"{path}.{one.name}".lstrip("."), getattr(config, one.name)
        if allowed := {bound: one.metadata[bound] for bound in _TESTS if bound in one.metadata}:
            yield key, value, allowed, f"; {one.metadata['hint']}" if "hint" in one.metadata else ""
        named = value.items() if isinstance(value, dict) else [(None, value)]
        for name, inner in named:
            if is_dataclass(inner):
                yield from _ranged(inner, key if name is None else f"{key}.{name}")


def _in_range(value: float, allowed: dict[str, float]) -> bool:
    return all(_TESTS[bound](value, limit) for bound, limit in allowed.items())


def describe_range(allowed: dict[str, float]) -> str:
    """Formats a range as text, e.g. "at least 0 and below 1"."""
    if allowed.keys() == {"min", "max"}:
        return f"from {allowed['min']:g} to {allowed['max']:g}"
    return " and ".join(f"{_WORDS[bound]} {allowed[bound]:g}" for bound in _TESTS if bound in allowed)


def _nearest(value: float, allowed: dict[str, float]) -> str:
    for bound, outside in (("min", lambda limit: value < limit), ("max", lambda limit: value > limit)):
        if bound in allowed and outside(allowed[bound]):
            return f"; nearest valid: {allowed[bound]:g}"
    return ""
