"""Communication between the processes of a job: who writes files, and barriers."""

from collections.abc import Callable

import jax
import numpy as np

from launch.run_folder import RunFolder

Say = Callable[[str], None]


def sync_processes(what: str) -> None:
    """Waits until every process has reached this call."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def publish_files(folder: RunFolder, what: str) -> None:
    """Publishes the files that process 0 wrote in the run folder to all processes; hosts need not share a disk."""
    if is_main_process():
        folder.send()
    sync_processes(what)
    if not is_main_process():
        folder.fetch()


def all_gather_values(values: list[float]) -> list[list[float]]:
    """Returns the values of every process, [processes, len(values)]. Collective: all processes must call it."""
    if jax.process_count() == 1:
        return [values]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.float32(values)).tolist()


def is_main_process() -> bool:
    """Returns whether this is process 0, the only one that writes files and prints."""
    return jax.process_index() == 0


def log(text: str) -> None:
    """Prints a line, on process 0 only."""
    if is_main_process():
        print(text, flush=True)
