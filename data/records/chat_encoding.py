"""Encodes conversations as token ids with an assistant mask.

A conversation is a list of OpenAI-style messages: `{"role": "user", "content": "..."}` with the roles `system`,
`developer`, `user`, `assistant` (optionally with `tool_calls`) and `tool`. The ids equal those of transformers'
`apply_chat_template`. As in transformers, the text of a special token is encoded as that token even in a user message;
sanitize untrusted messages first.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.records.chat_template import Message, Rendered, literals, marks_generation, render, render_marked
from data.tokenizers.kinds import TokenizerConfig
from data.tokenizers.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
RENAMED = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
TEMPLATES = ("chatml", "gemma", "llama3", "mistral", "plain")
SMALL_TALK = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<[a-z]+_of_turn>")  # texts that look like special tokens


class ChatTokens(NamedTuple):
    ids: np.ndarray  # [L] i32
    assistant_mask: np.ndarray  # [L] bool: tokens of assistant turns, including their end-of-turn tokens


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **extra: Any,
) -> ChatTokens:
    """Encodes a conversation; returns its ids and the mask of assistant tokens.

    The mask comes from the template's `{% generation %}` tags or, without tags, from rendering the conversation up to
    each assistant turn. A token that is partly assistant text is in the mask. `extra`: as in `render`.
    Raises: ValueError if `check_messages` or the template rejects the messages, or if a template without tags renders
    earlier turns differently once later ones follow, so that their tokens cannot be identified.
    """
    given = {"tools": tools, "special_tokens": tokenizer.special_texts, **extra}
    rendered = _render(tokenizer, messages, given, add_generation_prompt)
    generated = rendered.generated
    if not marks_generation(_template(tokenizer)):
        generated = _generated_by_prefix(tokenizer, messages, rendered.text, given)
    ids, characters = tokenizer.encode_special(rendered.text)
    _check_single_bos(tokenizer, ids)
    mask = np.zeros(len(ids), bool)
    for start, stop in generated:
        covered = [i for i, (a, b) in enumerate(characters) if a < stop and (b > start or a == b == start)]
        if covered and start < stop:
            mask[covered[0] : covered[-1] + 1] = True
    return ChatTokens(np.array(ids, np.int32), mask)


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> list[int]:
    """Encodes a conversation as a generation prompt; the template may rewrite earlier turns.

    Raises: ValueError if `check_messages` or the template rejects the messages.
    """
    given = {"tools": tools, "special_tokens": tokenizer.special_texts, **extra}
    ids = tokenizer.encode_special(_render(tokenizer, messages, given, add_generation_prompt).text).ids
    _check_single_bos(tokenizer, ids)
    return ids


def _template(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "tokenizer.chat_template=null: this tokenizer has no chat template; set one when starting a run: "
            f"tokenizer.chat_template=NAME ({', '.join(TEMPLATES)}) or a file"
        )
    return tokenizer.chat_template


def _render(
    tokenizer: Tokenizer, messages: Sequence[Message], given: dict[str, Any], add_generation_prompt: bool
) -> Rendered:
    template = _template(tokenizer)
    check_messages(messages)
    return render_marked(template, messages, add_generation_prompt=add_generation_prompt, **given)


def _check_single_bos(tokenizer: Tokenizer, ids: list[int]) -> None:
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        raise ValueError("tokenizer.chat_template: the chat starts with two BOS tokens; the template must write one")


def _generated_by_prefix(
    tokenizer: Tokenizer, messages: Sequence[Message], text: str, given: dict[str, Any]
) -> list[tuple[int, int]]:
    """Returns the characters [start, stop) that each assistant turn adds, up to its last special token."""
    template, found = _template(tokenizer), []
    special = "|".join(map(re.escape, tokenizer.special_tokens)) or "(?!)"
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(template, messages[:i], add_generation_prompt=True, **given)
        after = render(template, messages[: i + 1], **given)
        if not (text.startswith(after) and after.startswith(before)):
            cause = "later messages" if not text.startswith(after) else "the generation prompt"
            raise ValueError(
                f"messages[{i}]: the chat template renders this turn differently because of {cause}, so its tokens "
                "cannot be identified; end the conversation with this turn, or use a template with "
                "{% generation %} tags (tokenizer.chat_template=FILE)"
            )
        # Newlines after the end-of-turn token belong to the template: the model stops before them.
        rest = re.search(rf"(?:{special})(\s+)\Z", after[len(before) :])
        found.append((len(before), len(after) - (len(rest.group(1)) if rest else 0)))
    return found


def check_messages(messages: Sequence[Message]) -> None:
    """Validates messages. Raises: ValueError naming the index, the key, the value and the expected value."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages={_short(messages)}: must be a list of objects with role and content")
    if not messages:
        raise ValueError("messages=[]: is empty; a conversation has at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{i}]={_short(message)}: must be an object with role and content")
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if role not in ROLES:
            hint = f"; write {RENAMED[role]!r}" if isinstance(role, str) and role in RENAMED else ""
            raise ValueError(f"messages[{i}].role={_short(role)}: must be one of {', '.join(ROLES)}{hint}")
        if calls is not None:
            _check_calls(i, role, calls)
        if content is None and not (role == "assistant" and calls):
            raise ValueError(f"messages[{i}].content: is missing; must be a string ('' for an empty turn)")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"messages[{i}].content={_short(content)}: must be a string; join the texts of its parts")


def _check_calls(i: int, role: str, calls: Any) -> None:
    if role != "assistant" and calls:
        raise ValueError(f"messages[{i}].tool_calls: only the assistant can call tools, not {role!r}")
    named = lambda call: isinstance(call, Mapping) and isinstance((call.get("function") or call).get("name"), str)
    if not isinstance(calls, list | tuple) or not all(map(named, calls)):
        example = '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'
        raise ValueError(f"messages[{i}].tool_calls={_short(calls)}: must be a list like {example}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# A template for a tokenizer


def configured(tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """Returns the tokenizer with the policy of a config; unset keys leave its own policy unchanged.

    The end-of-turn token of the chat template is always a stop token.
    Raises: ValueError as `with_template`, and for add_bos=true if the tokenizer has no BOS token.
    """
    if config.add_bos is not None:
        tokenizer = tokenizer.with_policy(add_bos=config.add_bos)
    if config.chat_template is not None:
        return with_template(tokenizer, config.chat_template)
    end = _end_of_turn(tokenizer) if tokenizer.chat_template is not None else None
    return tokenizer if end is None else tokenizer.with_policy(stop_ids=(*tokenizer.stop_ids, end))


def with_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Returns the tokenizer with a chat template: one of TEMPLATES, or a file.

    If the policy adds BOS and the template does not write it, BOS is prepended to the template.
    Raises: ValueError if the template does not exist, needs special tokens that the tokenizer lacks, or does not end
    the assistant turn with a special token.
    """
    key = f"tokenizer.chat_template={name}"
    text = _source(name)
    missing = sorted({t for part in literals(text) for t in CONTROL.findall(part)} - set(tokenizer.special_tokens))
    if missing:
        quoted = ",".join(f"'{token}'" for token in missing)
        raise ValueError(
            f"{key}: needs the special tokens {', '.join(missing)}, which this tokenizer does not have; use "
            f"tokenizer.chat_template=plain, which needs none, or train a tokenizer with them: "
            f"tokenizer=sentencepiece tokenizer.special_tokens=[{quoted}]"
        )
    made = tokenizer.with_policy(chat_template=text)
    try:
        if chat_ids(made, SMALL_TALK)[0] != made.bos_id and made.add_bos:
            made = made.with_policy(chat_template="{{ bos_token }}" + text)
        encode_chat(made, SMALL_TALK)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    end = _end_of_turn(made)
    if end is None and made.special_tokens:
        raise ValueError(
            f"{key}: the assistant turn does not end with a special token, so a model could not learn to stop; "
            "write {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
        )
    return made if end is None else made.with_policy(stop_ids=(*made.stop_ids, end))


def _source(name: str) -> str:
    if name in TEMPLATES:
        folder = files("data") / "templates"
        return "".join((folder / f"{part}.jinja").read_text() for part in ("tools", name))
    if not Path(name).is_file():
        raise ValueError(f"tokenizer.chat_template={name}: must be a file or one of {', '.join(TEMPLATES)}")
    return Path(name).read_text()


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Returns the special token that ends an assistant turn; None without one, or if the template fails."""
    try:
        ids, mask = encode_chat(tokenizer, SMALL_TALK)
    except ValueError:
        return None
    last = int(ids[mask][-1]) if mask.any() else None
    return last if last in tokenizer.special_tokens.values() else None


def text_after_turn(tokenizer: Tokenizer) -> str | None:
    """Returns the stop string of a tokenizer without stop tokens; None if it has one.

    The stop string is the text that the template writes between an assistant turn and the next user message.
    """
    if tokenizer.stop_ids:
        return None
    messages = [*SMALL_TALK, SMALL_TALK[0]]
    given = {"special_tokens": tokenizer.special_texts}
    full, first = (render(_template(tokenizer), m, **given) for m in (messages, SMALL_TALK[:1]))
    rest = full[len(first) :].partition(SMALL_TALK[1]["content"])[2].removesuffix("\n\n")
    return rest.removesuffix(SMALL_TALK[0]["content"]).rstrip() or None
