import json

import numpy as np
import pytest

from data.batch import ColumnBatch, TokenBatch
from data.column_cache import ColumnCache
from data.loader import RowsWithColumns, padding_row, stack

SPEC = {"ids": ((3, 2), np.int32), "score": ((2,), np.float16)}


def values(first, count):
    return {
        "ids": np.arange(first * 6, (first + count) * 6, dtype=np.int32).reshape(count, 3, 2),
        "score": np.arange(first, first + count).repeat(2).reshape(count, 2).astype(np.float16),
    }


def table(folder, rows=5, **changes):
    return ColumnCache(folder, {"weights": "abc", "seq_len": 3} | changes, rows, SPEC)


def test_rows_are_read_by_number_and_an_interrupted_pass_resumes(tmp_path):
    made = table(tmp_path / "t")
    made.open_for_writing()
    made.write(0, values(0, 2))
    made.flush()
    made.write(2, values(2, 2))  # not flushed: a kill at this point loses it
    again = table(tmp_path / "t")
    assert (again.filled, again.complete) == (2, False)
    again.open_for_writing()
    again.write(2, values(2, 2))
    again.write(4, values(4, 2))  # one row past the end
    again.flush()
    read = table(tmp_path / "t")
    assert read.complete
    for row in (4, 0, 3):
        assert read[row]["score"].tolist() == [row, row]
        np.testing.assert_array_equal(read[row]["ids"], values(row, 1)["ids"][0])
    with pytest.raises(IndexError, match="row 5 of 5"):
        read[5]


def test_a_cache_with_another_key_or_damaged_files_is_refused(tmp_path):
    made = table(tmp_path / "t")
    made.open_for_writing()
    with pytest.raises(ValueError, match="was built with seq_len=3, but this run needs 4; delete the folder"):
        table(tmp_path / "t", seq_len=4)
    (tmp_path / "t" / "ids.npy").write_bytes(b"gone")
    with pytest.raises(ValueError, match="cannot be read"):
        table(tmp_path / "t")
    assert json.loads((tmp_path / "t" / "key.json").read_text())["weights"] == "abc"


def test_rows_carry_their_columns_into_batches(tmp_path):
    made = table(tmp_path / "t")
    made.open_for_writing()
    made.write(0, values(0, 5))
    rows = [TokenBatch(*(np.full(4, 10 * row + field) for field in range(5))) for row in range(5)]
    tabled = RowsWithColumns(rows, made)  # type: ignore[arg-type]
    batch = stack([tabled[3], tabled[1], padding_row(tabled[0])])
    assert isinstance(batch, ColumnBatch)
    assert batch.columns["score"][:, 0].tolist() == [3, 1, 0] and batch.tokens[:, 0].tolist() == [30, 10, 0]
