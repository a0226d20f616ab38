"""What varies in a sweep, and over which values: `KEY=2,4,8`, `KEY=1e-4..1e-2`, `KEY=log:1e-4..1e-2`."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import BooleanNode, DictConfig, EnumNode, FloatNode, IntegerNode, ListConfig, StringNode

RANGE = re.compile(r"(?P<log>log:)?(?P<low>[^:,]+?)\.\.(?P<high>[^:,]+)")
SHARED = re.compile(r"(task|sweep|run|runs|resume|launcher|launcher\..*|task\.(kind|sweep.*))")
WAYS = "give values, KEY=2,4,8, or a range, KEY=1e-4..1e-2 or KEY=log:1e-4..1e-2"


class Values(NamedTuple):
    """A list of values, as the command line has them."""

    values: tuple[str, ...]


class Range(NamedTuple):
    """All numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool
    whole: bool


Space = dict[str, Values | Range]  # by key


def varies(override: str) -> bool:
    """Whether an override of the command line gives several values."""
    key, _, value = override.partition("=")
    if key.startswith("~") or key in ("task.sample_prompt", "launcher.env", "task.sweep.parameters"):
        return False
    if ranged(value) is not None:
        return True
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return False  # Hydra will say it


def split_varying_keys(overrides: Sequence[str]) -> list[str]:
    """A command line on which keys that vary stand together: `++task.sweep.parameters={KEY:'VALUES',...}`.

    Raises: ValueError where a key that varies is added by +, which Hydra's grammar has no place for.
    """
    given = {o.partition("=")[0]: o.partition("=")[2] for o in overrides if varies(o)}
    for key in given:
        if not re.fullmatch(r"[\w.@/]+", key):
            raise ValueError(f"{key}={given[key]}: a key that varies is one that the config has, without {key[0]!r}")
    # ++, as the keys of a dict are new ones.
    rest = [f"++{o}" if o.startswith("task.sweep.parameters=") else o for o in overrides if not varies(o)]
    if not given:
        return rest
    escaped = {key: value.replace("\\", "\\\\").replace("'", "\\'") for key, value in given.items()}
    return [*rest, "++task.sweep.parameters={" + ",".join(f"{key}:'{value}'" for key, value in escaped.items()) + "}"]


def ranged(text: str) -> tuple[str, str, bool] | None:
    """`log:LOW..HIGH` as (LOW, HIGH, True); None where it is no range of numbers."""
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
    """`config`: a composed run, which knows what each key holds.

    Raises: ValueError naming key, value, reason and fix.
    """
    return {key: _read(key, str(text), _node(config, key)) for key, text in over.items()}


def _read(key: str, text: str, node: Any) -> Values | Range:
    given = f"{key}={text}"
    if SHARED.fullmatch(key):
        raise ValueError(f"{given}: is the same in all trials of a sweep; leave it out, or give one value")
    ends = ranged(text)
    if ends is not None:
        return _read_range(given, *ends, node)
    try:
        override = OverridesParser.create().parse_override(given)
        interval = override.is_interval_sweep()
        found = [] if interval or not override.is_sweep_override() else list(override.sweep_string_iterator())
    except HydraException as error:
        raise ValueError(f"{given}: {str(error).splitlines()[0]}; {WAYS}") from None
    values = tuple(dict.fromkeys(found))
    if interval:
        raise ValueError(f"{given}: write a range as {key}=LOW..HIGH, or {key}=log:LOW..HIGH")
    if len(values) < 2:
        raise ValueError(f"{given}: is one value; to vary it {WAYS}".replace("KEY", key))
    return Values(values)


def _read_range(given: str, low: str, high: str, log: bool, node: Any) -> Range:
    for end in (low, high):
        if not _is_number(end):
            raise ValueError(f"{given}: {end!r} is no number; a range goes from one to another")
    first, last = float(low), float(high)
    if isinstance(node, StringNode | BooleanNode | EnumNode | DictConfig | ListConfig):
        raise ValueError(f"{given}: this key holds no number; give its values, with commas")
    if first >= last:
        raise ValueError(f"{given}: a range goes from the smaller to the larger number")
    if log and first <= 0:
        raise ValueError(f"{given}: a logarithmic range begins above 0; leave log: out, or begin at {last / 1000:g}")
    literal = all(re.fullmatch(r"[+-]?\d+", end) for end in (low, high))
    whole = isinstance(node, IntegerNode) or (literal and not isinstance(node, FloatNode))
    if whole and not (first.is_integer() and last.is_integer()):
        raise ValueError(f"{given}: this key holds whole numbers; let the range begin and end with such")
    return Range(first, last, log, whole)


def _node(config: DictConfig, key: str) -> Any:
    """What holds the value of a key; None where there is none, as of a group."""
    node: Any = config
    for part in key.split("."):
        node = node._get_node(part, validate_access=False) if isinstance(node, DictConfig) else None
    return node


def spelt(space: Values | Range, value: Any) -> str:
    """A value of the space as an override has it; numbers of a range with four figures."""
    if isinstance(space, Values):
        return str(value)
    if space.whole:
        return str(int(value))
    short = f"{value:.4g}"
    return short if space.low <= float(short) <= space.high else repr(float(value))


def grid(space: Space) -> Iterator[dict[str, str]]:
    """Every combination, the last key fastest.

    Raises: ValueError naming a key with a range, which has no end of values.
    """
    for key, part in space.items():
        if isinstance(part, Range):
            raise ValueError(
                f"sweep.method=grid: {key} has a range, which no grid ends; give its values, such as "
                f"{key}={','.join(_some(part))}, or sweep.method=random"
            )
    columns = [part.values for part in space.values() if isinstance(part, Values)]
    for values in itertools.product(*columns):
        yield dict(zip(space, values, strict=True))


def _some(part: Range) -> list[str]:
    middle = math.sqrt(part.low * part.high) if part.log else (part.low + part.high) / 2
    return list(dict.fromkeys(spelt(part, value) for value in (part.low, middle, part.high)))


def kinds(space: Space) -> Iterator[dict[str, str]]:
    """Values of each key at least once, the ends of ranges: what is refused in one of these is refused at once."""
    options = {
        key: part.values if isinstance(part, Values) else (spelt(part, part.low), spelt(part, part.high))
        for key, part in space.items()
    }
    first = {key: values[0] for key, values in options.items()}
    yield first
    for key, values in options.items():
        for value in values[1:]:
            yield {**first, key: value}
