"""Checkpoints in an object store, written through a folder of this machine: no host needs a disk that others see.

    STORE/STEP/...            the same files as in a folder of checkpoints; copied to one, they are one
              /digests.json   written last: a step without it is not there

Every process writes its own slices to a folder of its own, and uploads them while training goes on. Process 0 writes
`digests.json` when all have told theirs, and only then are older checkpoints deleted, their `digests.json` first: what
a kill or a failing store leaves half done is never taken for a checkpoint. Reading downloads the files that
`digests.json` names, and compares.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from data.object_store import ObjectStoreError, Say, Store
from trainer.checkpoint.checkpointer import (
    CheckpointConfig,
    Checkpointer,
    SaveFailed,
    by_process_0,
    loss_of,
    silence_orbax,
)
from trainer.checkpoint.checksums import DIGESTS, verify_digests

PART = "digests.process_"  # what one process has uploaded, until all have
PATIENCE = 1800  # seconds that an upload may take, and that process 0 waits for the slowest


def _is_not_orbax_warning(record: logging.LogRecord) -> bool:
    return record.levelno != logging.WARNING or "orbax" not in record.pathname


def steps_to_keep(losses: Mapping[int, float], config: CheckpointConfig) -> set[int]:
    """Which of the steps stay, by the rules of `CheckpointConfig`; `losses` are infinite where there is none."""
    steps = sorted(losses)
    stay = set(steps[-config.max_to_keep :])
    if config.keep_period is not None:
        stay |= {step for step in steps if step % config.keep_period == 0}
    known = [step for step in steps if math.isfinite(losses[step])]
    if config.keep_best and known:
        stay.add(min(known, key=lambda step: (losses[step], step)))
    return stay


class RemoteCheckpointer(Checkpointer):
    """The checkpoints of one run in a store. As `Checkpointer`, and `folder` holds no more than what was last used."""

    def __init__(
        self,
        store: Store,
        folder: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        say: Say = silence_orbax,
        before_commit: Callable[[], None] = lambda: None,
    ):
        """`folder` is of this process alone. `before_commit` puts there what shall not be older than a checkpoint."""
        super().__init__(folder, config, read_only=read_only, say=say)
        self.store = store
        self._before = before_commit
        self._attempt = 0
        self._loss_told = math.inf  # of the evaluation at the step that is being saved
        self._losses: dict[int, float] | None = None  # of what is committed; None: not asked yet
        if jax.process_count() > 1:
            # No process sees the folders of others: each is the first in its own, and writes files that are its alone,
            # as those of OCDBT are not, which one process joins.
            self._processes = ocp.options.MultiprocessingOptions(primary_host=None)
            # Folders first: that they are there is told to all processes by one word, which one's own may come after.
            self._async = ocp.AsyncOptions(timeout_secs=PATIENCE, create_directories_asynchronously=False)

    def _open_manager(self) -> ocp.CheckpointManager:
        if jax.process_count() > 1:
            handle_json = lambda: ocp.JsonCheckpointHandler(multiprocessing_options=self._processes)
            self._handlers = {name: handle_json() for name in ("source", "config", "tokenizer", "extra")} | {
                "state": ocp.PyTreeCheckpointHandler(
                    use_ocdbt=False,
                    multiprocessing_options=self._processes,
                    # Handlers of its own: those that all share wait for a folder that the first process is to make.
                    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                        (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=None)),
                        (np.ndarray, ocp.type_handlers.NumpyHandler()),
                        (int, ocp.type_handlers.ScalarHandler()),
                        (float, ocp.type_handlers.ScalarHandler()),
                    ),
                )
            }
            logging.getLogger("absl").addFilter(_is_not_orbax_warning)  # that it joins nothing
        return super()._open_manager()

    @property
    def location(self) -> str:
        return self.store.url

    def _retention(self) -> AnyPreservationPolicy:
        return AnyPreservationPolicy([LatestN(1)])  # of the copy

    # Writing

    def save(self, step: int, state: Any, **what: Any) -> None:
        self._wait_and_log()  # before anything of this attempt is set
        self._attempt = by_process_0(lambda: secrets.randbits(30))
        self._loss_told = loss_of(what.get("metrics"))
        super().save(step, state, **what)

    def wait(self) -> None:
        """Returns when the last `save` is committed in the store. Raises: SaveFailed where it was not."""
        step = self._saving
        super().wait()
        if step is not None and jax.process_count() > 1:
            self._verified.discard(step)  # the copy holds this process's part of it

    def _failed(self, error: Exception) -> SaveFailed:
        step, failed = self._saving, super()._failed(error)
        assert step is not None
        self._drop_from(step)
        return failed

    def _last_known(self) -> int | None:
        return max(self._losses or {}, default=None)  # the store may be what fails

    def _drop_from(self, step: int) -> None:
        """Forgets copies of this step and later ones."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        for copy in self.folder.glob("*"):
            if copy.name.isdigit() and int(copy.name) >= step:
                shutil.rmtree(copy, ignore_errors=True)

    def _before_commit(self) -> None:
        try:
            super()._before_commit()
            self._upload()
        except Exception as error:
            if jax.process_index() > 0:
                with contextlib.suppress(Exception):
                    self._tell({"failed": str(error)})
            raise

    def _upload(self) -> None:
        step, folder = self._saving, self._unfinished()
        mine = json.loads((folder / DIGESTS).read_text())
        if jax.process_index() > 0:  # what is not of an array (state/NAME/...) is that of process 0
            arrays = lambda name: name.startswith("state/") and name.count("/") > 1
            mine["files"] = {name: entry for name, entry in mine["files"].items() if arrays(name)}
        self.store.put({f"{step}/{name}": folder / name for name in mine["files"]})
        if jax.process_index() > 0:
            self._tell(mine)
            return
        for other in range(1, jax.process_count()):
            mine["files"] = self._part(other) | mine["files"]
        self._commit(step, mine)

    def _part_of(self, process: int) -> str:
        return f"{self._saving}/{PART}{process}.{self._attempt}.json"

    def _tell(self, part: dict[str, Any]) -> None:
        self.store.write(self._part_of(jax.process_index()), json.dumps(part).encode())

    def _part(self, process: int) -> dict[str, Any]:
        begin = time.monotonic()
        while (content := self.store.read(self._part_of(process))) is None:
            if self._barrier is not None and self._barrier.failed():  # it could not even tell
                raise ObjectStoreError(f"process {process} could not write its part")
            if time.monotonic() - begin > PATIENCE:
                raise ObjectStoreError(f"process {process} has not uploaded its part in {PATIENCE:.0f} s")
            time.sleep(0.5)
        told = json.loads(content)
        if "failed" in told:
            raise ObjectStoreError(f"process {process}: {told['failed']}")
        return told["files"]

    def _commit(self, step: int, digests: dict[str, Any]) -> None:
        """By process 0, when all files are uploaded."""
        there = self.store.files(str(step))
        for name, entry in digests["files"].items():
            found = there.get(f"{step}/{name}")
            if found is None or found.size != entry["bytes"]:
                size = "not" if found is None else f"with {found.size} bytes instead of {entry['bytes']}"
                raise ObjectStoreError(f"{self.store.url}/{step}/{name} arrived {size}")
        self._before()
        losses = self._known_losses() | {step: self._loss_told}
        self.store.write(f"{step}/{DIGESTS}", json.dumps(digests, indent=1).encode())
        self._losses = losses
        try:
            # what an attempt before left, and the parts
            self.store.delete([name for name in there if name.partition("/")[2] not in {*digests["files"], DIGESTS}])
            for old in sorted(set(losses) - steps_to_keep(losses, self.config)):
                self._delete(old)
                del losses[old]
        except (ObjectStoreError, ValueError, OSError) as error:  # the next save tries again
            self.say(f"checkpoint of step {step} is in the store, but older ones could not be removed: {error}")

    def _known_losses(self) -> dict[int, float]:
        if self._losses is None:
            self._losses = {step: loss_of(self._metrics_of(step)) for step in self.steps()}
        return self._losses

    def _delete(self, step: int) -> None:
        self.store.delete([f"{step}/{DIGESTS}"])
        self.store.delete(list(self.store.files(str(step))))

    def _quarantine(self, step: int, why: str) -> None:
        count, names = 1, set(self.store.folders())
        target = f"{step}.{why}"
        while target in names:
            count += 1
            target = f"{step}.{why}-{count}"
        there = self.store.files(str(step))
        self.store.copy({name: f"{target}/{name.partition('/')[2]}" for name in there})
        self._delete(step)

    def discard_after(self, step: int) -> list[int]:
        newer = super().discard_after(step)
        self._drop_from(step + 1)
        self._losses = None
        return newer

    # Reading

    def steps(self) -> list[int]:
        folders = [name for name in self.store.folders() if name.isdigit()]
        return sorted(int(name) for name in folders if self.store.has(f"{name}/{DIGESTS}"))

    def latest_valid_step(self) -> int | None:
        newest = super().latest_valid_step()
        if not self._read_only:  # what was set aside, or never arrived, is saved again
            self._drop_from(0 if newest is None else newest + 1)
        return newest

    def superseded(self) -> list[str]:
        return [name for name in self.store.folders() if ".superseded" in name]

    def _metrics_of(self, step: int) -> dict[str, Any] | None:
        content = self.store.read(f"{step}/metrics/metrics")
        return None if content is None else json.loads(content)

    def folder_of(self, step: int) -> Path:
        damage = self._fetch(step)
        if damage is not None:
            raise ValueError(f"step {step} of {self.location} is damaged: {damage}")
        return self.folder / str(step)

    def _damage(self, step: int) -> str | None:
        return None if step in self._verified else self._fetch(step)

    def _fetch(self, step: int) -> str | None:
        """Downloads a checkpoint unless it is here. Returns: what differs from what was written; None: nothing."""
        folder = self.folder / str(step)
        if step in self._verified and folder.is_dir():
            return None
        content = self.store.read(f"{step}/{DIGESTS}")
        try:
            sizes = {name: int(entry["bytes"]) for name, entry in json.loads(content or b"")["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{DIGESTS} cannot be read"
        there = self.store.files(str(step))
        for name, size in sizes.items():  # cheap looks first
            found = there.get(f"{step}/{name}")
            if found is None:
                return f"{name} is missing"
            if found.size != size:
                return f"{name} has {found.size} bytes instead of {size}"
        if not folder.is_dir() or verify_digests(folder) is not None or self._differs(folder, content):
            half = self.folder / f".{step}.{secrets.token_hex(8)}.tmp"
            try:
                for _ in range(2):  # it may have been damaged on the way
                    self.store.inside(str(step)).get([*sizes, DIGESTS], half)
                    if (damage := verify_digests(half)) is None:
                        break
                else:
                    return damage
                shutil.rmtree(folder, ignore_errors=True)
                half.rename(folder)
            finally:
                shutil.rmtree(half, ignore_errors=True)
        self._verified.add(step)
        return None

    @staticmethod
    def _differs(folder: Path, content: bytes | None) -> bool:
        """Whether the copy is of another attempt; of several processes it holds a part, which is another, too."""
        return json.loads((folder / DIGESTS).read_text())["files"] != json.loads(content or b"{}").get("files")
