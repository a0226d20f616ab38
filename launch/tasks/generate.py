"""`meshwright generate run=NAME prompt='...'`, or `chat='...'`: streams generated text to the terminal."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import RunConfig
from configs.tasks import Format, GenerateConfig
from data.records.chat_encoding import TEMPLATES, chat_ids, check_messages, text_after_turn
from data.records.chat_template import render
from data.tokenizers.tokenizer import Tokenizer
from launch.generation import generate_batches, unmasking_of
from launch.load_run import open_writer
from launch.multihost import is_main_process
from models.decode.engine import Completion
from models.decode.sampling import SamplingConfig


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints each prompt with its completion, or the chat response; `format=json`: one object per line."""
    task = config.task
    assert isinstance(task, GenerateConfig)
    chat = conversation(task)
    prompts = all_prompts(task) if chat is None else []
    if task.num_samples < 1:
        raise ValueError(f"task.num_samples={task.num_samples}: must be at least 1")
    sampling = SamplingConfig(
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        top_k=task.top_k,
        top_p=task.top_p,
        min_p=task.min_p,
        repetition_penalty=task.repetition_penalty,
        seed=config.seed,
    )
    sampling.validate()
    if task.diffusion_steps < 0:
        raise ValueError(f"task.diffusion_steps={task.diffusion_steps}: must not be negative; 0: one step per token")
    saved = open_writer(config, overrides)
    stop, shown, inputs = list(task.stop), prompts, list(prompts)
    if chat is not None:
        shown, inputs, ending = encode_chat(saved.tokenizer, chat, config.run)
        stop += ending
    shown = [prompt for prompt in shown for _ in range(task.num_samples)]
    inputs = [prompt for prompt in inputs for _ in range(task.num_samples)]
    stream = len(inputs) == 1 and task.format is Format.table and is_main_process()
    if stream and chat is None:
        show(str(inputs[0]))
    results = generate_batches(
        saved.params(),
        saved.core.model,
        saved.tokenizer,
        inputs,
        sampling,
        stop=stop,
        constrain=saved.core.constrain,
        show=(show if chat is None else without_leading_space()) if stream else lambda text: None,
        unmasking=unmasking_of(saved.config, saved.tokenizer, task.diffusion_steps),
    )
    if chat is not None:
        results = [(text.lstrip(), completion) for text, completion in results]
    if is_main_process():
        print_all(shown, results, task.format, chat is not None, stream)
    return 0


def print_all(
    prompts: Sequence[str], results: Sequence[tuple[str, Completion]], format: Format, chat: bool, streamed: bool
) -> None:
    if streamed:
        print()
        return
    for number, (prompt, (text, completion)) in enumerate(zip(prompts, results, strict=True), 1):
        if format is Format.json:
            row = {
                "prompt": prompt,
                "text": text,
                "tokens": completion.tokens,
                "logprobs": completion.logprobs,
            }
            print(json.dumps(row | {"finish_reason": completion.finish_reason}, ensure_ascii=False))
        else:
            print(f"--- {number} of {len(prompts)}\n{'' if chat else prompt}{text}")


class Conversation(NamedTuple):
    messages: list[Any]
    tools: list[Any] | None


def conversation(task: GenerateConfig) -> Conversation | None:
    """Returns the messages of `chat=`, `task.system=` and `task.messages_file=`; None if none is set.

    Raises: ValueError for contradictory keys or invalid messages.
    """
    if task.chat is None and task.messages_file is None:
        if task.system is not None:
            raise ValueError(f"task.system={task.system!r}: needs a chat; add chat='Hello'")
        return None
    if task.prompt is not None or task.prompts or task.prompt_file is not None:
        raise ValueError(
            "chat: a chat and a prompt are mutually exclusive; chat= is answered through the run's chat template, "
            "prompt= is continued verbatim"
        )
    messages, tools = [], None
    if task.messages_file is not None:
        messages, tools = read_chat(Path(task.messages_file))
    system = [] if task.system is None else [{"role": "system", "content": task.system}]
    user = [] if task.chat is None else [{"role": "user", "content": task.chat}]
    messages = [*system, *messages, *user]
    check_messages(messages)
    return Conversation(messages, tools)


def read_chat(path: Path) -> Conversation:
    """Reads messages and optional tools from a JSON file. Raises: ValueError naming the file."""
    key = f"task.messages_file={path}"
    if not path.is_file():
        raise ValueError(f"{key}: no such file")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{key}: invalid JSON: {error}") from None
    content = content if isinstance(content, dict) else {"messages": content}
    messages, tools = content.get("messages"), content.get("tools")
    if not isinstance(messages, list) or not isinstance(tools, list | None):
        raise ValueError(f'{key}: must be a list of messages, or an object {{"messages": [...], "tools": [...]}}')
    return Conversation(messages, tools)


def encode_chat(
    tokenizer: Tokenizer, chat: Conversation, run: str
) -> tuple[list[str], list[str | list[int]], list[str]]:
    """Returns (rendered chat, token ids, stop strings). Raises: ValueError for a run without a chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"chat: the run {run!r} has no chat template; train a run with one: meshwright train run=NAME "
            f"init_from={run} tokenizer.chat_template=plain (or {', '.join(t for t in TEMPLATES if t != 'plain')}, or "
            "a file); prompt= needs no template"
        )
    options = {"tools": chat.tools, "special_tokens": tokenizer.special_texts, "add_generation_prompt": True}
    text = render(tokenizer.chat_template, chat.messages, **options)
    after = text_after_turn(tokenizer)
    return [text], [chat_ids(tokenizer, chat.messages, tools=chat.tools)], [] if after is None else [after]


def without_leading_space() -> Callable[[str], None]:
    """Returns a `show` that strips leading whitespace: some chat templates put a space before the response."""
    started = False

    def show_rest(text: str) -> None:
        nonlocal started
        text = text if started else text.lstrip()
        started = started or bool(text)
        show(text)

    return show_rest


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def all_prompts(task: GenerateConfig) -> list[str]:
    """Returns the prompts of the command line and the file. Raises: ValueError if there are none."""
    prompts = ([task.prompt] if task.prompt is not None else []) + list(task.prompts)
    if task.prompt_file is not None:
        path = Path(task.prompt_file)
        if not path.is_file():
            raise ValueError(f"task.prompt_file={task.prompt_file}: no such file")
        prompts += [line for line in path.read_text().splitlines() if line]
    if not prompts:
        raise ValueError("prompt=null: give a text to continue, prompt='def ', or a chat message, chat='Hello'")
    return prompts
