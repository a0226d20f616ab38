"""Reference of all config keys, parsed from the source of the config classes without importing them.

Parsing a class with `ast` takes a few milliseconds, whereas importing it would import JAX. A field is documented by its
trailing comment or the comment lines directly above it; an option by the first sentence of its class docstring or the
leading comment of its YAML file.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs"
WORDS = {"int": "integer", "float": "number", "bool": "true or false", "str": "text"}
PLURALS = {"integer": "integers", "number": "numbers", "text": "texts"}


@dataclass(frozen=True)
class Choice:
    """A value of an enum, or an option of a group."""

    name: str
    doc: str


@dataclass(frozen=True)
class Key:
    """A config key of the command line."""

    path: str  # as on the command line; keys of a task have no prefix
    type: str
    default: str  # in command-line syntax; "required" if there is no default
    doc: str
    choices: tuple[Choice, ...] = ()  # valid values of an enum
    bounds: str = ""  # "min 0, max 1"
    group: str = ""  # group whose option defines the key; "" for keys of every run
    option: str = ""

    @property
    def allowed(self) -> str:
        return ", ".join(choice.name for choice in self.choices)


@dataclass(frozen=True)
class Field:
    """A field of a config class, as parsed from its source."""

    name: str
    annotation: ast.expr
    default: ast.expr | None
    doc: str
    module: str


class Source:
    """Classes, imports and constants of a module, by name. Statements are parsed lazily."""

    def __init__(self, module: str) -> None:
        file = ROOT / f"{module.replace('.', '/')}.py"
        text = (file if file.exists() else ROOT / module.replace(".", "/") / "__init__.py").read_text()
        self.lines = text.splitlines()
        self.starts: dict[str, int] = {}  # first line of each class and constant
        self.imports: dict[str, tuple[str, str]] = {}
        for number, line in enumerate(self.lines):
            if found := re.match(r"(?:class (\w+)|([A-Z_]+)(?:: .*)? = )", line):
                self.starts[found[1] or found[2]] = number
        for where, several, one in re.findall(r"^from ([\w.]+) import (?:\(([^)]*)\)|(.+))$", text, re.MULTILINE):
            for name in re.sub(r"#.*", "", several or one).split(","):
                original, _, other = name.strip().partition(" as ")
                self.imports[other or original] = (where, original)

    def statement(self, name: str) -> ast.stmt | None:
        """Returns a class up to its first method, or an assignment; None if the module defines no such name."""
        if name not in self.starts:
            return None
        start = stop = self.starts[name]
        while (stop := stop + 1) < len(self.lines):
            line = self.lines[stop]
            if re.match(r"[^\s)\]}]|    (def |async def |@)", line):
                break
        return ast.increment_lineno(ast.parse("\n".join(self.lines[start:stop])), start).body[0]

    def value(self, name: str) -> ast.expr | None:
        """Returns the value of a constant; None if the module defines no such name."""
        statement = self.statement(name)
        return statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None

    def comment(self, node: ast.stmt) -> str:
        """Returns the comment of a statement: lines directly above it, comments within it and the trailing comment."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        above, line = [], node.lineno - 2
        while line >= 0 and self.lines[line].strip().startswith("#"):
            above.insert(0, self.lines[line].strip().lstrip("# "))
            line -= 1
        within = [line.partition("  # ")[2] for line in self.lines[node.lineno - 1 : node.end_lineno - 1]]
        rest = self.lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
        trailing = rest.lstrip("# ") if rest.startswith("#") else ""
        return " ".join(filter(None, [*above, *within, trailing]))


source = cache(Source)


@cache
def find_class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Returns (defining module, class) of a name used in `module`; None if it is not a class of this project."""
    parsed = source(module)
    node = parsed.statement(name)
    if isinstance(node, ast.ClassDef):
        return module, node
    if name in parsed.imports:
        where, original = parsed.imports[name]
        if (ROOT / where.partition(".")[0]).is_dir():
            return find_class(where, original)
    return None


@cache
def fields_of(module: str, name: str) -> dict[str, Field]:
    """Returns the fields of a dataclass, those of its bases first."""
    found = find_class(module, name)
    if found is None:
        return {}
    where, node = found
    fields: dict[str, Field] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            fields |= fields_of(where, base.id)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if ast.unparse(statement.annotation).startswith("ClassVar"):
                continue
            key, doc = statement.target.id, source(where).comment(statement)
            doc = doc or (fields[key].doc if key in fields else "")
            fields[key] = Field(key, statement.annotation, statement.value, doc, where)
    return fields


@cache
def menu_of(module: str, name: str) -> tuple[Choice, ...]:
    """Returns the members of an enum; empty for other classes."""
    found = find_class(module, name)
    if found is None or not any(ast.unparse(base) in ("enum.Enum", "Enum") for base in found[1].bases):
        return ()
    where, node = found
    return tuple(
        Choice(statement.targets[0].id, source(where).comment(statement))
        for statement in node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    )


def describe_type(annotation: ast.expr, module: str) -> str:
    """Returns a readable name of a type: `list[int]` is "list of integers"."""
    if isinstance(annotation, ast.BinOp):
        return f"{describe_type(annotation.left, module)} or {describe_type(annotation.right, module)}"
    if isinstance(annotation, ast.Constant):
        return "null" if annotation.value is None else str(annotation.value)
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice
        if ast.unparse(annotation.value) == "list":
            words = describe_type(inner, module)
            return f"list of {PLURALS.get(words, words)}"
        if ast.unparse(annotation.value) == "dict" and isinstance(inner, ast.Tuple):
            return "mapping of " + " to ".join(describe_type(part, module) for part in inner.elts)
        return describe_type(inner if not isinstance(inner, ast.Tuple) else inner.elts[0], module)  # Annotated
    name = ast.unparse(annotation)
    return "one word" if menu_of(module, name) else WORDS.get(name, name)


def default_of(field: Field) -> tuple[str, str]:
    """Returns (default in command-line syntax, bounds)."""
    return _value(field.default, field.module), _bounds(field.default)


def _value(node: ast.expr | None, module: str) -> str:
    if node is None:
        return "required"
    if isinstance(node, ast.Call):
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        if "default" in named:
            return _value(named["default"], module)
        if "default_factory" in named:
            return _made(named["default_factory"], module)
        return _value(node.args[0], module) if node.args else ast.unparse(node)
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        if node.id == "MISSING":
            return "required"
        constant = source(module).value(node.id)
        return node.id if constant is None else _value(constant, module)
    if isinstance(node, ast.List):
        return f"[{','.join(_value(part, module) for part in node.elts)}]"
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return "{" + ",".join(f"{_value(key, module)}:{_value(value, module)}" for key, value in pairs) + "}"
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            return str(node.value).lower()
        if isinstance(node.value, float):
            return f"{node.value:g}"
        return "null" if node.value is None else str(node.value) or "''"
    return ast.unparse(node)


def _made(factory: ast.expr, module: str) -> str:
    if isinstance(factory, ast.Lambda):
        return _value(factory.body, module)
    return {"list": "[]", "dict": "{}"}.get(ast.unparse(factory), ast.unparse(factory))


def _bounds(node: ast.expr | None) -> str:
    """Returns the bounds of a field: from `metadata={"min": 1}`, or keyword arguments of its constructor call."""
    if not isinstance(node, ast.Call):
        return ""
    found: dict[str, ast.expr] = {}
    for keyword in node.keywords:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            keys = (key.value if isinstance(key, ast.Constant) else None for key in keyword.value.keys)
            found |= {str(key): value for key, value in zip(keys, keyword.value.values, strict=True)}
        elif keyword.arg not in (None, "default", "default_factory"):
            found[str(keyword.arg)] = keyword.value
    names = ("min", "max", "above", "below", "multiple_of")
    return ", ".join(f"{n.replace('_', ' ')} {ast.unparse(found[n])}" for n in names if n in found)


def _sentence_case(doc: str) -> str:
    """Capitalizes a doc, unless it starts with the name of a key, a value or a function."""
    word = doc.partition(" ")[0]
    return doc if re.search(r"[_:=.(]|[0-9]", word) else doc[:1].upper() + doc[1:]


def keys_of(
    module: str, name: str, prefix: str = "", group: str = "", option: str = "", below: str = ""
) -> Iterator[Key]:
    """Yields the keys of a config class and of nested ones, except `kind`, which is set by the option of a group.

    `below`: restricts the result to this key or keys below it.
    """
    first, _, rest = below.partition(".")
    for field in fields_of(module, name).values():
        if field.name == "kind" or field.name.startswith("_") or first not in ("", field.name):
            continue
        inner = field.annotation.id if isinstance(field.annotation, ast.Name) else ""
        if fields_of(field.module, inner):
            yield from keys_of(field.module, inner, f"{prefix}{field.name}.", group, option, rest)
            continue
        default, bounds = default_of(field)
        named = (node.id for node in ast.walk(field.annotation) if isinstance(node, ast.Name))
        choices = next((menu for each in named if (menu := menu_of(field.module, each))), ())
        words = describe_type(field.annotation, field.module)
        yield Key(f"{prefix}{field.name}", words, default, _sentence_case(field.doc), choices, bounds, group, option)


# The command line


SCHEMA = "configs.schema"


@cache
def classes() -> dict[str, dict[str, tuple[str, str]]]:
    """Returns (module, class) by group and option."""
    found = _literal(SCHEMA, source(SCHEMA).value("GROUPS"))
    return {group: {option: _place(*place) for option, place in options.items()} for group, options in found.items()}


def _literal(module: str, node: ast.expr | None) -> dict:
    """Evaluates a dict of names, which may be constants of other modules; leaves are (module, name)."""
    assert isinstance(node, ast.Dict)
    found: dict = {}
    for key, value in zip(node.keys, node.values, strict=True):
        assert isinstance(key, ast.Constant)
        if isinstance(value, ast.Dict):
            found[key.value] = _literal(module, value)
        elif isinstance(value, ast.Name) and value.id.isupper():
            where, name = source(module).imports[value.id]
            found[key.value] = _literal(where, source(where).value(name))
        else:
            found[key.value] = (module, ast.unparse(value))
    return found


def _place(module: str, name: str) -> tuple[str, str]:
    where = source(module).imports.get(name)
    return (module, name) if where is None else where


@cache
def packages() -> dict[str, str]:
    return _plain(SCHEMA, "PACKAGES")


def _plain(module: str, name: str) -> dict:
    node = source(module).value(name)
    assert node is not None
    return ast.literal_eval(node)


def package(group: str, option: str) -> str:
    """Returns the path prefix of the keys of a group's option; "" for tasks, whose keys have none."""
    return "" if group == "task" else packages().get(group, group).format(option=option)


@cache
def tasks() -> tuple[str, ...]:
    return tuple(classes()["task"])


@cache
def groups() -> tuple[str, ...]:
    """Returns the groups of the command line, except tasks."""
    folders = (path.name for path in sorted(FOLDER.iterdir()) if any(path.glob("*.yaml")))
    return tuple(dict.fromkeys([*(group for group in classes() if group != "task"), *folders]))


@cache
def option_names(group: str) -> tuple[str, ...]:
    files = sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))
    return (*classes().get(group, {}), *files)


@cache
def options(group: str) -> tuple[Choice, ...]:
    """Returns the options of a group with their descriptions."""
    found = [Choice(name, _summary(*place)) for name, place in classes().get(group, {}).items()]
    found += [Choice(path.stem, _leading_comment(path)) for path in sorted((FOLDER / group).glob("*.yaml"))]
    return tuple(found)


def _summary(module: str, name: str) -> str:
    found = find_class(module, name)
    text = ast.get_docstring(found[1]) if found is not None else None
    return "" if not text else re.split(r"(?<=[a-z0-9)])[.:;](?:\s|$)", " ".join(text.split()), maxsplit=1)[0]


def _leading_comment(path: Path) -> str:
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        if not text.startswith(("@package", "meshwright ")):
            lines.append(text)
    return re.split(r"(?<=[a-z0-9)])[.:;](?:\s|$)", " ".join(lines), maxsplit=1)[0]


@cache
def default_options() -> dict[str, str]:
    """Returns the default option of each group."""
    found = re.findall(r"^  - (\w+): \[?(\w*)\]?", (FOLDER / "root.yaml").read_text(), re.MULTILINE)
    return {group: option for group, option in found if option != "null"}


@cache
def common_keys(below: str = "") -> tuple[Key, ...]:
    """Returns keys that do not depend on group options; `base`: only this key or keys below it."""
    grouped = {package(group, "").rstrip(".") for group in groups()} | {"task", "data.sources"}
    return tuple(
        key
        for key in keys_of(SCHEMA, "RunConfig", below=below)
        if key.path not in grouped and not any(key.path.startswith(f"{path}.") for path in grouped)
    )


@cache
def option_keys(group: str, option: str) -> tuple[Key, ...]:
    """Returns the keys of an option of a group; for a YAML option those of the group's class."""
    place = classes().get(group, {}).get(option)
    if place is None and group in classes():
        place = next(iter(classes()[group].values()))
    if place is None:
        return ()
    path = package(group, option)
    found = tuple(keys_of(*place, f"{path}." if path else "", group, option))
    names = {field: alias for alias, field in aliases().get(option, {}).items()} if group == "task" else {}
    return tuple(replace(key, path=names.get(key.path, key.path)) for key in found)


@cache
def aliases() -> dict[str, dict[str, str]]:
    """Returns by task the command-line names of keys that differ from their field names."""
    return _plain("configs.tasks", "ALIASES")


def all_keys() -> list[Key]:
    """Returns all keys of the command line: common keys first, then those of each option of each group."""
    found = list(common_keys())
    for group, found_options in classes().items():
        for option in found_options:
            found += option_keys(group, option)
    return found
