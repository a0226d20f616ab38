"""Loss masks of conversations: assistant turns and their end tokens; nothing from turns that are cut."""

import json

import numpy as np
import pytest

from data.loader import PackedRows
from data.packing import Packing
from data.records.chat_encoding import chat_ids, encode_chat, with_template
from data.records.chat_formats import Conversation, InvalidRecord
from data.records.encoding import (
    EncodingConfig,
    LossMask,
    OnOverflow,
    encode_example,
    extract_texts,
    last_turn,
    marked_text,
    read_examples,
    runs,
    with_ends,
)
from data.records.record import BadRecords
from data.sources.readers import JsonlConfig
from data.tokenizers.kinds import Bytes, Characters

EOS = 256
TALK = Conversation(
    [
        {"role": "system", "content": "S"},
        *({"role": role, "content": f"{role} {i}"} for i in (1, 2, 3) for role in ("user", "assistant")),
    ]
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALLING = Conversation(
    [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ],
    TOOLS,
)


class PadIsEos(Bytes):
    """A tokenizer with pad = eos, as is common in published ones."""

    pad_id = EOS


@pytest.fixture
def tokenizer():
    return with_template(PadIsEos(), "plain")


def encoding(loss_mask=LossMask.assistant, on_overflow=OnOverflow.truncate_turns, max_length=1000):
    return EncodingConfig(loss_mask, on_overflow, max_length)


def masked_texts(tokenizer, example):
    return [tokenizer.decode(example.ids[start:stop]) for start, stop in runs(example.loss_mask)]


def test_ids_equal_those_of_the_full_conversation_rendered_once(tokenizer):
    for talk in (TALK, CALLING):
        example = encode_example(tokenizer, talk, encoding())
        want = chat_ids(tokenizer, talk.messages, tools=talk.tools, add_generation_prompt=False)
        assert example.ids.tolist() == want and not example.truncated


def test_every_assistant_turn_is_in_the_loss_with_its_end(tokenizer):
    example = encode_example(tokenizer, TALK, encoding())
    assert masked_texts(tokenizer, example) == [" assistant 1", " assistant 2", " assistant 3"]
    assert [int(example.ids[end - 1]) for _, end in runs(example.loss_mask)] == [EOS] * 3
    calls = masked_texts(tokenizer, encode_example(tokenizer, CALLING, encoding()))
    assert calls == [' <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', " two"]


def test_loss_on_chooses_turns(tokenizer):
    full = encode_example(tokenizer, TALK, encoding())
    last = encode_example(tokenizer, TALK, encoding(LossMask.last_turn))
    assert runs(last.loss_mask) == runs(full.loss_mask)[-1:]
    assert encode_example(tokenizer, TALK, encoding(LossMask.all)).loss_mask.all()


def test_end_tokens_are_in_the_loss_if_pad_is_eos_and_padding_never(tokenizer):
    example = encode_example(tokenizer, TALK, encoding())

    class Corpus:
        fingerprint = ""
        lengths = np.array([len(example.ids)])
        document = staticmethod(lambda index, start, stop: example.ids[start:stop])
        loss_mask = staticmethod(lambda index, start, stop: example.loss_mask[start:stop])

    row = PackedRows(Corpus(), seq_len=len(example.ids) + 9, packing=Packing.best_fit, seed=0)[0]
    in_loss = row.loss_mask > 0
    assert (row.targets[in_loss] == EOS).sum() == 3 and not in_loss[len(example.ids) - 1 :].any()
    # The mask is shifted with the targets, once.
    assert row.targets[in_loss].tolist() == example.ids[example.loss_mask].tolist()


@pytest.mark.parametrize("loss_mask", LossMask)
@pytest.mark.parametrize("on_overflow", OnOverflow)
def test_an_example_never_exceeds_a_row_and_has_targets(tokenizer, loss_mask, on_overflow):
    full = encode_example(tokenizer, TALK, encoding(loss_mask))
    for length in range(1, len(full.ids) + 1):
        try:
            example = encode_example(tokenizer, TALK, encoding(loss_mask, on_overflow, length))
        except InvalidRecord as error:
            assert "data.seq_len" in error.reason
            continue
        assert len(example.ids) <= length and example.loss_mask[1:].any()
        assert example.ids.tolist() == full.ids[: len(example.ids)].tolist()
        assert example.loss_mask.tolist() == full.loss_mask[: len(example.ids)].tolist()
        assert example.truncated == (len(example.ids) < len(full.ids))
        if on_overflow is OnOverflow.truncate_turns and example.truncated:
            assert example.ids[-1] == EOS, "it ends with a complete turn"
        assert not (on_overflow is OnOverflow.drop and example.truncated)


def test_truncate_turns_retains_the_turns_that_fit(tokenizer):
    full = encode_example(tokenizer, TALK, encoding())
    ends = [end for _, end in runs(full.loss_mask)]
    for length, turns in ((ends[0], 1), (ends[1] - 1, 1), (ends[1], 2), (ends[2] - 1, 2)):
        assert len(runs(encode_example(tokenizer, TALK, encoding(max_length=length)).loss_mask)) == turns
    with pytest.raises(InvalidRecord, match=rf"longer than data\.seq_len={ends[0] - 1}"):
        encode_example(tokenizer, TALK, encoding(max_length=ends[0] - 1))
    with pytest.raises(InvalidRecord, match=rf"longer than data\.seq_len={ends[1]}"):
        encode_example(tokenizer, TALK, encoding(LossMask.last_turn, max_length=ends[1]))


def test_an_example_without_targets_after_truncation_is_dropped(tokenizer):
    with pytest.raises(InvalidRecord, match=r"no token contributes to the loss before data\.seq_len"):
        encode_example(tokenizer, TALK, encoding(on_overflow=OnOverflow.truncate, max_length=20))


def test_every_token_of_a_text_is_in_the_loss_as_in_pretraining(tokenizer):
    example = encode_example(tokenizer, "hello", encoding(max_length=2))
    assert example.ids.tolist() == [*b"hello", EOS] and example.loss_mask.all()
    with pytest.raises(InvalidRecord, match="no token contributes to the loss"):
        encode_example(Characters("ab"), "a", encoding())


def test_an_end_token_outside_the_generation_tags_is_in_the_loss():
    ids = np.array([5, 6, 9, 5, 6, 9, 9, 5, 6])
    mask = np.array([0, 1, 0, 0, 1, 1, 0, 0, 1], bool)
    # The first turn lacks its end; the second has it already; the third has none.
    assert with_ends(ids, mask, (9,)).tolist() == [False, True, True, False, True, True, False, False, True]
    assert runs(last_turn(mask)) == [(8, 9)] and runs(last_turn(mask[:0])) == []


def test_a_template_that_rewrites_earlier_turns_is_refused_and_counted(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}:"
        "{{ m.content if loop.last or m.role != 'assistant' else '...' }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": t.messages}) + "\n" for t in (TALK, CALLING, TALK)))
    source, bad = JsonlConfig(paths=[str(path)]), BadRecords()
    tokenizer = Bytes().with_policy(chat_template=template)
    assert not list(read_examples(source, source.units()[0], bad, tokenizer, encoding()))
    [(reason, entry)] = bad.found[str(path)].items()
    assert "renders this turn differently" in reason and entry["count"] == 3 and entry["first"].startswith("line 1: ")


def test_without_a_template_conversations_are_refused_and_texts_are_not(tmp_path):
    path = tmp_path / "a.jsonl"
    source = JsonlConfig(paths=[str(path)])
    read = lambda: list(read_examples(source, source.units()[0], BadRecords(), Bytes(), encoding()))
    path.write_text('{"text": "a"}\n')
    assert len(read()) == 1
    path.write_text(json.dumps({"messages": TALK.messages}))
    with pytest.raises(ValueError, match=r"tokenizer.chat_template=null: .* tokenizer.chat_template=NAME"):
        read()


def test_marked_text_shows_the_loss_mask(tokenizer):
    ids, mask = encode_chat(tokenizer, TALK.messages[1:3])
    assert marked_text(tokenizer, ids, mask) == "User: user 1\n\nAssistant:⟦ assistant 1<|endoftext|>⟧\n\n"


def test_texts_of_a_conversation_are_its_contents():
    assert extract_texts(CALLING) == ["go", "2", "two"] and extract_texts("x") == ["x"]


@pytest.mark.parity
def test_masks_of_tool_conversations_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
    from data.tokenizers.kinds import TokenizerJsonConfig
    from tests.data.test_chat_encoding import hf_tokenizer

    hf_tokenizer("byte-level").save(str(tmp_path / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    base = TokenizerJsonConfig(path=str(tmp_path)).build(lambda: iter(()))
    for name in ("chatml", "gemma", "llama3", "plain"):
        made = with_template(base, name)
        for talk in (TALK, CALLING):
            want = theirs.apply_chat_template(
                talk.messages,
                chat_template=made.chat_template,
                tools=talk.tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            example = encode_example(made, talk, encoding())
            assert example.ids.tolist() == want["input_ids"]
            assert example.loss_mask.astype(int).tolist() == want["assistant_masks"]
            assert example.ids.tolist().count(made.bos_id) == 1
