"""Atomic commit of multi-process checkpoints: all processes commit, or all learn of the failure.

Orbax's background threads meet at two barriers: after all processes have written, and after process 0 has committed. A
process whose disk is full reaches neither, and the others would wait until Orbax's timeout. Here the failed process
joins the barriers late and sets a failure flag, so that no process commits and none waits.
"""

import contextlib
import logging
import sys
from collections.abc import Callable
from itertools import count
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax._src.distributed import global_state  # its key-value store has no public name

WRITTEN, COMMITTED = "async_write_complete", "async_commit_complete"  # parts of Orbax's barrier keys
MARKS = "set_value_start"  # part of the key of the barriers at the start and the end of a save
_number = count()


def suppress_duplicate_errors() -> None:
    """Silences Orbax's repeated tracebacks of a failed save; the caller of `wait` reports the failure once."""
    logging.getLogger("absl").addFilter(_is_not_orbax_error)
    logging.getLogger("asyncio").addFilter(_is_not_unretrieved_orbax_error)
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if str(error) != "Event loop is closed":  # raised by TensorStore's threads after a failed save
            previous(kind, error, trace)

    if previous.__name__ != hook.__name__ or previous.__module__ != hook.__module__:
        sys.excepthook = hook


def _is_not_orbax_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _is_not_unretrieved_orbax_error(record: logging.LogRecord) -> bool:
    return "never retrieved" not in record.getMessage() or "orbax" not in record.getMessage()


class CommitBarrier:
    """Replaces Orbax's barrier function. One per manager, created in the same order on every process."""

    def __init__(self, wait: Callable[..., None] | None = None, store: Any = None) -> None:
        """`wait(key=, timeout_ms=)`: barrier over all processes. `store`: key-value store. None: those of this job."""
        self._wait = ocp.multihost.get_barrier_sync_fn() if wait is None else wait
        self._store: Any = global_state.client if store is None else store
        self._name = f"meshwright/commit/{next(_number)}"
        self._save, self._in_progress = 0, False
        self._missing: list[str] = []  # barriers of this save that this process has not reached

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        stage = next((stage for stage in (WRITTEN, COMMITTED) if stage in key), None)
        if stage is not None:
            self._meet(stage, timeout_ms)
            if self.failed():
                raise RuntimeError("another process could not write its part")
        else:
            if MARKS in key:
                self._start_or_finish(timeout_ms)
            self._wait(key=key, timeout_ms=timeout_ms)

    def _start_or_finish(self, timeout_ms: int) -> None:
        self._in_progress = not self._in_progress
        if self._in_progress:
            self._save, self._missing = self._save + 1, [WRITTEN, COMMITTED]
        elif self._missing:
            self.fail()
            for stage in [*self._missing]:
                self._meet(stage, timeout_ms)

    def _meet(self, stage: str, timeout_ms: int) -> None:
        self._wait(key=f"{self._name}/{self._save}/{stage}", timeout_ms=timeout_ms)
        self._missing.remove(stage)

    def fail(self) -> None:
        """Marks the current save as failed for all processes."""
        self._store.key_value_set(self._flag, "failed", allow_overwrite=True)

    def failed(self) -> bool:
        """Returns whether any process has marked the current save as failed."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # NOT_FOUND
            return bool(self._store.key_value_try_get(self._flag))
        return False

    def agree(self, failed: bool, timeout_ms: int = 600_000) -> bool:
        """Returns whether the finished save failed on any process. Every process must call it."""
        if failed:
            self.fail()
        self._wait(key=f"{self._name}/{self._save}/agreed", timeout_ms=timeout_ms)
        return self.failed()

    @property
    def _flag(self) -> str:
        return f"{self._name}/{self._save}/failed"
