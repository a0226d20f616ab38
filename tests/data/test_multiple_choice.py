"""Multiple-choice questions: every published layout is read, and errors name the line."""

import json

import pytest

from data.evaluation.multiple_choice import Option, read_multiple_choice


def write(tmp_path, *rows):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_every_published_layout_is_read(tmp_path):
    path = write(
        tmp_path,
        {"query": "Q", "choices": ["a", "b"], "gold": 1},
        {"context_options": ["so A", "so B"], "continuation": "won", "gold": 0},
        {"context": "to be or not to", "continuation": "be"},
        {"sentence_good": "fine", "sentence_bad": "fein", "UID": "spelling"},
        {"sent_more": "x", "sent_less": "y"},
    )
    found = read_multiple_choice(path)
    assert found[0].options == (Option("Q", " a"), Option("Q", " b")) and found[0].gold == 1
    assert found[1].options == (Option("so A", " won"), Option("so B", " won"))
    assert found[2].options == (Option("to be or not to", " be"),)
    assert found[3].options == (Option("", "fine"), Option("", "fein")) and found[3].group == "spelling"
    assert found[4].options == (Option("", "x"), Option("", "y"))


def test_limits_apply_to_all_questions_and_to_each_group(tmp_path):
    rows = [{"sentence_good": "a", "sentence_bad": "b", "UID": "uv"[i % 2]} for i in range(10)]
    path = write(tmp_path, *rows)
    assert len(read_multiple_choice(path, limit=3)) == 3
    assert [p.group for p in read_multiple_choice(path, limit_each=2)] == ["u", "v", "u", "v"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "line 2: is not JSON"),
        ([1], "line 2: must be an object, not list"),
        ({"question": "?"}, "line 2: has the fields question; known layouts: query"),
        ({"query": "?", "choices": ["a"], "gold": 0}, "choices: must be a list of at least two non-empty strings"),
        ({"query": "?", "choices": ["a", "b"], "gold": 2}, "gold=2: must be the index of the correct option, 0 to 1"),
        ({"context": None, "continuation": "x"}, "context=None: must be a non-empty string"),
    ],
)
def test_errors_name_the_line_and_the_reason(tmp_path, row, reason):
    path = write(tmp_path, {"context": "a", "continuation": "b"}, row)
    with pytest.raises(ValueError, match=reason):
        read_multiple_choice(path)


def test_no_file_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="file not found"):
        read_multiple_choice(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="contains no questions"):
        read_multiple_choice(write(tmp_path))
