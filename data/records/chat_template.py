"""Renders Jinja chat templates in a sandbox and locates the assistant's characters.

The conventions (environment options, functions available to templates, the `generation` tag) are those of
transformers, so that a published template renders the same text.
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
# Errors that third-party templates raise on unexpected input.
FAILURES = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


class Rendered(NamedTuple):
    text: str
    generated: list[tuple[int, int]]  # characters [start, stop) inside `generation` tags


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: puts marks around the rendered body."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own convention

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.Name("generation_marks", "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, marks: Any, caller: Any) -> str:
        return marks[0] + caller() + marks[1]


class _Namespace(Namespace):
    """Jinja's namespace without attributes that start with `_`, which could escape the sandbox."""

    def __init__(*args: Any, **given: Any) -> None:
        made, *rest = args
        for name in dict(*rest, **given):
            _Namespace._check_name(name)
        Namespace.__init__(made, *rest, **given)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check_name(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}: must not start with '_'")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes < and > for HTML.
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
    """Returns the literal texts of a template, outside and inside its expressions."""
    _compiled(template)  # raises with the line of a syntax error
    tree = environment().parse(template)
    data = [node.data for node in tree.find_all(nodes.TemplateData)]
    return (*data, *(node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)))


@lru_cache(maxsize=64)
def marks_generation(template: str) -> bool:
    """Returns whether a template has `generation` tags."""
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
    """Renders a conversation as text; see `render_marked`."""
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
    """Renders a conversation as text with the character ranges inside `generation` tags.

    `special_tokens`: the template variables `bos_token`, `eos_token` and so on. `extra`: further template variables
    (`documents`, `enable_thinking`, `date_string`). A template that reads the current date renders differently every
    day; pass `date_string` to pin it.
    Raises: ValueError if the template fails, with its error and the first message that causes it.
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
        at = _first_failing(compiled, plain, values, marks, str(error))
        raise ValueError(f"{at}the chat template failed: {error}") from None


def _first_failing(compiled: jinja2.Template, messages: list, values: dict, marks: tuple[str, str], why: str) -> str:
    """Returns `messages[i]: ` for the first message that causes the error; empty if none does."""
    for count in range(len(messages)):
        try:
            compiled.render(messages=messages[:count], generation_marks=marks, **values)
        except FAILURES as error:
            if str(error) == why:
                return f"messages[{count - 1}]: " if count else ""
    return f"messages[{len(messages) - 1}]: " if messages else ""


def _as_json(value: Any) -> Any:
    """Converts to plain lists, dicts, strings and numbers, so that templates cannot reach our objects' methods."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"chat: {error}; use only strings, numbers, lists and objects") from None


def _aliased(message: Message) -> dict[str, Any]:
    # As in transformers: keys with null values are removed, and reasoning is available under both common names.
    present = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((present[name] for name in names if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def _unused_marks(everything: str) -> tuple[str, str]:
    """Returns two marker strings that do not occur in the input, so that no message can forge them."""
    number = 0
    while f"\ufdd0{number}" in everything:
        number += 1
    return f"\ufdd0{number}\ufdd1", f"\ufdd0{number}\ufdd2"


def _cut(marked: str, marks: tuple[str, str]) -> Rendered:
    text, generated = "", []
    for piece in marked.split(marks[0]):
        body, found, after = piece.partition(marks[1])
        if found:
            generated.append((len(text), len(text) + len(body)))
        text += body + after
    return Rendered(text, generated)
