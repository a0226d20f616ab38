"""Records of rollbacks after loss spikes, for inspection and replay.

    runs/NAME/rollbacks/STEP-N.json   the metrics, the checkpoint restored, the rows skipped
                       /STEP-N.npz    the complete global batch of that update; N counts earlier rollbacks

Any later start from that checkpoint reads the JSON file and skips the same rows. `meshwright replay` repeats the
updates.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import RunConfig
from data.batch import TokenBatch, columns_of
from launch import exit_codes
from launch.multihost import is_main_process, log, sync_processes
from launch.run_folder import RunFolder, write_whole
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.objective import BatchSource
from trainer.reliability.loss_spikes import Rollback
from trainer.reliability.sdc_check import SilentDataCorruption


def by_name(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Returns the rollbacks of a run by STEP-N, oldest first."""
    files = sorted(folder.rollbacks.glob("*.json"), key=lambda file: int(file.stem.rpartition("-")[2]))
    return {file.stem: json.loads(file.read_text()) for file in files}


def of(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the rollbacks of a run, oldest first."""
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
    """Writes a record; `number`: count of earlier rollbacks. Call it on process 0 only."""
    path = folder.rollbacks / f"{record['step']}-{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
    write_whole(path, json.dumps(record, indent=1) + "\n")
    return path


def handle_rollback(
    config: RunConfig, folder: RunFolder, source: BatchSource, checkpointer: Checkpointer, rollback: Rollback
) -> int | None:
    """Records a rollback and discards the checkpoints after it, so that the next start resumes before the spike.

    Returns None, or an exit code after `loss_spikes.max_rollbacks` of them.
    """
    limit, before = config.loss_spikes.max_rollbacks, len(of(folder))
    if before >= limit:
        log(
            f"meshwright: loss_spikes.max_rollbacks={limit}: stopping after {before} rollbacks; look at "
            f"{folder.rollbacks}, and start again with a smaller optimizer.learning_rate or other data"
        )
        return exit_codes.FAILED
    first_row = next_row(folder, rollback.to)
    if first_row is None:
        first_row = int(checkpointer.read_json(rollback.to, "source")["next_index"])
    report, arrays = describe(source, rollback, first_row)
    sync_processes("rollback")  # every process has counted the earlier rollbacks
    if is_main_process():
        path = write(folder, before, report, arrays)
        folder.send()
        log(
            f"rollback {before + 1} of at most {limit}: from step {rollback.step} to the checkpoint of step "
            f"{rollback.to}; rows {report['rows'][0]} to {report['rows'][1]} of the data are skipped; see {path}"
        )
    checkpointer.discard_after(rollback.to)
    return None


def handle_corruption(checkpointer: Checkpointer, error: SilentDataCorruption) -> int:
    """Discards the checkpoints since the last check that passed: they may hold corrupted values."""
    before = checkpointer.latest_before(error.sound + 1)
    discarded = checkpointer.discard_after(-1 if before is None else before)
    since = f"; checkpoints of steps {', '.join(map(str, discarded))} are discarded" if discarded else ""
    log(
        f"meshwright: before step {error.step}: {error}{since}; leaving with {exit_codes.PREEMPTED}, to resume from "
        f"{'the start' if before is None else f'step {before}'}: if it happens again, replace that device"
    )
    return exit_codes.PREEMPTED
