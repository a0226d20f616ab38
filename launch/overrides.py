"""Overrides of the command line, from what a user types to what Hydra's grammar takes."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple

from configs.reference import groups
from configs.schema import RunConfig
from configs.tasks import ALIASES, TASKS

# Keys whose value is taken as it is: Hydra's grammar would strip its spaces and read its brackets.
FREE_TEXT = ("task.prompt", "task.chat", "task.system")


def is_override(word: str) -> bool:
    """Whether a word of the command line sets or deletes a key."""
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


class Routes(NamedTuple):
    """Where keys of a command line go: `num_steps=10` becomes `task.num_steps=10`."""

    own: frozenset[str]  # fields of the task's class
    aliases: Mapping[str, str]  # further names of these
    shared: frozenset[str]  # keys of every run
    groups: frozenset[str]

    def route(self, override: str) -> str:
        """An override with `task.` in front where its key is the task's own; `+`, `++` and `~` stay in front.

        A key or a group of every run wins. Keys below a group's name are the task's where no run has them: `sweep=NAME`
        chooses an option, and `sweep.trials=8` is a key of the task.
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
    """The routes of a command with this task; of an unknown one those without keys of its own."""
    own = frozenset(f.name for f in fields(TASKS[task])) - {"kind"} if task in TASKS else frozenset()
    shared = frozenset(f.name for f in fields(RunConfig))
    return Routes(own, ALIASES.get(task, {}), shared, frozenset(groups()))


def quoted(override: str) -> str:
    """A prompt or a chat message in quotes, unless it has some.

    And [NAME=VALUE] of environment variables, which Hydra's grammar takes in quotes alone.
    """
    key, _, value = override.partition("=")
    if key == "launcher.env" and value[:1] == "[" and value[-1:] == "]" and not set(value) & set("'\""):
        entries = (entry.strip().replace("${", "\\${") for entry in value[1:-1].split(","))
        return f"{key}=[" + ",".join(f'"{entry}"' for entry in entries if entry) + "]"
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if key not in FREE_TEXT or value == "null" or is_quoted:
        return override
    value = value.replace("${", "\\${")
    return f"{key}='{value}'" if "'" not in value else f'{key}="' + value.replace('"', '\\"') + '"'
