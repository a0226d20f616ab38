"""Translates command-line overrides to Hydra's grammar."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple

from configs.reference import groups
from configs.schema import RunConfig
from configs.tasks import ALIASES, TASKS

# Keys with free text as value: Hydra's grammar would strip spaces and parse brackets.
FREE_TEXT = ("task.prompt", "task.chat", "task.system")


def is_override(word: str) -> bool:
    """Returns whether a command-line word sets or deletes a key."""
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


class Routes(NamedTuple):
    """Routes task keys of a command line: `num_steps=10` becomes `task.num_steps=10`."""

    own: frozenset[str]  # fields of the task's class
    aliases: Mapping[str, str]  # alternative names of these
    shared: frozenset[str]  # top-level keys of `RunConfig`
    groups: frozenset[str]

    def route(self, override: str) -> str:
        """Prefixes an override with `task.` if it sets a key of the task; `+`, `++` and `~` stay in front.

        Shared keys and groups take precedence. Keys below a group's name belong to the task if they are not shared:
        `sweep=NAME` selects an option, and `sweep.trials=8` is a key of the task.
        """
        found = re.match(r"(\+\+|\+|~)?(\w+)(\.)?", override)
        if found is None:
            return override
        sign, first, dot = found.groups("")
        name = self.aliases.get(first, first)
        if name not in self.own or first in self.shared or (first in self.groups and not dot):
            return override
        return f"{sign}task.{name}{override[found.end(2) :]}"


def routes_of(task: str) -> Routes:
    """Returns the routes of a task; for an unknown task, without task keys."""
    own = frozenset(f.name for f in fields(TASKS[task])) - {"kind"} if task in TASKS else frozenset()
    shared = frozenset(f.name for f in fields(RunConfig))
    return Routes(own, ALIASES.get(task, {}), shared, frozenset(groups()))


def quoted(override: str) -> str:
    """Quotes prompts and chat messages that are not quoted yet, and the NAME=VALUE items of `launcher.env`."""
    key, _, value = override.partition("=")
    if key == "launcher.env" and value[:1] == "[" and value[-1:] == "]" and not set(value) & set("'\""):
        entries = (entry.strip().replace("${", "\\${") for entry in value[1:-1].split(","))
        return f"{key}=[" + ",".join(f'"{entry}"' for entry in entries if entry) + "]"
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if key not in FREE_TEXT or value == "null" or is_quoted:
        return override
    value = value.replace("${", "\\${")
    return f"{key}='{value}'" if "'" not in value else f'{key}="' + value.replace('"', '\\"') + '"'
