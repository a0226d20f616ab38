"""Reads and writes tokenizers in GGUF headers: lists of tokens, token types, merges or scores.

Two of llama.cpp's kinds are supported and become a `tokenizer.json` on reading: byte-level BPE (`gpt2`) with a named
pre-tokenizer, and SentencePiece BPE with byte fallback (`llama`), whose merges are derived from the scores.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data.tokenizers.kinds import Bytes, SentencePiece, TokenizerJson
from data.tokenizers.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as in sentencepiece_model.proto
SPACE = "\u2581"
KEY = "tokenizer.ggml."
UNMERGED = -1e6  # score of a piece that no merge produces; lower than the score of every merge

END = "<|endoftext|>"  # text of the end-of-document token if the tokenizer has none
NO_MERGE = f"{END} {END}"  # llama.cpp requires merges and GGUF has no empty lists; this merge never applies

# Pre-tokenizer regular expressions.
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"


def _words(numbers: str) -> str:
    return rf"{_SUFFIX}|{_LEAD}\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"


def _cased_words(suffix: str, numbers: str) -> str:
    cased = f"{_LEAD}{_UPPER}*{_LOWER}+{suffix}|{_LEAD}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{cased}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}"


class PreTokenizer(NamedTuple):
    """Splits text into words. A step is `digits`, `gpt2` (ByteLevel's own rule) or a regular expression."""

    steps: tuple[str, ...]
    ignore_merges: bool = False  # a word in the vocabulary becomes one token without applying merges
    nfc: bool = False  # normalize to Unicode NFC first


PRE_TOKENIZERS = {  # tokenizer.ggml.pre
    "gpt-2": PreTokenizer(("gpt2",)),
    "smollm": PreTokenizer(("digits", "gpt2")),
    "llama-bpe": PreTokenizer((_words(r"\p{N}{1,3}"),), ignore_merges=True),
    "dbrx": PreTokenizer((_words(r"\p{N}{1,3}"),)),
    "qwen2": PreTokenizer((_words(r"\p{N}"),), nfc=True),
    "gpt-4o": PreTokenizer((_cased_words(f"{_SUFFIX}?", r"\p{N}{1,3}"),)),
    "tekken": PreTokenizer((_cased_words("", r"\p{N}"),), ignore_merges=True),
}
ALIASES = {
    "phi-2": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2",
    "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "codeshell": "smollm",
    "llama-v3": "llama-bpe", "llama3": "llama-bpe", "falcon3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}  # fmt: skip


# From a header


def read_tokenizer(metadata: Mapping[str, Any]) -> TokenizerJson:
    """Reads the tokenizer of a GGUF header, with its BOS, EOS and padding ids.

    Raises: ValueError naming the key if the tokenizer is missing or of an unsupported kind.
    """
    found = {key.removeprefix(KEY): value for key, value in metadata.items() if key.startswith(KEY)}
    readers = {"gpt2": _byte_level, "llama": _byte_fallback}
    if found.get("model") not in readers or "tokens" not in found:
        raise ValueError(
            f"{KEY}model={found.get('model')}: not supported; known: {', '.join(readers)}; "
            "choose a tokenizer with tokenizer=NAME"
        )
    tokens, types = _without_padding(found["tokens"], found.get("token_type"))
    if len(set(tokens)) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise ValueError(f"{KEY}tokens: holds {twice!r} twice; choose a tokenizer with tokenizer=NAME")
    content = readers[found["model"]](tokens, types, found)
    named = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    special = {
        name: tokens[found[key]] if found.get(key) is not None and found[key] < len(tokens) else None
        for name, key in named.items()
    }
    if found.get("add_bos_token", found["model"] == "llama") and special["bos"] is not None:
        content["post_processor"] = _prepend_bos(special["bos"], found["bos_token_id"])
    return TokenizerJson(json.dumps(content, ensure_ascii=False).encode(), special)


def _without_padding(tokens: Sequence[str], types: Sequence[int] | None) -> tuple[list[str], list[int]]:
    """Removes trailing tokens that only pad the vocabulary to the embedding size."""
    types = list(types) if types is not None else [NORMAL] * len(tokens)
    size = len(tokens)
    while size and types[size - 1] == UNUSED and tokens[size - 1].startswith("[PAD"):
        size -= 1
    return list(tokens[:size]), types[:size]


def _tokenizer_json(tokens: Sequence[str], types: Sequence[int], model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """Returns the content of tokenizer.json. Special and user-defined tokens are matched first."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    added = [
        # Pieces with spaces are matched after normalization, which replaces spaces with U+2581.
        {"id": i, "content": token, **flags, "normalized": SPACE in token, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    nothing = {"truncation": None, "padding": None, "post_processor": None}
    return {
        "version": "1.0",
        **nothing,
        "added_tokens": added,
        **parts,
        "model": {"type": "BPE", "vocab": vocab, **model},
    }


def _byte_level(tokens: list[str], types: list[int], found: Mapping[str, Any]) -> dict[str, Any]:
    name = found.get("pre")
    if (pre_tokenizer := PRE_TOKENIZERS.get(ALIASES.get(str(name), str(name)))) is None:
        raise ValueError(
            f"{KEY}pre={name}: unknown pre-tokenizer; known: {', '.join(PRE_TOKENIZERS)}; "
            "choose a tokenizer with tokenizer=NAME"
        )
    bytes_of = lambda own_rule: {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": own_rule,
    }  # fmt: skip
    splits = {
        step: {"type": "Digits", "individual_digits": True}
        if step == "digits"
        else {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in pre_tokenizer.steps
        if step != "gpt2"
    }
    known = set(tokens)
    pairs = [merge.split(" ") for merge in found.get("merges", [])]
    merges = [pair for pair in pairs if "".join(pair) in known]  # without NO_MERGE
    return _tokenizer_json(
        tokens,
        types,
        {"merges": merges, "ignore_merges": pre_tokenizer.ignore_merges},
        normalizer={"type": "NFC"} if pre_tokenizer.nfc else None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [*splits.values(), bytes_of("gpt2" in pre_tokenizer.steps)],
        },
        decoder=bytes_of(True),
    )


def _byte_fallback(tokens: list[str], types: list[int], found: Mapping[str, Any]) -> dict[str, Any]:
    """Orders merges by score: SentencePiece merges the two neighbors whose piece has the highest score."""
    scores = found.get("scores")
    if scores is None:
        raise ValueError(f"{KEY}scores: is missing; choose a tokenizer with tokenizer=NAME")
    place = {
        token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (NORMAL, USER_DEFINED)
    }
    made = [
        (-scores[i], place[token[:at]], place[token[at:]])
        for token, i in place.items()
        for at in range(1, len(token))
        if token[:at] in place and token[at:] in place
    ]
    prefix = found.get("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    restore = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    return _tokenizer_json(
        tokens,
        types,
        {
            "merges": [[tokens[left], tokens[right]] for _, left, right in sorted(made)],
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
        },
        normalizer={"type": "Sequence", "normalizers": [*prepend, replace]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    )


def _prepend_bos(token: str, token_id: int) -> dict[str, Any]:
    bos, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    again = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, *again],
        "special_tokens": known,
    }


# To a header


def write_tokenizer(tokenizer: Tokenizer, num_rows: int) -> dict[str, Any]:
    """Returns the GGUF header keys of a tokenizer, padded with unused tokens to the `num_rows` of the embedding.

    Raises: ValueError with the reason if llama.cpp does not support the tokenizer.
    """
    writers = {TokenizerJson: _write_json, SentencePiece: _write_sentencepiece, Bytes: _write_bytes}
    writer = writers.get(type(tokenizer))
    if writer is None:
        raise ValueError(f"tokenizer.kind={tokenizer.kind}: llama.cpp does not support it; try to=hf:FOLDER")
    if tokenizer.eos_id is None:
        raise ValueError(f"tokenizer.kind={tokenizer.kind}: has no EOS token, which llama.cpp needs to end a text")
    found = writer(tokenizer)
    if len(found["tokens"]) > num_rows:
        raise ValueError(f"the tokenizer has {len(found['tokens'])} tokens, but the embedding only {num_rows} rows")
    filled = range(len(found["tokens"]), num_rows)
    found["tokens"] = [*found["tokens"], *(f"[PAD{i}]" for i in filled)]
    found["token_type"] = [*found["token_type"], *(UNUSED for _ in filled)]
    if "scores" in found:
        found["scores"] = [*found["scores"], *(UNMERGED for _ in filled)]
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    found |= {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    return {KEY + key: value for key, value in found.items()}


def _write_bytes(tokenizer: Bytes) -> dict[str, Any]:
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*_byte_characters(), END],
        "token_type": [NORMAL] * 256 + [CONTROL],
        "merges": [NO_MERGE],
        "add_bos_token": False,
    }


def _byte_characters() -> list[str]:
    """Returns GPT-2's byte-to-character map: printable Latin-1 as is, the other bytes from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def _write_sentencepiece(tokenizer: SentencePiece) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = getattr(proto, "ModelProto").FromString(tokenizer.model)  # noqa: B009  # a class made at import time
    trained, normal = model.trainer_spec, model.normalizer_spec
    if trained.model_type != trained.BPE or normal.name not in ("", "identity") or normal.remove_extra_whitespaces:
        raise ValueError(
            "tokenizer.kind=sentencepiece: llama.cpp supports only BPE without normalization; this model is "
            f"{trained.ModelType.Name(trained.model_type)} with normalizer {normal.name!r} and "
            f"remove_extra_whitespaces={normal.remove_extra_whitespaces}"
        )
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in model.pieces],
        "token_type": [int(piece.type) for piece in model.pieces],
        "scores": [float(piece.score) for piece in model.pieces],
        "add_space_prefix": bool(normal.add_dummy_prefix),
        "add_bos_token": tokenizer.add_bos,
    }


def _write_json(tokenizer: TokenizerJson) -> dict[str, Any]:
    content = json.loads(tokenizer.content)
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError(f"tokenizer.json: model.type={model.get('type')}: must be BPE for conversion to GGUF")
    vocab = {**model["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    size = max(vocab.values()) + 1
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in vocab.items():
        tokens[i], types[i] = token, NORMAL
        if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    for token in content["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if model.get("unk_token") in vocab:
        types[vocab[model["unk_token"]]] = UNKNOWN
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    common = {"tokens": tokens, "token_type": types, "add_bos_token": tokenizer.add_bos}
    if model.get("byte_fallback"):
        ranks = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(merges)))}
        scores = [ranks.get(token, UNMERGED if len(token) > 1 else 0.0) for token in tokens]
        return {"model": "llama", "pre": "default", **common, "scores": scores, "add_space_prefix": _prefixed(content)}
    pre_tokenizer = _pre_tokenizer_of(content)
    name = next((name for name, known in PRE_TOKENIZERS.items() if known[:2] == pre_tokenizer[:2]), None)
    if name is None:
        raise ValueError(
            f"tokenizer.json: pre_tokenizer {list(pre_tokenizer.steps)}: matches no llama.cpp pre-tokenizer; "
            f"known: {', '.join(PRE_TOKENIZERS)}"
        )
    return {"model": "gpt2", "pre": name, **common, "merges": [" ".join(merge) for merge in merges] or [NO_MERGE]}


def _parts(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Returns a step of tokenizer.json as a list, or the steps of a sequence."""
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def _pre_tokenizer_of(content: dict[str, Any]) -> PreTokenizer:
    """Returns the pre-tokenizer of a tokenizer.json. Raises: ValueError for a step that llama.cpp does not support."""
    steps: list[str] = []
    for step in _parts(content["pre_tokenizer"], "pretokenizers"):
        kind = step["type"]
        if kind == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif kind == "Split" and "Regex" in step["pattern"] and (step["behavior"] == "Isolated" or step["invert"]):
            steps.append(step["pattern"]["Regex"])
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            steps += ["gpt2"] if step["use_regex"] else []
        else:
            raise ValueError(f"tokenizer.json: pre_tokenizer {json.dumps(step)}: not supported by llama.cpp")
    normal = [step["type"] for step in _parts(content["normalizer"], "normalizers")]
    if set(normal) - {"NFC"}:
        raise ValueError(f"tokenizer.json: normalizer {', '.join(normal)}: not supported by llama.cpp")
    return PreTokenizer(tuple(steps), bool(content["model"].get("ignore_merges")), "NFC" in normal)


def _prefixed(content: dict[str, Any]) -> bool:
    """Returns whether a space is prepended to text. Raises: ValueError for a step that llama.cpp does not support."""
    prefixed = False
    steps = _parts(content["normalizer"], "normalizers") + _parts(content["pre_tokenizer"], "pretokenizers")
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" or (kind == "Metaspace" and step.get("prepend_scheme", "always") != "never"):
            prefixed = True
        elif kind != "Metaspace" and not (kind in ("Replace", "Split") and step["pattern"] == {"String": " "}):
            raise ValueError(f"tokenizer.json: {json.dumps(step)}: not supported by llama.cpp for SentencePiece BPE")
    return prefixed
