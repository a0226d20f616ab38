"""Chat templates: Jinja in a sandbox, as published checkpoints expect it, and which characters the assistant wrote.

The conventions (options of the environment, functions that templates may call, the `generation` tag) are those of
transformers, so that a published template gives the same text here as there.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Message = Mapping[str, Any]
# Templates are programs that others wrote: what they do with data they did not expect is any of these.
FAILURES = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


class Rendered(NamedTuple):
    text: str
    generated: list[tuple[int, int]]  # characters [begin, end) inside `generation` tags


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: puts marks around what is rendered inside."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own way

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.Name("generation_marks", "load")])
        return nodes.CallBlock(call, [], [], inside).set_lineno(line)

    def _mark(self, marks: Any, caller: Any) -> str:
        return marks[0] + caller() + marks[1]


class _Namespace(Namespace):
    """Jinja's, without names that begin with `_`: through those a template could reach what the sandbox hides."""

    def __init__(*args: Any, **given: Any) -> None:
        made, *rest = args
        for name in dict(*rest, **given):
            _Namespace._refuse(name)
        Namespace.__init__(made, *rest, **given)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._refuse(name)
        super().__setitem__(name, value)

    @staticmethod
    def _refuse(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}: must not begin with '_'")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter would write < and > as escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "namespace": _Namespace,
    }
    return made


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    try:
        return environment().from_string(template)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise ValueError(f"chat template{where}: {error}") from None


@lru_cache(maxsize=64)
def literals(template: str) -> tuple[str, ...]:
    """Texts that stand in a template, outside and inside its expressions."""
    _compiled(template)  # says where it is broken
    tree = environment().parse(template)
    data = [node.data for node in tree.find_all(nodes.TemplateData)]
    return (*data, *(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)))


@lru_cache(maxsize=64)
def marks_generation(template: str) -> bool:
    """Whether a template says itself what the assistant wrote."""
    _compiled(template)
    tree = environment().parse(template)
    return any(node.identifier == _Generation.identifier for node in tree.find_all(nodes.ExtensionAttribute))


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str],
    **extra: Any,
) -> str:
    """The text of a conversation; see `render_marked`."""
    given: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    return render_marked(template, messages, **given, special_tokens=special_tokens, **extra).text


def render_marked(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str],
    **extra: Any,
) -> Rendered:
    """The text of a conversation, and which part of it the template marks as written by the assistant.

    `special_tokens`: what the template knows as `bos_token`, `eos_token` and so on. `extra`: more of what a template
    may ask for (`documents`, `enable_thinking`, `date_string`). A template that asks for the date gives another text
    tomorrow; hand it `date_string`.
    Raises: ValueError where the template refuses, with its words and the message at which it begins to.
    """
    values = {"documents": None, **special_tokens, **extra, "add_generation_prompt": add_generation_prompt}
    values["tools"] = None if tools is None else list(tools)
    plain = _as_json([_aliased(message) for message in messages])
    values = _as_json(values)
    compiled = _compiled(template)
    marks = _unused_marks(json.dumps([template, plain, values], ensure_ascii=False))
    try:
        return _cut(compiled.render(messages=plain, generation_marks=marks, **values), marks)
    except FAILURES as error:
        at = _first_refused(compiled, plain, values, marks, str(error))
        raise ValueError(f"{at}the chat template refuses: {error}") from None


def _first_refused(compiled: jinja2.Template, messages: list, values: dict, marks: tuple[str, str], why: str) -> str:
    """`messages[i]: ` of the message with which the refusal comes; empty where it does not depend on them."""
    for count in range(len(messages)):
        try:
            compiled.render(messages=messages[:count], generation_marks=marks, **values)
        except FAILURES as error:
            if str(error) == why:
                return f"messages[{count - 1}]: " if count else ""
    return f"messages[{len(messages) - 1}]: " if messages else ""


def _as_json(value: Any) -> Any:
    """Plain lists, dicts, texts and numbers: a template gets nothing that has methods of ours."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"chat: {error}; give texts, numbers, lists and objects") from None


def _aliased(message: Message) -> dict[str, Any]:
    # As transformers has it: keys without a value are not there, and thoughts go by the names that templates use.
    kept = {key: value for key, value in message.items() if value is not None}
    thoughts = next((kept[name] for name in ("reasoning_content", "thinking", "reasoning") if name in kept), None)
    return kept if thoughts is None else {"thinking": thoughts, **kept, "reasoning_content": thoughts}


def _unused_marks(everything: str) -> tuple[str, str]:
    """Two texts that do not occur in what is rendered: nobody can write them into a message."""
    number = 0
    while f"\ufdd0{number}" in everything:
        number += 1
    return f"\ufdd0{number}\ufdd1", f"\ufdd0{number}\ufdd2"


def _cut(marked: str, marks: tuple[str, str]) -> Rendered:
    text, generated = "", []
    for piece in marked.split(marks[0]):
        inside, found, after = piece.partition(marks[1])
        if found:
            generated.append((len(text), len(text) + len(inside)))
        text += inside + after
    return Rendered(text, generated)
