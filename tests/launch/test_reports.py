"""Reports: a JSON file, a PNG, and output on the terminal as JSON or tables."""

import json

import pytest

from launch.reports import make_table, short_number, write_report
from tests.launch.jobs import composed


@pytest.mark.parametrize(("number", "said"), [(842, "842"), (12_340, "12.3k"), (1.25e9, "1.25B"), (3e12, "3T")])
def test_numbers_have_three_figures(number, said):
    assert short_number(number) == said


def test_columns_of_numbers_are_right_aligned():
    table = make_table("name", "count", "what", left=(0, 2))
    assert [column.justify for column in table.columns] == ["left", "right", "left"]


@pytest.mark.parametrize("form", ["table", "json"])
def test_a_report_is_written_and_printed_in_the_requested_format(tmp_path, capsys, form):
    config = composed("task=plan", f"task.format={form}")
    draw = lambda path: path.write_bytes(b"picture")
    write_report(config, tmp_path / "new", "one", {"a": 1}, draw, lambda: print("a is 1"))
    assert json.loads((tmp_path / "new" / "one.json").read_text()) == {"a": 1}
    assert (tmp_path / "new" / "one.png").read_bytes() == b"picture"
    said = capsys.readouterr().out
    if form == "json":
        assert json.loads(said) == {"a": 1}
    else:
        assert said.splitlines() == ["a is 1", f"written: {tmp_path / 'new' / 'one'}.json and .png"]
