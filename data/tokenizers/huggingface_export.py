"""Exports a tokenizer with its policy and chat template in Hugging Face format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.tokenizers.kinds import SentencePiece, TokenizerJson
from data.tokenizers.tokenizer import DESCRIPTION, TEMPLATE, Tokenizer


def write_tokenizer(path: Path, tokenizer: Tokenizer, before: Mapping[str, Any]) -> str:
    """Writes a tokenizer into a checkpoint folder that may already contain files of the source checkpoint.

    Special tokens, BOS policy, stop ids and chat template override those files and `before`, the source config.json;
    their other entries are unchanged. Returns a message for the user.
    """
    if not isinstance(tokenizer, TokenizerJson | SentencePiece):
        _write_ids(path, tokenizer, before)
        return f"tokenizer: {tokenizer.kind} has no Hugging Face format; only the weights were written"
    [(name, content)] = tokenizer.own_files().items()
    (path / name).write_bytes(content)
    described = _read(path / DESCRIPTION)
    if isinstance(tokenizer, TokenizerJson):  # transformers would encode a SentencePiece model differently
        described.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    texts = tokenizer.special_texts
    for key in ("bos_token", "eos_token", "pad_token"):
        saved = described.get(key)
        if key in texts and (saved.get("content") if isinstance(saved, dict) else saved) != texts[key]:
            described[key] = texts[key]
    described["add_bos_token"] = tokenizer.add_bos
    described.pop("chat_template", None)
    _write(path / DESCRIPTION, described)
    _write_template(path, tokenizer.chat_template)
    _write_ids(path, tokenizer, before)
    note = "; load it with the sentencepiece library, other libraries may produce different ids"
    return f"tokenizer: {name}{note if isinstance(tokenizer, SentencePiece) else ''}"


def _write_template(path: Path, template: str | None) -> None:
    for older in ("chat_template.json", TEMPLATE):
        (path / older).unlink(missing_ok=True)
    if template is not None:
        (path / TEMPLATE).write_text(template)


def _write_ids(path: Path, tokenizer: Tokenizer, before: Mapping[str, Any]) -> None:
    """Writes special ids to config.json and to generation_config.json, whose EOS ids stop generation."""
    stops = list(tokenizer.stop_ids)
    own = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    own["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    for name in ("config.json", "generation_config.json"):
        written = _read(path / name)
        if name == "config.json":
            written |= {key: before[key] for key in own if key in before}
        for key, value in own.items():
            same = key == "eos_token_id" and set(_listed(written.get(key))) == set(stops)
            if not same and (value is not None or key not in written):
                written[key] = value
        _write(path / name, written)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
