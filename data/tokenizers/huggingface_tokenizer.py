"""Reads tokenizer settings from a published checkpoint folder: special tokens, BOS, stop ids, chat template.

Supports the file layouts of several generations of tools; if two files disagree, the newer layout wins.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

NAMES = ("bos", "eos", "pad")


class TokenizerSettings(NamedTuple):
    special: dict[str, str | None]  # texts of bos, eos, pad
    add_bos: bool | None  # None: not set in the files
    stop_ids: tuple[int, ...]  # from generation_config.json and config.json; may lack EOS itself
    chat_template: str | None
    added: dict[str, int]  # tokens added after training


def read_published(folder: Path) -> TokenizerSettings:
    """Reads the settings of a checkpoint folder. Raises: ValueError naming a file that is not JSON."""
    named = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    text = lambda token: token.get("content") if isinstance(token, dict) else token
    add_bos = named.get("add_bos_token")
    return TokenizerSettings(
        special={name: text(named.get(f"{name}_token")) for name in NAMES},
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        stop_ids=_stop_ids(folder),
        chat_template=_chat_template(folder, named.get("chat_template")),
        added=_json(folder / "added_tokens.json")
        | {token["content"]: int(i) for i, token in named.get("added_tokens_decoder", {}).items()},
    )


def _stop_ids(folder: Path) -> tuple[int, ...]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = _json(folder / name).get("eos_token_id")
        ids += found if isinstance(found, list) else [] if found is None else [found]
    return tuple(dict.fromkeys(ids))


def _chat_template(folder: Path, described: Any) -> str | None:
    """`described`: a template, or a list of named templates, of which `tool_use` applies to chats with tools."""
    single, more = folder / "chat_template.jinja", folder / "additional_chat_templates" / "tool_use.jinja"
    if single.exists():
        template = single.read_text()
        return _with_tools(template, more.read_text()) if more.exists() else template
    described = described or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(described, list):
        described = {entry["name"]: entry["template"] for entry in described}
    if isinstance(described, dict):
        template, with_tools = described.get("default"), described.get("tool_use")
        return _with_tools(template, with_tools) if template and with_tools else template
    return described


def _with_tools(template: str, with_tools: str) -> str:
    # Combines both into one template that selects by `tools`. `+` preserves newlines that Jinja would trim.
    plain, tools = template.removesuffix("\n"), with_tools.removesuffix("\n")
    return "{% if tools is none +%}" + plain + "{%+ else +%}" + tools + "{%+ endif %}"


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
