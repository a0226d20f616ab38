"""Rollbacks of a run: what happened, written so that it can be looked into and done again.

    runs/NAME/incidents/STEP-N.json   what was seen, the checkpoint that the run went back to, the rows it left out
                       /STEP-N.npz    the batch of that update, whole; N counts the incidents before

A start from that checkpoint reads the first, so that the rows stay left out whenever it comes. `meshwright replay` does
the updates once more.
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
    """Those of a run by STEP-N, the oldest first."""
    files = sorted(folder.incidents.glob("*.json"), key=lambda file: int(file.stem.rpartition("-")[2]))
    return {file.stem: json.loads(file.read_text()) for file in files}


def of(folder: RunFolder) -> list[dict[str, Any]]:
    """Those of a run, the oldest first."""
    return [*by_name(folder).values()]


def next_row(folder: RunFolder, step: int) -> int | None:
    """The row of the data with which a start from the checkpoint of `step` begins; None: with its own."""
    return max((it["rows"][1] for it in of(folder) if it["rolled_back_to"] == step), default=None)


def describe(source: BatchSource, rollback: Rollback, first_row: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What is written of a rollback to a checkpoint whose data begins at `first_row`. Closes the source."""
    end = first_row + (rollback.step - rollback.to) * source.batch_size
    source.skip_to(end - source.batch_size)
    batch = source.global_batch()
    arrays = {**dict(zip(TokenBatch._fields, batch[:5], strict=True)), **columns_of(batch)}
    told = {
        "step": rollback.step,
        "values": {name: str(value) for name, value in rollback.values.items()},  # JSON knows no nan
        "rolled_back_to": rollback.to,
        "rows": [first_row, end],
        "batch_rows": [end - source.batch_size, end],
    }
    return told, {name: np.asarray(array) for name, array in arrays.items()}


def write(folder: RunFolder, number: int, told: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """`number`: of incidents before. By process 0 alone."""
    path = folder.incidents / f"{told['step']}-{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
    write_whole(path, json.dumps(told, indent=1) + "\n")
    return path
