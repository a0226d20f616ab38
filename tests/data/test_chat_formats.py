"""Every published conversation format is parsed, and unusable records are counted with their position."""

import gzip
import json
from pathlib import Path

import pytest

from data.records.chat_encoding import check_messages
from data.records.chat_formats import Conversation, InvalidRecord, find_format, read_conversations, to_conversation
from data.records.record import BadRecords, RecordFormat
from data.sources.readers import (
    RECORD_BYTES,
    ArrayRecordConfig,
    HuggingFaceConfig,
    JsonlConfig,
    ParquetConfig,
    SyntheticConfig,
)

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "sft"
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WEATHER = {"name": "weather", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def messages_of(*turns):
    return [{"role": role, "content": content} for role, content in turns]


# name: (fields, format, messages, tools)
FORMATS = {
    "messages": ({"messages": [USER, ASSISTANT]}, "messages", [USER, ASSISTANT], None),
    "messages as JSON": ({"messages": json.dumps([USER, ASSISTANT])}, "messages", [USER, ASSISTANT], None),
    "names of other makers": (
        {"messages": messages_of(("human", "q"), ("model", "a"))},
        "messages",
        [USER, ASSISTANT],
        None,
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        "sharegpt",
        messages_of(("system", "s"), ("user", "q"), ("assistant", "a")),
        None,
    ),
    "sharegpt that calls": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "{}"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": json.dumps([WEATHER]),
            "system": "",
        },
        "sharegpt",
        [USER, CALLED, {"role": "tool", "content": "{}"}, ASSISTANT],
        [{"type": "function", "function": WEATHER}],
    ),
    "arguments as JSON": (
        {"messages": [USER, {**CALLED, "tool_calls": [{"name": "weather", "arguments": '{"city": "Bern"}'}]}]},
        "messages",
        [USER, CALLED],
        None,
    ),
    "no tools": ({"messages": [USER, ASSISTANT], "tools": "[]"}, "messages", [USER, ASSISTANT], None),
    "instruction": ({"instruction": "q", "input": "", "output": "a"}, "instruction", [USER, ASSISTANT], None),
    "instruction with input": (
        {"instruction": "q", "input": "x", "response": "a"},
        "instruction",
        messages_of(("user", "q\n\nx"), ("assistant", "a")),
        None,
    ),
    "instruction with history": (
        {"instruction": "q", "output": "a", "history": [["1", "2"]], "system": "s"},
        "instruction",
        messages_of(("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "q"), ("assistant", "a")),
        None,
    ),
    "completion": ({"prompt": "q", "completion": "a"}, "completion", [USER, ASSISTANT], None),
    "response": ({"prompt": "q", "response": "a"}, "completion", [USER, ASSISTANT], None),
    "completion of messages": ({"prompt": [USER], "completion": [ASSISTANT]}, "completion", [USER, ASSISTANT], None),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "tool_call", "value": json.dumps(CALL["function"])},
                    ],
                },
            ]
        },
        "messages",
        [USER, {**CALLED, "content": "", "reasoning_content": "hm"}],
        None,
    ),
    "what a table adds to have one type": (
        {"messages": [{**USER, "tool_calls": None, "name": None}, {**ASSISTANT, "tool_calls": []}], "tools": None},
        "messages",
        [USER, ASSISTANT],
        None,
    ),
}


@pytest.mark.parametrize(("fields", "format", "messages", "tools"), FORMATS.values(), ids=FORMATS.keys())
def test_every_format_is_detected_by_its_fields_and_parsed(fields, format, messages, tools):
    assert find_format(fields).name == format
    found = to_conversation(fields, RecordFormat[format])
    assert found == Conversation(messages, tools)
    check_messages(found.messages)


def test_a_text_is_not_a_conversation():
    assert find_format({"text": "x"}) is RecordFormat.text and to_conversation({"text": "x"}, RecordFormat.text) == "x"
    assert find_format({"body": "x"}, "body") is RecordFormat.text


BAD = {
    "no known fields": ({"a": 1}, "auto", "fields of no known format"),
    "no output": ({"instruction": "q", "text": "x"}, "instruction", "no field 'output'"),
    "a null output": ({"instruction": "q", "output": None}, "auto", "field 'output' is not a string"),
    "an empty output": ({"instruction": "q", "output": " \n"}, "auto", "empty answer"),
    "nothing asked": ({"instruction": "", "input": "", "output": "a"}, "auto", "empty instruction"),
    "a history of texts": ({"instruction": "q", "output": "a", "history": ["x"]}, "auto", "not a list of string pairs"),
    "an empty response": ({"prompt": "q", "response": ""}, "auto", "empty answer"),
    "a prompt that is a number": ({"prompt": 3, "response": "a"}, "auto", "neither a string nor a list of messages"),
    "no messages": ({"messages": []}, "auto", "no messages"),
    "messages that are text": ({"messages": "hello"}, "auto", "field 'messages' is invalid JSON"),
    "messages that are an object": ({"messages": {}}, "auto", "field 'messages' is not a list"),
    "a message that is text": ({"messages": ["hello"]}, "auto", "a message is not an object"),
    "an unknown role": ({"messages": messages_of(("wizard", "q"))}, "auto", "unknown message role"),
    "a role that is a list": ({"messages": messages_of(([], "q"))}, "auto", "unknown message role"),
    "a content that is a number": ({"messages": messages_of(("user", 3))}, "auto", "message content is not a string"),
    "no content": ({"messages": [{"role": "user"}, ASSISTANT]}, "auto", "a message without content"),
    "no answer": ({"messages": [USER]}, "auto", "no assistant turn"),
    "an empty turn": ({"messages": [USER, messages_of(("assistant", ""))[0]]}, "auto", "empty answer"),
    "a picture": (
        {"messages": messages_of(("user", [{"type": "image", "image": "x"}]))},
        "auto",
        "neither text, reasoning nor a tool call",
    ),
    "a call of nothing": (
        {"messages": [USER, {**CALLED, "tool_calls": [{}]}]},
        "auto",
        "a tool call without a name",
    ),
    "a broken call": (
        {"conversations": [{"from": "function_call", "value": "{"}]},
        "auto",
        "a tool call is invalid JSON",
    ),
    "broken tools": ({"messages": [USER, ASSISTANT], "tools": "{"}, "auto", "field 'tools' is invalid JSON"),
    "a tool that is text": ({"messages": [USER, ASSISTANT], "tools": ["x"]}, "auto", "a tool is not an object"),
    "a system that is a number": (
        {"messages": [USER, ASSISTANT], "system": 3},
        "auto",
        "field 'system' is not a string",
    ),
    "an empty text": ({"text": " "}, "auto", "empty document"),
}


@pytest.mark.parametrize(("fields", "format", "reason"), BAD.values(), ids=BAD.keys())
def test_invalid_records_are_refused_with_the_reason(fields, format, reason):
    with pytest.raises(InvalidRecord, match=reason):
        known = RecordFormat[format]
        to_conversation(fields, find_format(fields) if known is RecordFormat.auto else known)


def read(source):
    bad = BadRecords()
    found = [c for unit in source.units() for _, c in read_conversations(source, unit, bad)]
    return found, bad.found


def test_bad_lines_are_counted_with_file_and_line_and_the_rest_is_read(tmp_path):
    good = json.dumps({"messages": [USER, ASSISTANT]}).encode()
    huge = b'{"text": "' + b"x" * (10 << 20) + b'"}'
    lines = [good, b'{"messages": [', good[:-5] + b'\xff"}]}', huge, b"[" * 100_000, b"3", b"", good, b'{"text": "x"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    found, bad = read(JsonlConfig(paths=[str(path)]))
    assert len(found) == 2 and len(huge) > RECORD_BYTES
    places = {reason: entry["first"].partition(":")[0] for reason, entry in bad[str(path)].items()}
    assert places == {
        "invalid JSON": "line 2",
        "not UTF-8": "line 3",
        "a line longer than 4 MiB": "line 4",
        "not an object": "line 6",
        "no field 'messages'": "line 9",
    }
    assert bad[str(path)]["invalid JSON"]["count"] == 2


def test_each_file_has_its_own_format_which_may_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, ASSISTANT]}))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "q", "response": "a", "text": "no"}))
    found, bad = read(JsonlConfig(paths=[str(tmp_path)]))
    assert found == [Conversation([USER, ASSISTANT])] * 2 and not bad
    found, bad = read(JsonlConfig(paths=[str(tmp_path)], chat_format=RecordFormat.text))
    assert found == ["no"] and list(bad) == [str(tmp_path / "a.jsonl")]


def test_a_source_of_documents_gives_texts(tmp_path):
    source = SyntheticConfig(num_documents=3)
    texts = [text for unit in source.units() for text in source.read(unit, BadRecords())]
    assert read(source) == (texts, {})


def test_tables_hold_conversations_too(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="needs the extra 'parquet'")
    import pyarrow.parquet

    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [{"role": "user", "content": None}]}]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found, bad = read(ParquetConfig(paths=[str(tmp_path / "a.parquet")]))
    assert found == [Conversation([USER, ASSISTANT])]
    assert bad == {
        str(tmp_path / "a.parquet"): {"a message without content": {"count": 1, "first": "row 2: message 1"}}
    }


def test_array_records_hold_conversations_texts_and_examples(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module", reason="needs the extra 'arrayrecord'")
    from tests.data.test_readers import example

    contents = {
        "json": [json.dumps({"messages": [USER, ASSISTANT]}).encode(), b'{"messages": '],
        "example": [example(prompt=b"q", response=b"a")],
        "text": [b"hello"],
    }
    for name, records in contents.items():
        writer = module.ArrayRecordWriter(str(tmp_path / f"{name}.array_record"), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    found, bad = read(ArrayRecordConfig(paths=[str(tmp_path)]))
    talk = Conversation([USER, ASSISTANT])
    assert found == [talk, talk, "hello"]
    assert bad == {str(tmp_path / "json.array_record"): {"invalid JSON": {"count": 1, "first": "record 2"}}}


def test_data_sets_hold_conversations(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'huggingface'")
    rows = [{"instruction": "q", "input": "", "output": answer} for answer in ("a", " ")]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    found, bad = read(HuggingFaceConfig(path=str(tmp_path / "set")))
    assert found == [Conversation([USER, ASSISTANT])]
    assert bad == {str(tmp_path / "set"): {"empty answer": {"count": 1, "first": "row 2: message 2"}}}


@pytest.mark.skipif(not REAL.exists(), reason="needs the shared data")
@pytest.mark.parametrize("path", sorted(REAL.glob("*.jsonl")), ids=lambda path: path.stem)
def test_real_files_are_read_completely(path):
    found, bad = read(JsonlConfig(paths=[str(path)]))
    assert not bad and len(found) == len(path.read_text().splitlines())
    for conversation in found:
        check_messages(conversation.messages)
