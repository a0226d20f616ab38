"""Disk cache of per-row columns, computed once and read by row number in any order.

FOLDER/key.json     everything the values depend on
      /NAME.npy     [rows, ...] per column, memory-mapped
      /filled.json  number of rows written; updated after the rows, so that an interrupted pass resumes
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Spec = Mapping[str, tuple[tuple[int, ...], Any]]  # column name: (shape per row, dtype)


class ColumnCache:
    """Memory-mapped columns of `num_rows` rows. One process writes; the others open it once it is complete."""

    def __init__(self, folder: Path, key: Mapping[str, Any], num_rows: int, columns: Spec):
        """Opens an existing cache. Raises: ValueError if it was built from another key or is damaged."""
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
                    f"{self.folder}: was built with {name}={found.get(name)}, but this run needs {wanted.get(name)}; "
                    "delete the folder to rebuild it"
                )
        if (note := self.folder / "filled.json").exists():
            self.filled = int(json.loads(note.read_text())["rows"])
            self._arrays = {name: self._load(name, "r") for name in self.columns}

    def _load(self, name: str, mode: Any) -> np.ndarray:
        path, (shape, dtype) = self.folder / f"{name}.npy", self.columns[name]
        try:
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete its folder to rebuild it") from None
        if array.shape != (self.num_rows, *shape) or array.dtype != np.dtype(dtype):
            raise ValueError(
                f"{path}: is {array.shape} {array.dtype}, expected {(self.num_rows, *shape)} {np.dtype(dtype)}; "
                "delete its folder to rebuild it"
            )
        return array

    @property
    def complete(self) -> bool:
        return self.filled == self.num_rows

    def open_for_writing(self) -> None:
        """Opens the columns for writing; allocates all rows first if the cache is new."""
        if not (self.folder / "filled.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, (shape, dtype) in self.columns.items():
                path = self.folder / f"{name}.npy"
                np.lib.format.open_memmap(path, "w+", np.dtype(dtype), (self.num_rows, *shape)).flush()
            _write(self.folder / "key.json", self.key)
            self._save_filled()
        self._arrays = {name: self._load(name, "r+") for name in self.columns}

    def write(self, first: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes rows starting at `first`; rows past the end are dropped. They count as filled after `flush`."""
        assert self._arrays is not None, "begin() opens the cache for writing"
        stop = min(first + len(next(iter(values.values()))), self.num_rows)
        for name, array in self._arrays.items():
            array[first:stop] = values[name][: stop - first]
        self.filled = stop

    def flush(self) -> None:
        for array in (self._arrays or {}).values():
            array.flush()  # type: ignore[attr-defined]
        self._save_filled()

    def _save_filled(self) -> None:
        _write(self.folder / "filled.json", {"rows": self.filled})

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """Returns the columns of a row. Raises: IndexError if the row has not been written."""
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
