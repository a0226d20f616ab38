"""Checkpoints in an object store, staged in a local folder per process. No shared file system is needed.

    STORE/STEP/...            the same files as in a local checkpoint folder; a copy of them is a valid checkpoint
              /digests.json   written last; a step without it does not count as a checkpoint

Every process writes its shards to its own local folder and uploads them in the background. Process 0 writes
`digests.json` after all processes have reported their digests. Only then are older checkpoints deleted, `digests.json`
first, so the remains of a killed process or a failed upload are never mistaken for a checkpoint. A restore downloads
the files listed in `digests.json` and verifies them.
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
    discard_message,
    from_process_0,
    loss_of,
)
from trainer.checkpoint.checksums import DIGESTS, verify_digests

PART = "digests.process_"  # digests of the files of one process, until process 0 has merged them
PATIENCE = 1800  # timeout in seconds of an upload, and of process 0 waiting for the slowest process


def _is_not_orbax_warning(record: logging.LogRecord) -> bool:
    return record.levelno != logging.WARNING or "orbax" not in record.pathname


def steps_to_keep(losses: Mapping[int, float], config: CheckpointConfig) -> set[int]:
    """Returns the steps to retain under `CheckpointConfig`. `losses`: eval loss by step, infinite if unknown."""
    steps = sorted(losses)
    retained = set(steps[-config.max_to_keep :])
    if config.keep_period is not None:
        retained |= {step for step in steps if step % config.keep_period == 0}
    known = [step for step in steps if math.isfinite(losses[step])]
    if config.keep_best and known:
        retained.add(min(known, key=lambda step: (losses[step], step)))
    return retained


class RemoteCheckpointer(Checkpointer):
    """A `Checkpointer` on an object store. The local `folder` caches only the checkpoint used last."""

    def __init__(
        self,
        store: Store,
        folder: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        say: Say = discard_message,
        before_commit: Callable[[], None] = lambda: None,
    ):
        """`folder`: private to this process. `before_commit`: uploads files that must be as new as the checkpoint."""
        super().__init__(folder, config, read_only=read_only, say=say)
        self.store = store
        self._before = before_commit
        self._attempt = 0
        self._eval_loss = math.inf  # evaluation loss at the step being saved
        self._losses: dict[int, float] | None = None  # of committed steps; None: not loaded yet
        if jax.process_count() > 1:
            # Processes do not see each other's folders: each is primary in its own and writes separate files. OCDBT is
            # off, because it merges the files of all processes.
            self._processes = ocp.options.MultiprocessingOptions(primary_host=None)
            # Synchronous: Orbax signals once that folders exist, possibly before this process has created its own.
            self._async = ocp.AsyncOptions(timeout_secs=PATIENCE, create_directories_asynchronously=False)

    def _open_manager(self) -> ocp.CheckpointManager:
        if jax.process_count() > 1:
            handle_json = lambda: ocp.JsonCheckpointHandler(multiprocessing_options=self._processes)
            self._handlers = {name: handle_json() for name in ("source", "config", "tokenizer", "extra")} | {
                "state": ocp.PyTreeCheckpointHandler(
                    use_ocdbt=False,
                    multiprocessing_options=self._processes,
                    # Own handlers: the global ones wait for a folder that only process 0 would create.
                    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                        (jax.Array, ocp.type_handlers.ArrayHandler(primary_host=None)),
                        (np.ndarray, ocp.type_handlers.NumpyHandler()),
                        (int, ocp.type_handlers.ScalarHandler()),
                        (float, ocp.type_handlers.ScalarHandler()),
                    ),
                )
            }
            logging.getLogger("absl").addFilter(_is_not_orbax_warning)  # warns that OCDBT merging is off
        return super()._open_manager()

    @property
    def location(self) -> str:
        return self.store.url

    def _retention(self) -> AnyPreservationPolicy:
        return AnyPreservationPolicy([LatestN(1)])  # of the local cache

    # Writing

    def save(self, step: int, state: Any, **items: Any) -> None:
        self._wait_and_log()  # before this save changes any field
        self._attempt = from_process_0(lambda: secrets.randbits(30))
        self._eval_loss = loss_of(items.get("metrics"))
        super().save(step, state, **items)

    def wait(self) -> None:
        """Waits until the last `save` is committed in the store. Raises: SaveFailed if it failed."""
        step = self._saving
        super().wait()
        if step is not None and jax.process_count() > 1:
            self._verified.discard(step)  # the local copy has only this process's shards

    def _failed(self, error: Exception) -> SaveFailed:
        step, failed = self._saving, super()._failed(error)
        assert step is not None
        self._drop_from(step)
        return failed

    def _last_known(self) -> int | None:
        return max(self._losses or {}, default=None)  # asks no store: it may be the cause of the failure

    def _drop_from(self, step: int) -> None:
        """Deletes local copies of this step and later ones."""
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
                    self._report({"failed": str(error)})
            raise

    def _upload(self) -> None:
        step, folder = self._saving, self._unfinished()
        mine = json.loads((folder / DIGESTS).read_text())
        if jax.process_index() > 0:  # files other than arrays (state/NAME/...) are uploaded by process 0
            arrays = lambda name: name.startswith("state/") and name.count("/") > 1
            mine["files"] = {name: entry for name, entry in mine["files"].items() if arrays(name)}
        self.store.put({f"{step}/{name}": folder / name for name in mine["files"]})
        if jax.process_index() > 0:
            self._report(mine)
            return
        for other in range(1, jax.process_count()):
            mine["files"] = self._part(other) | mine["files"]
        self._commit(step, mine)

    def _part_name(self, process: int) -> str:
        return f"{self._saving}/{PART}{process}.{self._attempt}.json"

    def _report(self, part: dict[str, Any]) -> None:
        """Uploads the digests, or the failure, of this process for process 0."""
        self.store.write(self._part_name(jax.process_index()), json.dumps(part).encode())

    def _part(self, process: int) -> dict[str, Any]:
        """Waits for the digests of another process."""
        start = time.monotonic()
        while (content := self.store.read(self._part_name(process))) is None:
            if self._barrier is not None and self._barrier.failed():  # it could not report its failure to the store
                raise ObjectStoreError(f"process {process} could not write its shards")
            if time.monotonic() - start > PATIENCE:
                raise ObjectStoreError(f"process {process} has not uploaded its shards in {PATIENCE:.0f} s")
            time.sleep(0.5)
        part = json.loads(content)
        if "failed" in part:
            raise ObjectStoreError(f"process {process}: {part['failed']}")
        return part["files"]

    def _commit(self, step: int, digests: dict[str, Any]) -> None:
        """Commits a step after all uploads. Called on process 0."""
        uploaded = self.store.files(str(step))
        for name, entry in digests["files"].items():
            found = uploaded.get(f"{step}/{name}")
            if found is None or found.size != entry["bytes"]:
                problem = "is missing" if found is None else f"has {found.size} bytes instead of {entry['bytes']}"
                raise ObjectStoreError(f"{self.store.url}/{step}/{name} {problem} after the upload")
        self._before()
        losses = self._known_losses() | {step: self._eval_loss}
        self.store.write(f"{step}/{DIGESTS}", json.dumps(digests, indent=1).encode())
        self._losses = losses
        try:
            # Leftovers of an earlier attempt, and the digests of single processes.
            listed = {*digests["files"], DIGESTS}
            self.store.delete([name for name in uploaded if name.partition("/")[2] not in listed])
            for old in sorted(set(losses) - steps_to_keep(losses, self.config)):
                self._delete(old)
                del losses[old]
        except (ObjectStoreError, ValueError, OSError) as error:  # the next save tries again
            self.say(f"checkpoint of step {step} is in the store, but older checkpoints could not be deleted: {error}")

    def _known_losses(self) -> dict[int, float]:
        if self._losses is None:
            self._losses = {step: loss_of(self._metrics_of(step)) for step in self.steps()}
        return self._losses

    def _delete(self, step: int) -> None:
        self.store.delete([f"{step}/{DIGESTS}"])
        self.store.delete(list(self.store.files(str(step))))

    def _quarantine(self, step: int, reason: str) -> None:
        count, names = 1, set(self.store.folders())
        target = f"{step}.{reason}"
        while target in names:
            count += 1
            target = f"{step}.{reason}-{count}"
        self.store.copy({name: f"{target}/{name.partition('/')[2]}" for name in self.store.files(str(step))})
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
        if not self._read_only:  # quarantined and incomplete steps will be saved again
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
        """Downloads a checkpoint unless cached. Returns: a description of the damage; None if it is valid."""
        folder = self.folder / str(step)
        if step in self._verified and folder.is_dir():
            return None
        content = self.store.read(f"{step}/{DIGESTS}")
        try:
            sizes = {name: int(entry["bytes"]) for name, entry in json.loads(content or b"")["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{DIGESTS} cannot be read"
        stored = self.store.files(str(step))
        for name, size in sizes.items():  # cheap checks first
            found = stored.get(f"{step}/{name}")
            if found is None:
                return f"{name} is missing"
            if found.size != size:
                return f"{name} has {found.size} bytes instead of {size}"
        if not folder.is_dir() or verify_digests(folder) is not None or self._differs(folder, content):
            partial = self.folder / f".{step}.{secrets.token_hex(8)}.tmp"
            try:
                for _ in range(2):  # once more in case of damage during the download
                    self.store.subfolder(str(step)).get([*sizes, DIGESTS], partial)
                    if (damage := verify_digests(partial)) is None:
                        break
                else:
                    return damage
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        self._verified.add(step)
        return None

    @staticmethod
    def _differs(folder: Path, content: bytes | None) -> bool:
        """Returns whether the local copy is of another attempt, or has only the shards of one of several processes."""
        return json.loads((folder / DIGESTS).read_text())["files"] != json.loads(content or b"{}").get("files")
