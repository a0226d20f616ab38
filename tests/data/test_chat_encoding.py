"""Chats are encoded with the same ids as in transformers, and the mask selects assistant tokens."""

import json

import numpy as np
import pytest

from data.records.chat_encoding import (
    ROLES,
    SMALL_TALK,
    TEMPLATES,
    chat_ids,
    check_messages,
    configured,
    encode_chat,
    text_after_turn,
    with_template,
)
from data.records.chat_template import literals, marks_generation, render, render_marked
from data.tokenizers.kinds import Bytes, Characters, SentencePieceConfig, TokenizerConfig, TokenizerJsonConfig

CONTROLS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
TEXT = "the cat sat on the mat, and the dog said: hello! 你好 日本 \U0001f600 User: Assistant: [INST] 42\n\n" * 30
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says <how> it is \"there\" & now, 'é'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <3"}}}
# name: (messages, tools, add_generation_prompt)
AWKWARD = {
    "one turn": ([user("hello"), assistant("the cat")], None, False),
    "a system turn": ([system("Be brief."), user("hello"), assistant("hi")], None, False),
    "an empty system turn": ([system(""), user("hello"), assistant("hi")], None, False),
    "many turns": ([user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")], None, False),
    "a generation prompt": ([system("x"), user("a"), assistant("b"), user("c")], None, True),
    "empty turns": ([user(""), assistant(""), user(""), assistant("")], None, False),
    "emoji": ([user("\U0001f600"), assistant("\U0001f469\u200d\U0001f467 ok \U0001f600")], None, False),
    "CJK": ([user("你好，世界"), assistant("日本語です。한국어")], None, False),
    "special tokens from a user": (
        [user("x</s><s>y<|im_end|>\n<|im_start|>system\n"), assistant("<s> no")],
        None,
        False,
    ),
    "spaces and newlines": ([user("  a \n\n b  "), assistant(" \n c\t\n\n")], None, False),
    "braces that are no template": ([user("{{ bos_token }} {% if %}"), assistant("{# no #}")], None, False),
    "tools": ([user("weather?"), assistant("well")], TOOLS, True),
    "a call and its answer": (
        [
            system("Help."),
            user("weather?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "content": '{"t": 3}', "tool_call_id": "1"},
            assistant("cold", tool_calls=None),
        ],
        TOOLS,
        False,
    ),
    "two calls after words": ([user("?"), assistant("let me see", tool_calls=[CALL, CALL])], TOOLS, False),
}


def hf_tokenizer(style):
    """Small tokenizers of the two common kinds: byte-level BPE, and SentencePiece-style BPE with byte fallback."""
    tokenizers = pytest.importorskip("tokenizers")
    if style == "byte-level":
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        words = tokenizers.Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+")
        split = tokenizers.pre_tokenizers.Split(words, "isolated")
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
        inner.decoder = tokenizers.decoders.ByteLevel()
        alphabet, more = tokenizers.pre_tokenizers.ByteLevel.alphabet(), []
    else:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        decoders = tokenizers.decoders
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet, more = [], ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*CONTROLS, *more], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT], trainer)
    if more:  # trained on words but applied without splitting; byte tokens are regular tokens, not special ones
        content = json.loads(inner.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
        content["pre_tokenizer"]["split"] = False
        inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return inner


@pytest.fixture(scope="module", params=["byte-level", "pieces"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    hf_tokenizer(request.param).save(str(path / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(described))
    return path


@pytest.fixture(scope="module")
def base(folder):
    return TokenizerJsonConfig(path=str(folder)).build(lambda: iter(()))


def sentencepiece(**more):
    special = CONTROLS[2:]
    return SentencePieceConfig(vocab_size=400, special_tokens=special, **more).build(lambda: iter([TEXT]))


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "tokenizer_json"])
def tokenizer(request, tmp_path_factory):
    """Tokenizers that support the `plain` template."""
    if request.param == "bytes":
        return Bytes()
    if request.param == "sentencepiece":
        return sentencepiece()
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    hf_tokenizer("byte-level").save(str(path))
    return TokenizerJsonConfig(path=str(path), bos="<s>", eos="</s>").build(lambda: iter(()))


# Templates of ours


@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_starts_with_one_bos_and_ends_assistant_turns(base, name, case):
    made = with_template(base, name)
    messages, tools, prompted = AWKWARD[case]
    ids, mask = encode_chat(made, messages, tools=tools, add_generation_prompt=prompted)
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape
    assert ids[0] == made.bos_id and ids[1] != made.bos_id
    ends = [i for i in range(len(ids)) if mask[i] and (i + 1 == len(ids) or not mask[i + 1])]
    assert len(ends) == sum(m["role"] == "assistant" for m in messages)
    assert all(ids[end] in made.stop_ids for end in ends), "the end-of-turn token is in the loss"


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_prompts_match_the_training_ids(base, name):
    made = with_template(base, name)
    messages = [system("Be brief."), user("hello 日本"), assistant("the cat \U0001f600"), user("a"), assistant("b")]
    full, mask = encode_chat(made, messages)
    for at in (2, 4):
        prompt = chat_ids(made, messages[:at])
        assert full[: len(prompt)].tolist() == prompt
        assert mask[len(prompt)] and not mask[len(prompt) - 1]


def test_plain_works_for_every_tokenizer(tokenizer):
    made = with_template(tokenizer, "plain")
    ids, mask = encode_chat(made, [system("S"), user("né 日本"), assistant("\U0001f600 yes"), user("x")])
    assert ids[mask][-1] == made.eos_id and mask.sum() > 2
    assert made.decode(ids[mask]).strip() == "\U0001f600 yes"
    assert text_after_turn(made) is None


def test_plain_works_for_characters_where_a_blank_line_ends_an_answer():
    made = with_template(Characters("".join(map(chr, range(10, 127)))), "plain")
    ids, mask = encode_chat(made, SMALL_TALK)
    assert made.decode(ids) == "User: Hello\n\nAssistant: Hi\n\n" and made.decode(ids[mask]) == " Hi\n\n"
    assert text_after_turn(made) == "\n\nUser:"
    with pytest.raises(ValueError, match=r"chat_template=mistral: .*the tokenizer has none"):
        with_template(made, "mistral")
    with pytest.raises(ValueError, match="is not in the training text"):
        with_template(Characters("abc"), "plain")


def test_control_tokens_trained_into_sentencepiece_make_chatml_possible():
    made = with_template(sentencepiece(), "chatml")
    ids, mask = encode_chat(made, [user("</s>hello"), assistant("the cat")])
    assert made.stop_ids == (made.eos_id, made.special_tokens["<|im_end|>"])
    assert ids[mask][-1] == made.special_tokens["<|im_end|>"]
    assert ids.tolist().count(made.special_tokens["<|im_start|>"]) == 2
    assert made.eos_id in ids, "as in transformers, the text of a special token is encoded as that token"
    assert made.encode("<|im_start|>")[0] != made.special_tokens["<|im_start|>"], "a document is text"


def test_a_template_without_its_special_tokens_is_refused_naming_them():
    needs = r"chat_template=llama3: needs the special tokens <\|end_header_id\|>, <\|eot_id\|>, .*=plain"
    with pytest.raises(ValueError, match=needs):
        with_template(Bytes(), "llama3")
    with pytest.raises(ValueError, match=r"chat_template=gemma: needs the special tokens <end_of_turn>, <start_of_t"):
        with_template(Bytes(), "gemma")
    with pytest.raises(ValueError, match=r"chat_template=chatlm: must be a file or one of chatml"):
        with_template(Bytes(), "chatlm")


def test_a_template_from_a_file_must_end_assistant_turns(tmp_path):
    path = tmp_path / "mine.jinja"
    body = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}END{% endgeneration %}\n{% endfor %}"
    path.write_text(body.replace("END", ""))
    with pytest.raises(ValueError, match="does not end with a special token"):
        with_template(Bytes(), str(path))
    path.write_text(body.replace("END", "{{ eos_token }}"))
    assert configured(Bytes(), TokenizerConfig(chat_template=str(path))).chat_template == path.read_text()
    path.write_text("{% for m in messages %}")
    with pytest.raises(ValueError, match=r"chat template, line 1: "):
        with_template(Bytes(), str(path))


def test_a_bos_that_the_template_writes_is_not_written_twice(base, tmp_path):
    path = tmp_path / "mine.jinja"
    turn = "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    path.write_text("{{ bos_token }}" + turn)
    assert with_template(base, str(path)).chat_template == path.read_text()
    path.write_text(turn)
    assert with_template(base, str(path)).chat_template == "{{ bos_token }}" + turn
    assert with_template(base.with_policy(add_bos=False), str(path)).chat_template == turn
    path.write_text("<s>{{ bos_token }}" + turn)
    with pytest.raises(ValueError, match="starts with two BOS tokens"):
        with_template(base, str(path))


# Templates without marks


UNMARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_without_generation_tags_the_mask_comes_from_rendered_prefixes(base):
    assert not marks_generation(UNMARKED) and marks_generation("{%- generation -%}x{%- endgeneration -%}")
    marked = with_template(base, "chatml")
    unmarked = configured(base.with_policy(chat_template=UNMARKED), TokenizerConfig())
    assert unmarked.stop_ids == marked.stop_ids == (base.eos_id, base.special_tokens["<|im_end|>"])
    for case in ("one turn", "many turns", "a generation prompt", "empty turns", "CJK", "spaces and newlines"):
        messages, _, prompted = AWKWARD[case]
        ids, mask = encode_chat(unmarked, messages, add_generation_prompt=prompted)
        want = encode_chat(marked, messages, add_generation_prompt=prompted)
        assert ids.tolist() == want.ids.tolist() and mask.tolist() == want.assistant_mask.tolist(), case


def test_a_template_that_rewrites_history_is_refused_for_training_but_not_for_generation(base):
    forgetful = UNMARKED.replace("{{ m.content }}", "{{ m.content if loop.last else 'forgotten' }}")
    made = base.with_policy(chat_template=forgetful)
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template renders this turn differently"):
        encode_chat(made, messages)
    assert chat_ids(made, messages[:3])


# Rendering


def test_template_errors_name_the_message():
    template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"messages\[2\]: the chat template failed: roles must alternate"):
        render(template, [user("a"), assistant("b"), assistant("c"), user("d")], special_tokens={})
    with pytest.raises(ValueError, match=r"messages\[0\]: the chat template failed"):
        render("{{ messages[0].content + 1 }}", [user("a")], special_tokens={})


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace() %}{% set n.__call__ = 1 %}",
        "{% set n = namespace(_x=1) %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template):
    with pytest.raises(ValueError, match=r"the chat template failed"):
        print(render(template, [user("a")], special_tokens={}))


def test_user_text_cannot_forge_a_mark():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    text = "\ufdd00\ufdd1x\ufdd00\ufdd2 \ufdd01\ufdd1"
    found = render_marked(template, [user(text), user("y")], special_tokens={})
    assert found == (text + "y", [(0, len(text)), (len(text), len(text) + 1)])


def test_tools_are_not_escaped_as_for_web_pages():
    assert render("{{ tools | tojson }}", [user("a")], tools=[{"a": "<é&'>"}], special_tokens={}) == '[{"a": "<é&\'>"}]'
    assert "x" in literals("x{{ 'y' }}") and "y" in literals("x{{ 'y' }}")


BAD = {
    "no list": ("hi", r"messages='hi': must be a list"),
    "nothing": ([], r"messages=\[\]: is empty"),
    "no object": (["hi"], r"messages\[0\]='hi': must be an object"),
    "a ShareGPT role": ([user("a"), {"role": "gpt", "content": "b"}], r"messages\[1\].role='gpt'.*write 'assistant'"),
    "no role": ([{"content": "b"}], r"messages\[0\].role=None: must be one of system, "),
    "no content": ([{"role": "user"}], r"messages\[0\].content: is missing"),
    "no content and no call": ([assistant(None)], r"messages\[0\].content: is missing"),
    "parts": ([user([{"type": "text", "text": "a"}])], r"messages\[0\].content=\[.*join the texts of its parts"),
    "a number": ([user(3)], r"messages\[0\].content=3: must be a string"),
    "calls of a user": ([{**user("a"), "tool_calls": [CALL]}], r"only the assistant can call tools, not 'user'"),
    "a call without a name": ([assistant("", tool_calls=[{"function": {}}])], r"messages\[0\].tool_calls=.*list like"),
}


@pytest.mark.parametrize(("messages", "error"), BAD.values(), ids=BAD.keys())
def test_invalid_messages_are_refused_with_their_index(messages, error):
    with pytest.raises(ValueError, match=error):
        check_messages(messages)


def test_all_awkward_conversations_are_allowed():
    for messages, _, _ in AWKWARD.values():
        check_messages(messages)
        assert {m["role"] for m in messages} <= set(ROLES)


def test_without_a_template_the_error_names_the_fix():
    with pytest.raises(ValueError, match=r"tokenizer.chat_template=NAME \(chatml, "):
        encode_chat(Bytes(), SMALL_TALK)


# Against transformers


# Conventions of widely used models, written independently: they render the same text with other code.
PUBLISHED = {
    "instructions with a system block": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] or '' %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "turns with a default system": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n"
        '        {{- "\\n" }}\n        {{- tool | tojson(indent=2) }}\n    {%- endfor %}\n'
        "    {{- '<|im_end|>\\n' }}\n{%- elif messages[0].role != 'system' %}\n"
        "    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {%- if message.role == 'tool' %}{% continue %}{%- endif %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}\n"
        "    {%- for call in message.tool_calls or [] %}\n        {{- call.function | tojson }}\n    {%- endfor %}\n"
        "    {{- '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "headers with a date": (
        "{{- bos_token }}\n{%- set ns = namespace(n=0) %}\n{%- if strftime_now is defined %}\n"
        '    {%- set date = strftime_now("%d %b %Y") %}\n{%- endif %}\n'
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date + "<|eot_id|>" }}\n'
        "{%- for message in messages %}\n    {%- set ns.n = ns.n + 1 %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
        "    {%- if message.role == 'assistant' %}\n"
        "        {% generation %}{{ message['content'] | default('', true) | trim + '<|eot_id|>' }}"
        "{% endgeneration %}\n"
        "    {%- else %}\n        {{- message['content'] | trim + '<|eot_id|>' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
        "{%- endif %}\n{#- {{ ns.n }} turns #}\n"
    ),
}


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parity
@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("name", [*TEMPLATES, *PUBLISHED])
def test_ids_and_masks_are_those_of_transformers(theirs, base, name, case):
    made = with_template(base, name) if name in TEMPLATES else base.with_policy(chat_template=PUBLISHED[name])
    messages, tools, prompted = AWKWARD[case]
    marked = marks_generation(made.chat_template)
    want = theirs.apply_chat_template(
        messages,
        chat_template=made.chat_template,
        tools=tools,
        add_generation_prompt=prompted,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=marked,
    )
    assert chat_ids(made, messages, tools=tools, add_generation_prompt=prompted) == want["input_ids"]
    if marked:
        ids, mask = encode_chat(made, messages, tools=tools, add_generation_prompt=prompted)
        assert ids.tolist() == want["input_ids"]
        assert mask.astype(int).tolist() == want["assistant_masks"]


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_exported_tokenizer_makes_the_same_chats_in_transformers(base, name, tmp_path):
    from data.tokenizers.huggingface_export import write_tokenizer

    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
    made = with_template(base, name)
    write_tokenizer(tmp_path, made, {})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = configured(TokenizerJsonConfig(path=str(tmp_path)).build(lambda: iter(())), TokenizerConfig())
    assert again.policy == made.policy
    stops = transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert ({stops} if isinstance(stops, int) else set(stops)) == set(made.stop_ids)
    for messages, tools, prompted in AWKWARD.values():
        given = {"tools": tools, "add_generation_prompt": prompted}
        want = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **given)["input_ids"]
        assert chat_ids(made, messages, **given) == want
    assert theirs("hello")["input_ids"] == made.add_bos_token(made.encode("hello"))


@pytest.mark.parity
def test_reasoning_has_the_names_used_by_transformers(theirs, base):
    template = "{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{{ m.thinking }}\n{% endfor %}"
    messages = [user("a"), assistant("b", thinking="c", name=None), assistant("b", reasoning_content="d")]
    want = theirs.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=True)["input_ids"]
    assert chat_ids(base.with_policy(chat_template=template), messages, add_generation_prompt=False) == want
