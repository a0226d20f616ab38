"""Asynchronous, atomic checkpoints with SHA-256 verification on restore.

    checkpoints/STEP/state       params, opt_state, step and rng: Orbax, sharded, restored onto any mesh
                    /source      JSON: the position of the next batch
                    /config      JSON: the resolved config and where it ran
                    /tokenizer   JSON: {file name: base64}
                    /extra       JSON: state of hooks, such as the patience of early stopping
                    /digests.json  SHA-256 of every file above

Orbax silently restores a data file with a flipped bit. The digests are therefore computed from the finished files in
the temporary folder, just before the rename that commits it, so every committed step has them.
"""

import base64
import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
)

from trainer.checkpoint.barrier import CommitBarrier, suppress_duplicate_errors
from trainer.checkpoint.checksums import DIGESTS, key_data, leaf_paths, verify_digests, write_digests
from trainer.checkpoint.structure import Tree, check_structure, prng_free_spec, shaped_like, wrap_keys

State = TypeVar("State")  # a dataclass pytree: TrainState


@dataclasses.dataclass
class CheckpointConfig:
    """Checkpoint interval and retention."""

    # optimizer steps between checkpoints; 0 saves only at the end
    save_interval_steps: int = dataclasses.field(default=1000, metadata={"min": 0})
    max_to_keep: int = dataclasses.field(default=3, metadata={"min": 1})  # most recent checkpoints to keep
    # also keep every checkpoint whose step is a multiple of this; null: none
    keep_period: int | None = dataclasses.field(default=None, metadata={"min": 1})
    keep_best: bool = True  # save at each new lowest eval loss, and keep the best checkpoint
    async_save: bool = True  # write checkpoints in the background during training


class SaveFailed(RuntimeError):
    """Raised when a checkpoint could not be written; earlier checkpoints are unaffected."""


class Restored(NamedTuple, Generic[State]):
    """A restored state and its step."""

    step: int
    state: State


def discard_message(text: str) -> None:
    """Default `say`: drops the message."""


def loss_of(metrics: Mapping[str, float] | None) -> float:
    """Returns the saved evaluation loss; infinity if it is missing or NaN."""
    loss = math.inf if not metrics else float(metrics.get("loss", math.inf))
    return math.inf if math.isnan(loss) else loss


class Checkpointer:
    """Saves and restores the checkpoints of one run. Every process must call the same methods in the same order.

    With `read_only`, it neither writes nor cleans up, so a run that is still training can be evaluated.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        say: Callable[[str], None] = discard_message,
    ):
        """Opens `folder`, which need not exist. `say` receives one-line warnings."""
        self.config = config or CheckpointConfig()
        self.folder = Path(os.path.abspath(folder))
        self.say = say
        self._verified: set[int] = set()
        self._saving: int | None = None
        self._read_only = read_only
        self._opened: ocp.CheckpointManager | None = None
        self._barrier: CommitBarrier | None = None  # with several processes only
        self._async = ocp.AsyncOptions()
        self._processes = ocp.options.MultiprocessingOptions()
        self._handlers: dict[str, Any] | None = None  # None: Orbax infers them from the save arguments

    @property
    def location(self) -> str:
        """Folder or URL of the checkpoints, for messages."""
        return str(self.folder)

    def _retention(self) -> AnyPreservationPolicy:
        policies: list[Any] = [LatestN(self.config.max_to_keep)]
        if self.config.keep_period is not None:
            policies.append(EveryNSteps(self.config.keep_period))
        if self.config.keep_best:
            # BestN keeps the end of its sorted list: reversed, that is the lowest loss.
            policies.append(BestN(get_metric_fn=loss_of, reverse=True, n=1, keep_checkpoints_without_metrics=False))
        return AnyPreservationPolicy(policies)

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, opened on first write: it starts threads and removes leftovers of a killed save."""
        assert not self._read_only, "a read-only Checkpointer cannot save or move checkpoints"
        if self._opened is None:
            self._opened = self._open_manager()
        return self._opened

    def _open_manager(self) -> ocp.CheckpointManager:
        suppress_duplicate_errors()
        self._barrier = CommitBarrier() if jax.process_count() > 1 else None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention(),
            best_fn=loss_of,  # without it Orbax does not write the metrics that the policy reads after a restart
            best_mode="min",
            cleanup_tmp_directories=True,
            # Root metadata has timestamps; copies of a step in another run must not differ by them.
            save_root_metadata=False,
            async_options=dataclasses.replace(
                self._async, post_finalization_callback=self._before_commit, barrier_sync_fn=self._barrier
            ),
            multiprocessing_options=self._processes,
        )
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=self._handlers)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save in progress. Must be called before the process exits."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def wait(self) -> None:
        """Waits until the last `save` is committed.

        Raises: SaveFailed on all processes if any process failed.
        """
        if self._opened is None or self._saving is None:
            return
        error: Exception | None = None
        try:
            self._opened.wait_until_finished()
        except Exception as raised:
            error = raised
        if self._barrier is not None and self._barrier.agree(error is not None):
            error = error or RuntimeError("another process could not write its shards")
        if error is not None:
            raise self._failed(error) from error
        self._saving = None

    def _failed(self, error: Exception) -> SaveFailed:
        """Closes the manager; the next one removes the incomplete checkpoint."""
        step, self._saving = self._saving, None
        assert step is not None
        opened, self._opened = self._opened, None
        if opened is not None:
            with contextlib.suppress(Exception):
                opened.close()
        self._verified.discard(step)
        newest = self._last_known()
        latest = "no earlier checkpoint exists" if newest is None else f"the latest checkpoint is step {newest}"
        return SaveFailed(f"checkpoint of step {step} could not be written: {self._reason(error)}; {latest}")

    def _last_known(self) -> int | None:
        return self.latest()

    def _reason(self, error: Exception) -> str:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "No space left" in message or "RESOURCE_EXHAUSTED" in message:
            return f"no space left on {self.folder} ({shutil.disk_usage(self.folder).free / 1e6:,.1f} MB free)"
        return message[:300]

    def _wait_and_log(self) -> None:
        """Logs a failed save instead of raising: the run continues and saves again at the next due step."""
        try:
            self.wait()
        except SaveFailed as failed:
            self.say(str(failed))

    # Writing

    def save(
        self,
        step: int,
        state: Any,
        *,
        source: Mapping[str, Any],
        config: Mapping[str, Any],
        tokenizer: Mapping[str, bytes],
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copies `state` to the host and writes it in the background; `state` may be donated afterwards.

        Waits for the previous save. `metrics["loss"]`: evaluation loss at this step, if any. A failed save is logged;
        only `wait` raises it.
        Raises: ValueError if `step` exists already; SaveFailed if one of several processes cannot start the save.
        """
        self._wait_and_log()
        if step in self._manager.all_steps():
            raise ValueError(f"step {step} of {self.location} is saved already; delete it or start a new run")
        self._saving = step
        files = {name: base64.b64encode(content).decode() for name, content in tokenizer.items()}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(jax.tree.map(key_data, _as_dict(state))),
            source=ocp.args.JsonSave(dict(source)),
            config=ocp.args.JsonSave(dict(config)),
            tokenizer=ocp.args.JsonSave(files),
            extra=ocp.args.JsonSave(dict(extra or {})),
        )
        saved_metrics = {"loss": loss_of(metrics)} if math.isfinite(loss_of(metrics)) else {}

        try:
            # `force`: the caller decides when to save.
            self._manager.save(step, args=items, metrics=saved_metrics, force=True)
        except Exception as error:
            failed = self._failed(error)
            if jax.process_count() > 1:
                raise failed from error  # the other processes are in the middle of the save
            self.say(str(failed))
            return
        self._verified.add(step)
        if not self.config.async_save:
            self._wait_and_log()

    def _before_commit(self) -> None:
        """Writes the digests. Orbax calls it in its thread on process 0, after all writes and before the rename."""
        write_digests(self._unfinished())

    def _unfinished(self) -> Path:
        """Returns the temporary folder of the save in progress."""
        assert self._saving is not None
        temporary = sorted(self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        return temporary[-1] if temporary else self.folder / str(self._saving)

    def folder_of(self, step: int) -> Path:
        """Returns a local folder with the files of a checkpoint."""
        return self.folder / str(step)

    def _quarantine(self, step: int, reason: str) -> None:
        """Renames a checkpoint to `STEP.REASON`, with a number appended if that name exists."""
        folder = self.folder / str(step)
        target, count = folder.with_name(f"{step}.{reason}"), 1
        while target.exists():
            count += 1
            target = folder.with_name(f"{step}.{reason}-{count}")
        folder.rename(target)

    def superseded(self) -> list[str]:
        """Returns the names of checkpoints renamed by `discard_after`."""
        return sorted(path.name for path in self.folder.glob("*.superseded*"))

    def discard_after(self, step: int) -> list[int]:
        """Renames checkpoints of later steps to `STEP.superseded`, because those steps will be repeated.

        Returns: the renamed steps.
        """
        self.wait()
        newer = [s for s in self.steps() if s > step]

        def move() -> int:
            for later in newer:
                self._quarantine(later, "superseded")
            return len(newer)

        if from_process_0(move):
            self._manager.reload()
        self._verified -= set(newer)
        return newer

    # Reading

    def steps(self) -> list[int]:
        """Returns the committed steps in ascending order."""
        if not self.folder.is_dir():
            return []
        return sorted(ocp.utils.checkpoint_steps(self.folder))

    def latest(self) -> int | None:
        """Returns the newest committed step without verifying it; see `latest_valid_step`."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the lowest evaluation loss; None if no checkpoint has one."""
        losses = {step: loss_of(self._metrics_of(step)) for step in self.steps()}
        known = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        return min(known, key=lambda step: (known[step], step)) if known else None

    def _metrics_of(self, step: int) -> dict[str, Any] | None:
        return _read_json(self.folder / str(step) / "metrics" / "metrics")

    def latest_before(self, step: int) -> int | None:
        """Returns the newest committed step before this one as seen by process 0, without verifying it."""
        self.wait()
        found = from_process_0(lambda: max((s for s in self.steps() if s < step), default=-1))
        return None if found < 0 else found

    def latest_valid_step(self) -> int | None:
        """Returns the newest step that passes verification; None if nothing was ever saved.

        Damaged newer checkpoints are quarantined as `STEP.damaged`, so the run can save that step again.
        Raises: ValueError if there are checkpoints and none is valid.
        """
        self.wait()
        steps = self.steps()
        chosen = from_process_0(lambda: self._choose(steps))
        if chosen < 0 and steps:
            raise ValueError(
                f"{self.location}: all checkpoints are damaged: steps {', '.join(map(str, steps))}; restore one from a "
                "backup or start a new run"
            )
        if self._opened is not None and chosen != max(steps, default=-1):
            self._opened.reload()
        if chosen >= 0:
            self._verified.add(chosen)
        return chosen if chosen >= 0 else None

    def _choose(self, steps: list[int]) -> int:
        for step in reversed(steps):
            damage = self._damage(step)
            if damage is None:
                return step
            older = [s for s in steps if s < step]
            instead = f"falling back to step {older[-1]}" if older else "there is no older checkpoint"
            self.say(f"checkpoint of step {step} is damaged: {damage}; {instead}")
            if not self._read_only and older:
                self._quarantine(step, "damaged")
        return -1

    def _damage(self, step: int) -> str | None:
        if step in self._verified:
            return None
        folder = self.folder_of(step)
        if not (folder / DIGESTS).exists():
            self.say(f"checkpoint of step {step} has no {DIGESTS}, so it cannot be verified; using it unverified")
            return None
        return verify_digests(folder)

    def check(self, step: int) -> None:
        """Verifies a checkpoint. Raises: ValueError if `step` does not exist or is damaged."""
        self.wait()
        steps = self.steps()
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"step={step}: no such checkpoint in {self.location}; available: {known}")
        found: list[str] = []

        def verify() -> int:
            found.append(self._damage(step) or "")
            return len(found[0])

        if from_process_0(verify):
            detail = found[0] if found else "see the error of process 0"
            raise ValueError(
                f"step={step}: this checkpoint is damaged: {detail}; all steps: {', '.join(map(str, steps))}"
            )
        self._verified.add(step)

    def restore(self, step: int | None, abstract_state: State) -> Restored[State]:
        """Restores the full state onto the shardings of `abstract_state` (a tree of `jax.ShapeDtypeStruct`).

        The mesh and the number of processes may differ from those that saved it. `step=None`: the newest valid step.
        Raises: ValueError if there is no checkpoint, an explicit `step` is damaged, or the tree structure differs.
        """
        chosen = self._checked(step)
        wanted = _as_dict(abstract_state)
        restored = self._read(chosen, wanted, strict=True)
        return Restored(chosen, dataclasses.replace(abstract_state, **restored))  # type: ignore[type-var]

    def restore_params(
        self, step: int | None, abstract_params: Tree, *, within: tuple[str | int, ...] = ("params",)
    ) -> Tree:
        """Restores only the parameters, cast to the dtypes of `abstract_params`. Reads nothing else.

        `within`: path to another tree of the same structure, such as the EMA inside the optimizer state.
        """
        wanted = abstract_params
        for name in reversed(within):
            wanted = {str(name): wanted}
        restored = self._read(self._checked(step), wanted, strict=False)
        for name in within:
            restored = restored[int(name) if isinstance(restored, list | tuple) else str(name)]
        return restored

    def _checked(self, step: int | None) -> int:
        if step is not None:
            self.check(step)
            return step
        newest = self.latest_valid_step()
        if newest is None:
            raise ValueError(f"{self.location}: holds no checkpoint")
        return newest

    def _read(self, step: int, wanted: Tree, *, strict: bool) -> Tree:
        """Reads the subtree `wanted` of the state of `step`; `strict`: the structure and dtypes must match exactly."""
        raw = jax.tree.map(prng_free_spec, wanted)
        folder = epath.Path(self.folder_of(step) / "state")
        # The options are global to all Orbax handlers: those of the last handler created apply to writers, too.
        reader = ocp.PyTreeCheckpointHandler(multiprocessing_options=self._processes)
        stored = reader.metadata(folder).tree
        if not strict:  # optax states are tuples; Orbax stores them, and partially restores them, as lists
            raw = shaped_like(stored, raw)
        check_structure(f"step {step} of {self.location}", leaf_paths(stored), leaf_paths(raw), strict=strict)
        restore_args = ocp.checkpoint_utils.construct_restore_args(raw)
        args = ocp.args.PyTreeRestore(item=raw, restore_args=restore_args, partial_restore=not strict)
        restored = reader.restore(folder, args=args)
        return jax.tree.map(wrap_keys, wanted, restored) if strict else restored

    def read_json(self, step: int, item: str) -> dict[str, Any]:
        """Returns `source`, `config`, `tokenizer` or `extra` of a step, without reading any array."""
        self.check(step)
        content = _read_json(self.folder_of(step) / item / "metadata")
        if content is None:
            raise ValueError(f"step {step} of {self.location}: contains no {item}")
        return content

    def read_tokenizer(self, step: int) -> dict[str, bytes]:
        """Returns the tokenizer's files by name."""
        return {name: base64.b64decode(text) for name, text in self.read_json(step, "tokenizer").items()}


def _as_dict(state: Any) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def from_process_0(ask: Callable[[], int]) -> int:
    """Returns the result of `ask()` on process 0 to every process: the others may see different files, or none."""
    if jax.process_count() == 1:
        return ask()
    failed = -(2**31)
    answer, error = 0, None
    if jax.process_index() == 0:
        try:
            answer = ask()
        except Exception as raised:  # the other processes wait for an answer in any case
            answer, error = failed, raised
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
    if error is not None:
        raise error
    if answer == failed:
        raise OSError("process 0 could not read the checkpoints; see its error message for the reason")
    return answer
