"""Conversations to tokens, and which of them the assistant wrote.

A conversation is a list of messages as OpenAI writes them: `{"role": "user", "content": "..."}`, roles `system`,
`developer`, `user`, `assistant` (with `tool_calls` where it calls any) and `tool`. The ids are those of transformers'
`apply_chat_template`. As there, the text of a special token stands for it also where a user wrote it; a message whose
writer is not trusted has to be cleaned of such texts before.
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
CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<[a-z]+_of_turn>")  # what looks like the text of a special token


class ChatTokens(NamedTuple):
    ids: np.ndarray  # [L] i32
    assistant_mask: np.ndarray  # [L] bool: what the assistant wrote, the token that ends its turn included


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **extra: Any,
) -> ChatTokens:
    """Ids of a conversation and the mask of what the assistant wrote.

    The mask comes from the template's `generation` marks; from a template without them by rendering the conversation
    up to each assistant's turn. A token that is partly the assistant's counts as its. `extra`: as `render`'s.
    Raises: ValueError for messages that `check_messages` or the template refuses, and where a template without marks
    writes earlier turns in another way once later ones follow: their tokens cannot be told then.
    """
    given = {"tools": tools, "special_tokens": tokenizer.special_texts, **extra}
    rendered = _render(tokenizer, messages, given, add_generation_prompt)
    generated = rendered.generated
    if not marks_generation(_template(tokenizer)):
        generated = _generated_by_prefix(tokenizer, messages, rendered.text, given)
    ids, characters = tokenizer.encode_special(rendered.text)
    _refuse_double_bos(tokenizer, ids)
    mask = np.zeros(len(ids), bool)
    for begin, end in generated:
        inside = [i for i, (b, e) in enumerate(characters) if b < end and (e > begin or b == e == begin)]
        if inside and begin < end:
            mask[inside[0] : inside[-1] + 1] = True
    return ChatTokens(np.array(ids, np.int32), mask)


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> list[int]:
    """The ids alone, for a model to go on from: a template may do with earlier turns what it likes.

    Raises: ValueError for messages that `check_messages` or the template refuses.
    """
    given = {"tools": tools, "special_tokens": tokenizer.special_texts, **extra}
    ids = tokenizer.encode_special(_render(tokenizer, messages, given, add_generation_prompt).text).ids
    _refuse_double_bos(tokenizer, ids)
    return ids


def _template(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "tokenizer.chat_template=null: this tokenizer has no chat template; give it one when a run begins: "
            f"tokenizer.chat_template=NAME ({', '.join(TEMPLATES)}) or a file"
        )
    return tokenizer.chat_template


def _render(
    tokenizer: Tokenizer, messages: Sequence[Message], given: dict[str, Any], add_generation_prompt: bool
) -> Rendered:
    template = _template(tokenizer)
    check_messages(messages)
    return render_marked(template, messages, add_generation_prompt=add_generation_prompt, **given)


def _refuse_double_bos(tokenizer: Tokenizer, ids: list[int]) -> None:
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        raise ValueError("tokenizer.chat_template: the chat begins with BOS twice; the template must write it once")


def _generated_by_prefix(
    tokenizer: Tokenizer, messages: Sequence[Message], text: str, given: dict[str, Any]
) -> list[tuple[int, int]]:
    """What each assistant's turn adds to the text before it, as far as its last special token."""
    template, found = _template(tokenizer), []
    special = "|".join(map(re.escape, tokenizer.special_tokens)) or "(?!)"
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(template, messages[:i], add_generation_prompt=True, **given)
        after = render(template, messages[: i + 1], **given)
        if not (text.startswith(after) and after.startswith(before)):
            what = "what comes after it" if not text.startswith(after) else "the generation prompt"
            raise ValueError(
                f"messages[{i}]: the chat template writes this turn differently because of {what}, so that its tokens "
                "cannot be told from the others; end the conversation with this turn, or use a template with "
                "{% generation %} marks (tokenizer.chat_template=FILE)"
            )
        # Line ends after the token that ends the turn are the template's: a model stops before them.
        rest = re.search(rf"(?:{special})(\s+)\Z", after[len(before) :])
        found.append((len(before), len(after) - (len(rest.group(1)) if rest else 0)))
    return found


def check_messages(messages: Sequence[Message]) -> None:
    """Raises: ValueError naming the index, the key, the value and what would be right."""
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
            raise ValueError(f"messages[{i}].content: is missing; give a text, '' for a turn in which nothing is said")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"messages[{i}].content={_short(content)}: must be one text; join the texts of its parts")


def _check_calls(i: int, role: str, calls: Any) -> None:
    if role != "assistant" and calls:
        raise ValueError(f"messages[{i}].tool_calls: only an assistant calls functions, not {role!r}")
    named = lambda call: isinstance(call, Mapping) and isinstance((call.get("function") or call).get("name"), str)
    if not isinstance(calls, list | tuple) or not all(map(named, calls)):
        example = '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'
        raise ValueError(f"messages[{i}].tool_calls={_short(calls)}: must be a list like {example}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# A template for a tokenizer


def configured(tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """A tokenizer with the policy that a config asks for; without a wish it keeps its own.

    The token that ends an assistant's turn ends what a model writes, whatever else does.
    Raises: ValueError as `with_template`; where a text shall begin with a BOS that there is not.
    """
    if config.add_bos is not None:
        tokenizer = tokenizer.with_policy(add_bos=config.add_bos)
    if config.chat_template is not None:
        return with_template(tokenizer, config.chat_template)
    end = _end_of_turn(tokenizer) if tokenizer.chat_template is not None else None
    return tokenizer if end is None else tokenizer.with_policy(stop_ids=(*tokenizer.stop_ids, end))


def with_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The tokenizer with one of TEMPLATES or with that of a file.

    Where the policy wants BOS and the template does not write it, it is put before the template.
    Raises: ValueError where there is no such template, where it needs special tokens that the tokenizer has not, and
    where no token of the assistant's turn ends it.
    """
    key = f"tokenizer.chat_template={name}"
    text = _source(name)
    missing = sorted({t for part in literals(text) for t in CONTROL.findall(part)} - set(tokenizer.special_tokens))
    if missing:
        quoted = ",".join(f"'{token}'" for token in missing)
        raise ValueError(
            f"{key}: needs {', '.join(missing)}, which this tokenizer does not have as special tokens; take "
            f"tokenizer.chat_template=plain, which needs none, or train a tokenizer that has them: "
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
            f"{key}: an assistant's turn does not end with a special token, so that a model could not learn to end it; "
            "write {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
        )
    return made if end is None else made.with_policy(stop_ids=(*made.stop_ids, end))


def _source(name: str) -> str:
    if name in TEMPLATES:
        folder = files("data") / "templates"
        return "".join((folder / f"{part}.jinja").read_text() for part in ("tools", name))
    if not Path(name).is_file():
        raise ValueError(f"tokenizer.chat_template={name}: is neither a file nor one of {', '.join(TEMPLATES)}")
    return Path(name).read_text()


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token with which the assistant's turn ends; None where there is none, or the template is odd."""
    try:
        ids, mask = encode_chat(tokenizer, SMALL_TALK)
    except ValueError:
        return None
    last = int(ids[mask][-1]) if mask.any() else None
    return last if last in tokenizer.special_tokens.values() else None


def text_after_turn(tokenizer: Tokenizer) -> str | None:
    """What the template writes after an assistant's turn and before the next user's: there a model without a token
    that ends its turn has to be stopped. None where it has one."""
    if tokenizer.stop_ids:
        return None
    said = [*SMALL_TALK, SMALL_TALK[0]]
    given = {"special_tokens": tokenizer.special_texts}
    whole, first = (render(_template(tokenizer), m, **given) for m in (said, SMALL_TALK[:1]))
    rest = whole[len(first) :].partition(SMALL_TALK[1]["content"])[2].removesuffix("\n\n")
    return rest.removesuffix(SMALL_TALK[0]["content"]).rstrip() or None
