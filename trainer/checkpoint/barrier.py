"""How the processes of a run commit a checkpoint together, or all know that it failed.

Orbax's background threads meet at barriers: when all have written, and when process 0 has committed. One whose disk is
full comes to neither, and the others would wait for it until Orbax's timeout. Here it joins them late, with a word that
it failed, so that nobody commits and nobody waits.
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

WRITTEN, COMMITTED = "async_write_complete", "async_commit_complete"  # as Orbax calls its barriers
MARKS = "set_value_start"  # that a save begins, and that it is over
_number = count()


def tell_failures_once() -> None:
    """Orbax prints a failed save many times over, with traces; it is told once, by whoever waits for it."""
    logging.getLogger("absl").addFilter(_is_not_orbax_failing)
    logging.getLogger("asyncio").addFilter(_is_not_of_a_failed_save)
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if str(error) != "Event loop is closed":  # to which TensorStore's threads come back
            shown(kind, error, trace)

    if shown.__name__ != hook.__name__ or shown.__module__ != hook.__module__:
        sys.excepthook = hook


def _is_not_orbax_failing(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _is_not_of_a_failed_save(record: logging.LogRecord) -> bool:
    return "never retrieved" not in record.getMessage() or "orbax" not in record.getMessage()


class CommitBarrier:
    """What Orbax calls instead of its own barrier. One for each manager; all processes make them in the same order."""

    def __init__(self, wait: Callable[..., None] | None = None, store: Any = None) -> None:
        """`wait(key=, timeout_ms=)` for all processes and the `quantize_base` of keys and values; None: those of this job."""
        self._wait = ocp.multihost.get_barrier_sync_fn() if wait is None else wait
        self._store: Any = global_state.client if store is None else store
        self._name = f"meshwright/commit/{next(_number)}"
        self._save, self._under_way = 0, False
        self._missing: list[str] = []  # barriers of this save that this process has not come to

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        stage = next((stage for stage in (WRITTEN, COMMITTED) if stage in key), None)
        if stage is not None:
            self._meet(stage, timeout_ms)
            if self.failed():
                raise RuntimeError("another process could not write its part")
        else:
            if MARKS in key:
                self._begin_or_end(timeout_ms)
            self._wait(key=key, timeout_ms=timeout_ms)

    def _begin_or_end(self, timeout_ms: int) -> None:
        self._under_way = not self._under_way
        if self._under_way:
            self._save, self._missing = self._save + 1, [WRITTEN, COMMITTED]
        elif self._missing:
            self.fail()
            for stage in [*self._missing]:
                self._meet(stage, timeout_ms)

    def _meet(self, stage: str, timeout_ms: int) -> None:
        self._wait(key=f"{self._name}/{self._save}/{stage}", timeout_ms=timeout_ms)
        self._missing.remove(stage)

    def fail(self) -> None:
        """All shall know that the save under way is none."""
        self._store.key_value_set(self._flag, "failed", allow_overwrite=True)

    def failed(self) -> bool:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # NOT_FOUND
            return bool(self._store.key_value_try_get(self._flag))
        return False

    def agree(self, failed: bool, timeout_ms: int = 600_000) -> bool:
        """Whether the save that is over failed on any process; called by all."""
        if failed:
            self.fail()
        self._wait(key=f"{self._name}/{self._save}/agreed", timeout_ms=timeout_ms)
        return self.failed()

    @property
    def _flag(self) -> str:
        return f"{self._name}/{self._save}/failed"
