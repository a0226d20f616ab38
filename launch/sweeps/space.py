"""Search space of a sweep, in command-line syntax: `KEY=2,4,8`, `KEY=1e-4..1e-2`, `KEY=log:1e-4..1e-2`."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import BooleanNode, DictConfig, EnumNode, FloatNode, IntegerNode, ListConfig, StringNode

RANGE = re.compile(r"(?P<log>log:)?(?P<low>[^:,]+?)\.\.(?P<high>[^:,]+)")
SHARED = re.compile(r"(task|sweep|run|output_dir|resume|launcher|launcher\..*|task\.(kind|sweep.*))")
SYNTAX = "give values, KEY=2,4,8, or a range, KEY=1e-4..1e-2 or KEY=log:1e-4..1e-2"


class Values(NamedTuple):
    """A list of values in command-line syntax."""

    values: tuple[str, ...]


class Range(NamedTuple):
    """All numbers from `low` to `high`, inclusive."""

    low: float
    high: float
    log: bool  # logarithmic scale
    is_integer: bool


Space = dict[str, Values | Range]  # by key


def is_sweep_override(override: str) -> bool:
    """Returns whether a command-line override specifies several values."""
    key, _, value = override.partition("=")
    if key.startswith("~") or key in ("task.sample_prompt", "launcher.env", "task.sweep.parameters"):
        return False
    if parse_range(value) is not None:
        return True
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False  # Hydra reports the error later


def split_varying_keys(overrides: Sequence[str]) -> list[str]:
    """Moves overrides with several values into `++task.sweep.parameters={KEY:'VALUES',...}`.

    Raises: ValueError if such a key has a prefix like +, which Hydra does not support here.
    """
    given = {o.partition("=")[0]: o.partition("=")[2] for o in overrides if is_sweep_override(o)}
    for key in given:
        if not re.fullmatch(r"[\w.@/]+", key):
            raise ValueError(f"{key}={given[key]}: a swept key must exist in the config; remove the {key[0]!r}")
    # ++, because the dict has no such keys yet.
    rest = [f"++{o}" if o.startswith("task.sweep.parameters=") else o for o in overrides if not is_sweep_override(o)]
    if not given:
        return rest
    escaped = {key: value.replace("\\", "\\\\").replace("'", "\\'") for key, value in given.items()}
    return [*rest, "++task.sweep.parameters={" + ",".join(f"{key}:'{value}'" for key, value in escaped.items()) + "}"]


def parse_range(text: str) -> tuple[str, str, bool] | None:
    """Parses `log:LOW..HIGH` as (LOW, HIGH, True); None if the text is not a numeric range."""
    found = RANGE.fullmatch(text.strip())
    if found is None or not (_is_number(found["low"]) or _is_number(found["high"])):
        return None
    return found["low"], found["high"], bool(found["log"])


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def read_space(over: Mapping[str, str], config: DictConfig) -> Space:
    """Parses the values of the swept keys. `config`: a composed config, which provides the type of each key.

    Raises: ValueError with key, value, reason and fix.
    """
    return {key: _read(key, str(text), _node(config, key)) for key, text in over.items()}


def _read(key: str, text: str, node: Any) -> Values | Range:
    given = f"{key}={text}"
    if SHARED.fullmatch(key):
        raise ValueError(f"{given}: must be the same in all trials of a sweep; remove it or give a single value")
    ends = parse_range(text)
    if ends is not None:
        return _read_range(given, *ends, node)
    try:
        override = OverridesParser.create().parse_override(given)
        interval = override.is_interval_sweep()
        found = [] if interval or not override.is_sweep_override() else list(override.sweep_string_iterator())
    except HydraException as error:
        raise ValueError(f"{given}: {str(error).splitlines()[0]}; {SYNTAX}") from None
    values = tuple(dict.fromkeys(found))
    if interval:
        raise ValueError(f"{given}: write a range as {key}=LOW..HIGH, or {key}=log:LOW..HIGH")
    if len(values) < 2:
        raise ValueError(f"{given}: a single value; to sweep it, {SYNTAX}".replace("KEY", key))
    return Values(values)


def _read_range(given: str, low: str, high: str, log: bool, node: Any) -> Range:
    for end in (low, high):
        if not _is_number(end):
            raise ValueError(f"{given}: {end!r} is not a number; write a range as LOW..HIGH")
    first, last = float(low), float(high)
    if isinstance(node, StringNode | BooleanNode | EnumNode | DictConfig | ListConfig):
        raise ValueError(f"{given}: this key is not numeric; list its values, separated by commas")
    if first >= last:
        raise ValueError(f"{given}: the lower end of a range must be less than the upper end")
    if log and first <= 0:
        raise ValueError(f"{given}: a logarithmic range must start above 0; remove log:, or start at {last / 1000:g}")
    literal = all(re.fullmatch(r"[+-]?\d+", end) for end in (low, high))
    is_integer = isinstance(node, IntegerNode) or (literal and not isinstance(node, FloatNode))
    if is_integer and not (first.is_integer() and last.is_integer()):
        raise ValueError(f"{given}: this key is an integer; both ends of the range must be integers")
    return Range(first, last, log, is_integer)


def _node(config: DictConfig, key: str) -> Any:
    """Returns the config node of a key; None if there is none, as for config groups."""
    node: Any = config
    for part in key.split("."):
        node = node._get_node(part, validate_access=False) if isinstance(node, DictConfig) else None
    return node


def format_value(space: Values | Range, value: Any) -> str:
    """Formats a value for an override; numbers of a range are rounded to four significant digits."""
    if isinstance(space, Values):
        return str(value)
    if space.is_integer:
        return str(int(value))
    short = f"{value:.4g}"
    return short if space.low <= float(short) <= space.high else repr(float(value))


def grid(space: Space) -> Iterator[dict[str, str]]:
    """Yields every combination; the last key varies fastest.

    Raises: ValueError for a key with a range, which has infinitely many values.
    """
    for key, part in space.items():
        if isinstance(part, Range):
            raise ValueError(
                f"sweep.method=grid: {key} has a range; a grid needs a list of values, such as "
                f"{key}={','.join(_examples(part))}; or use sweep.method=random"
            )
    columns = [part.values for part in space.values() if isinstance(part, Values)]
    for values in itertools.product(*columns):
        yield dict(zip(space, values, strict=True))


def _examples(part: Range) -> list[str]:
    middle = math.sqrt(part.low * part.high) if part.log else (part.low + part.high) / 2
    return list(dict.fromkeys(format_value(part, value) for value in (part.low, middle, part.high)))


def corner_points(space: Space) -> Iterator[dict[str, str]]:
    """Yields combinations that contain every listed value and the ends of every range, for validation up front."""
    options = {
        key: part.values if isinstance(part, Values) else (format_value(part, part.low), format_value(part, part.high))
        for key, part in space.items()
    }
    first = {key: values[0] for key, values in options.items()}
    yield first
    for key, values in options.items():
        for value in values[1:]:
            yield {**first, key: value}
