"""Error messages for configs that do not compose: the key, the value, the reason and the valid choices."""

import difflib
import re
from collections.abc import Collection, Iterable

from configs.reference import groups as option_groups
from configs.reference import option_names
from launch.help import keys_of_task, owners
from launch.key_hints import hint

GROUP_VALUE = "Config group override must be"  # prefix of Hydra's ValueError for `mesh=4`, which names no key


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?`, or the list of known words if none is similar."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    if len(known) <= 40:
        return f"; known: {', '.join(known)}"
    return ""


def explain(error: BaseException, overrides: list[str]) -> str:
    """Rewrites a Hydra or OmegaConf error as a message for users."""
    text = str(error)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
        text += "\n" + str(cause)
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        if re.search(r"is not in struct|Key '[^']*' not in", text):
            return _unknown_key(shown(key), overrides)
        return _wrong_value(shown(key), overrides, text)
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, option = match.group(1).rpartition("/")
        return f"{group}={option}: no such {group}{did_you_mean(option, option_names(group))}"
    if match := re.search(
        r"[Oo]verriding.*?'([^']+)'.*?No match in the defaults list|Could not override '([^']+)'", text
    ):
        return _unknown_key(shown(match.group(1) or match.group(2)), overrides)
    if text.startswith(GROUP_VALUE):
        for key in named_keys(overrides):
            number = re.fullmatch(r"[-+.\d]+|true|false|null", _given(key, overrides) or "", re.IGNORECASE)
            if number and any(known.startswith(f"{key}.") for known in _known_keys([])):
                return _wrong_value(key, overrides, text)
    if match := re.search(r"full_key: (\S+)", text):
        key = match.group(1)
        if re.search(r"Key '[^']*' (is )?not in", text):
            return _unknown_key(shown(key), overrides)
        return _wrong_value(shown(key), overrides, text)
    if "no viable alternative" in text or "mismatched input" in text or "token recognition" in text:
        return f"{text.splitlines()[0]}\nquote values with spaces, brackets or commas: 'key=\"a value\"'"
    return text.splitlines()[0]


def named_keys(overrides: list[str]) -> set[str]:
    """Returns the keys set on a command line."""
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def _given(key: str, overrides: list[str]) -> str | None:
    for override in reversed(overrides):  # the last one wins
        name, _, value = override.partition("=")
        if shown(name.lstrip("+~")) == key:
            return value
    return None


def _wrong_value(key: str, overrides: list[str], text: str) -> str:
    value = _given(key, overrides)
    given = f"{key}={value}" if value is not None else key
    if match := re.search(r"expected one of \[([^\]]*)\]", text):
        return f"{given}: must be one of {match.group(1)}{did_you_mean(value or '', match.group(1).split(', '))}"
    if match := re.search(r"could not be converted to (\w+)", text):
        wanted = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
        return f"{given}: must be {wanted.get(match.group(1), 'of type ' + match.group(1))}"
    known = [k.rpartition(".")[2] for k in _known_keys(overrides) if k.rpartition(".")[0] == key]
    if known:
        return f"{given}: is a group of keys and takes no value; set {key}.KEY=..., known: {', '.join(known)}"
    reason = next(line for line in text.splitlines() if line.strip() and "Error merging" not in line)
    return f"{given}: {reason.strip()}"


def _unknown_key(key: str, overrides: list[str]) -> str:
    unknown = f"{key}: no such key"
    known = _known_keys(overrides)
    if key in known:  # set by the experiment, for another option of the group
        group = key.partition(".")[0]
        value = _given(group, overrides)
        chosen = group if value is None else f"{group}={value}"
        return (
            f"{key}: set by the experiment, but {chosen} has no such key; use the experiment's {group} or drop the key"
        )
    advice = hint(key)
    if advice is not None and _fits(advice, known):
        return f"{unknown}; did you mean {_with_value(advice, key, overrides)!r}?"
    task = task_of(overrides)
    named = advice.partition("=")[0] if advice is not None else key
    others = [other for other in owners(named) if other != task]
    if others:
        instead = f"{named} is a key of {', '.join(others)}; `{task}` has no such key"
        return instead if named == key else f"{unknown}; {instead}"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if not near:  # the right name in the wrong place
        leaf = key.rsplit(".", 1)[-1]
        near = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:3]
        near = (
            near or [k for k in known if difflib.SequenceMatcher(None, k.rsplit(".", 1)[-1], leaf).ratio() > 0.75][:3]
        )
    if near:
        return f"{unknown}; did you mean {' or '.join(repr(n) for n in near)}?"
    parent = key.rsplit(".", 1)[0] if "." in key else ""
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    where = f"in {parent}" if parent else "at the top level"
    if siblings:
        return f"{unknown}; known {where}: {', '.join(k.rpartition('.')[2] for k in siblings)}"
    return f"{unknown}; `meshwright {task} --help all` lists all keys"


def _fits(advice: str, known: Collection[str]) -> bool:
    """Returns whether this command has the key of a hint, or gets it by the option that the hint selects."""
    *choices, last = advice.split()
    return bool(choices) or last.partition("=")[0] in known


def _with_value(advice: str, key: str, overrides: list[str]) -> str:
    """Completes a hint that names a group with the option closest to the given value."""
    value = _given(key, overrides)
    if advice not in option_groups() or value is None:
        return advice
    names = option_names(advice)
    near = [value] if value in names else difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    return f"{advice}={near[0]}" if near else advice


def explain_flag(word: str, following: str | None, task: str) -> str:
    """Suggests the KEY=VALUE form of a flag such as `--max_steps 10`, or of a single word."""
    key, equals, value = word.lstrip("-").partition("=")
    key = key.replace("-", "_")
    if not equals and word.startswith("-") and following is not None and not following.startswith("-"):
        value = following if "=" not in following else ""
    for group in (g for g in ("experiment", *option_groups()) if not word.startswith("-") and key in option_names(g)):
        option = f"[{key}]" if group in ("source", "tracker") else key
        return f"{word}: settings are written KEY=VALUE: did you mean {f'{group}={option}'!r}?"
    advice = hint(key) if key not in {known.path for known in keys_of_task(task)} else key
    if advice is None:
        near = difflib.get_close_matches(key, [known.path for known in keys_of_task(task)], n=1, cutoff=0.6)
        advice = near[0] if near else key
    setting = advice if "=" in advice.split()[-1] else f"{advice}={value or 'VALUE'}"
    return f"{word}: keys are written KEY=VALUE: {setting}"


def task_of(overrides: list[str]) -> str:
    """Returns the task of a command line."""
    return _given("task", overrides) or "train"


def shown(key: str) -> str:
    """Returns a key as users write it, without `task.`."""
    return key.removeprefix("task.")


def _known_keys(overrides: list[str]) -> list[str]:
    """Returns the group names and every key of the config composed from the command's group choices."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_module
    from omegaconf import DictConfig

    def walk(node: DictConfig, prefix: str) -> Iterable[str]:
        for key in node:
            path = f"{prefix}{key}"
            if key != "kind" and path != "task":
                yield shown(path)
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                yield from walk(child, f"{path}.")

    names = {"task", *option_groups()}
    groups = [word for word in overrides if word.partition("=")[0] in names]
    GlobalHydra.instance().clear()
    with initialize_config_module(config_module="configs", version_base="1.3"):
        try:
            node = compose("root", overrides=groups)
        except Exception:  # a group choice is invalid, too: suggest from the default config
            node = compose("root")
        return list(dict.fromkeys([*walk(node, ""), *option_groups()]))
