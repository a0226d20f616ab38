"""Records of rollbacks after loss spikes, for inspection and replay.

    runs/NAME/incidents/STEP-N.json   the metrics, the checkpoint restored, the rows skipped
                       /STEP-N.npz    the complete global batch of that update; N counts earlier incidents

Any later start from that checkpoint reads the JSON file and skips the same rows. `meshwright replay` repeats the
updates.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.batch import TokenBatch, columns_of
from launch.run_folder import RunFolder, write_whole
from trainer.objective import BatchSource
from trainer.reliability.loss_spikes import Rollback


def by_name(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Returns the incidents of a run by STEP-N, oldest first."""
    files = sorted(folder.incidents.glob("*.json"), key=lambda file: int(file.stem.rpartition("-")[2]))
    return {file.stem: json.loads(file.read_text()) for file in files}


def of(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the incidents of a run, oldest first."""
    return [*by_name(folder).values()]


def next_row(folder: RunFolder, step: int) -> int | None:
    """Returns the first data row after the checkpoint of `step` if rows are skipped, else None."""
    return max((it["rows"][1] for it in of(folder) if it["rolled_back_to"] == step), default=None)


def describe(source: BatchSource, rollback: Rollback, first_row: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns (record, batch arrays) of a rollback to a checkpoint with data from `first_row` on. Moves the source."""
    end = first_row + (rollback.step - rollback.to) * source.batch_size
    source.skip_to(end - source.batch_size)
    batch = source.global_batch()
    arrays = {**dict(zip(TokenBatch._fields, batch[:5], strict=True)), **columns_of(batch)}
    record = {
        "step": rollback.step,
        "values": {name: str(value) for name, value in rollback.values.items()},  # JSON has no NaN
        "rolled_back_to": rollback.to,
        "rows": [first_row, end],
        "batch_rows": [end - source.batch_size, end],
    }
    return record, {name: np.asarray(array) for name, array in arrays.items()}


def write(folder: RunFolder, number: int, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """Writes a record; `number`: count of earlier incidents. Call it on process 0 only."""
    path = folder.incidents / f"{record['step']}-{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
    write_whole(path, json.dumps(record, indent=1) + "\n")
    return path
