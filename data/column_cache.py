"""Numbers for each row of a corpus, computed once and read from disk thereafter: by source and row, whatever the order.

FOLDER/key.json     all that the numbers depend on
      /NAME.npy     [rows, ...] of each column, memory-mapped
      /filled.json  how many rows are there; written after them, so that a pass that was cut off goes on
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Spec = Mapping[str, tuple[tuple[int, ...], Any]]  # of each column: the shape of a row's part, and the dtype


class ColumnCache:
    """Columns of `num_rows` rows. One process writes; the others open it when it is complete."""

    def __init__(self, folder: Path, key: Mapping[str, Any], num_rows: int, columns: Spec):
        """Opens what is there. Raises: ValueError where that was made of something else, or is damaged."""
        self.folder, self.key, self.num_rows, self.columns = folder, dict(key), num_rows, columns
        self.filled = 0
        self._arrays: dict[str, np.ndarray] | None = None
        if (folder / "key.json").exists():
            self._check(json.loads((folder / "key.json").read_text()))

    def _check(self, found: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(self.key))
        for name in sorted({*wanted, *found}):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"{self.folder}: was made with {name}={found.get(name)}, and is wanted with {wanted.get(name)}; "
                    "delete the folder, and it is made anew"
                )
        if (note := self.folder / "filled.json").exists():
            self.filled = int(json.loads(note.read_text())["rows"])
            self._arrays = {name: self._load(name, "r") for name in self.columns}

    def _load(self, name: str, mode: Any) -> np.ndarray:
        path, (shape, dtype) = self.folder / f"{name}.npy", self.columns[name]
        try:
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete its folder, and it is made anew") from None
        if array.shape != (self.num_rows, *shape) or array.dtype != np.dtype(dtype):
            raise ValueError(f"{path}: is {array.shape} {array.dtype}; delete its folder, and it is made anew")
        return array

    @property
    def complete(self) -> bool:
        return self.filled == self.num_rows

    def begin(self) -> None:
        """Makes room for all rows, where there is none yet, and opens it for writing."""
        if not (self.folder / "filled.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, (shape, dtype) in self.columns.items():
                path = self.folder / f"{name}.npy"
                np.lib.format.open_memmap(path, "w+", np.dtype(dtype), (self.num_rows, *shape)).flush()
            _write(self.folder / "key.json", self.key)
            self._note()
        self._arrays = {name: self._load(name, "r+") for name in self.columns}

    def write(self, first: int, values: Mapping[str, np.ndarray]) -> None:
        """Rows from `first` on, as far as there are any; they count from the next `flush`."""
        assert self._arrays is not None, "begin() opens the table for writing"
        stop = min(first + len(next(iter(values.values()))), self.num_rows)
        for name, array in self._arrays.items():
            array[first:stop] = values[name][: stop - first]
        self.filled = stop

    def flush(self) -> None:
        for array in (self._arrays or {}).values():
            array.flush()  # type: ignore[attr-defined]
        self._note()

    def _note(self) -> None:
        _write(self.folder / "filled.json", {"rows": self.filled})

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The columns of a row. Raises: IndexError for one that is not there yet."""
        if self._arrays is None or not 0 <= row < self.filled:
            raise IndexError(f"{self.folder}: row {row} of {self.filled}")
        return {name: np.array(array[row]) for name, array in self._arrays.items()}


def _write(path: Path, content: Any) -> None:
    half = path.with_name(path.name + ".tmp")
    with half.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)
