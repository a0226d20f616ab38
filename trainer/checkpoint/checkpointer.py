"""Checkpoints of a run: written in the background, whole or not at all, checked before they are used.

    checkpoints/STEP/state       params, opt_state, step and rng: Orbax, sharded, restored onto any mesh
                    /source      JSON: the position of the next batch
                    /config      JSON: the resolved config and where it ran
                    /tokenizer   JSON: {file name: base64}
                    /extra       JSON: what hooks remember, such as the patience of early stopping
                    /digests.json  SHA-256 of every file above

Orbax restores a flipped bit in a data file without a word, so the digests are made of the finished files,
inside the temporary folder, just before the one rename that commits it: a committed step is never without
them.
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

from trainer.checkpoint.barrier import CommitBarrier, tell_failures_once
from trainer.checkpoint.checksums import DIGESTS, key_data, leaf_paths, verify_digests, write_digests
from trainer.checkpoint.structure import Tree, check_structure, prng_free_spec, shaped_like, wrap_keys

State = TypeVar("State")  # a dataclass pytree: TrainState


@dataclasses.dataclass
class CheckpointConfig:
    """When a run is saved and what stays."""

    save_interval_steps: int = dataclasses.field(
        default=1000, metadata={"min": 0}
    )  # steps between checkpoints; 0: at the end only
    max_to_keep: int = dataclasses.field(default=3, metadata={"min": 1})  # the last so many stay
    # Each multiple of so many steps stays for ever; null: none
    keep_period: int | None = dataclasses.field(default=None, metadata={"min": 1})
    keep_best: bool = True  # save when the evaluation loss is the best yet, and keep that one
    async_save: bool = True  # write in the background while training goes on


class SaveFailed(RuntimeError):
    """A checkpoint was not written; those before it are as they were."""


class Restored(NamedTuple, Generic[State]):
    """What a checkpoint gave back."""

    step: int
    state: State


def silence_orbax(text: str) -> None:
    """For callers that have nobody to tell."""


def loss_of(metrics: Mapping[str, float] | None) -> float:
    loss = math.inf if not metrics else float(metrics.get("loss", math.inf))
    return math.inf if math.isnan(loss) else loss


class Checkpointer:
    """The checkpoints of one run. Every process makes one and calls the same methods in the same order.

    A `read_only` one neither writes nor cleans up, so that a run that is still going on can be evaluated.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        say: Callable[[str], None] = silence_orbax,
    ):
        """Opens `folder`, which need not exist. `say` is told in one line what was found wrong."""
        self.config = config or CheckpointConfig()
        self.folder = Path(os.path.abspath(folder))
        self.say = say
        self._verified: set[int] = set()
        self._saving: int | None = None
        self._read_only = read_only
        self._opened: ocp.CheckpointManager | None = None
        self._barrier: CommitBarrier | None = None  # where there are several processes
        self._async = ocp.AsyncOptions()
        self._processes = ocp.options.MultiprocessingOptions()
        self._handlers: dict[str, Any] | None = None  # None: by the arguments of a save

    @property
    def location(self) -> str:
        """For people: where the checkpoints lie."""
        return str(self.folder)

    def _retention(self) -> AnyPreservationPolicy:
        policies: list[Any] = [LatestN(self.config.max_to_keep)]
        if self.config.keep_period is not None:
            policies.append(EveryNSteps(self.config.keep_period))
        if self.config.keep_best:
            # BestN keeps the end of its sorted list, so that the lowest loss needs the reverse order.
            policies.append(BestN(get_metric_fn=loss_of, reverse=True, n=1, keep_checkpoints_without_metrics=False))
        return AnyPreservationPolicy(policies)

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, opened by the first that writes: it starts threads and cleans up what a kill left."""
        assert not self._read_only, "a read-only Checkpointer neither saves nor moves anything"
        if self._opened is None:
            self._opened = self._open_manager()
        return self._opened

    def _open_manager(self) -> ocp.CheckpointManager:
        tell_failures_once()
        self._barrier = CommitBarrier() if jax.process_count() > 1 else None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention(),
            best_fn=loss_of,  # else Orbax does not write the metrics that the policy reads after a restart
            best_mode="min",
            cleanup_tmp_directories=True,
            # A copy of a step in a later run must not look older or newer by its metadata alone.
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
        """Waits for what is being written; must be called before the process ends."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def wait(self) -> None:
        """Returns when the last `save` is committed.

        Raises: SaveFailed where it was not, in all processes alike.
        """
        if self._opened is None or self._saving is None:
            return
        error: Exception | None = None
        try:
            self._opened.wait_until_finished()
        except Exception as raised:
            error = raised
        if self._barrier is not None and self._barrier.agree(error is not None):
            error = error or RuntimeError("another process could not write its part")
        if error is not None:
            raise self._failed(error) from error
        self._saving = None

    def _failed(self, error: Exception) -> SaveFailed:
        """Lets go of the manager: the next one removes what was half written."""
        step, self._saving = self._saving, None
        assert step is not None
        opened, self._opened = self._opened, None
        if opened is not None:
            with contextlib.suppress(Exception):
                opened.close()
        self._verified.discard(step)
        newest = self._last_known()
        stands = "there is none before it" if newest is None else f"the newest is that of step {newest}"
        return SaveFailed(f"checkpoint of step {step} could not be written: {self._why(error)}; {stands}")

    def _last_known(self) -> int | None:
        return self.latest()

    def _why(self, error: Exception) -> str:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "No space left" in said or "RESOURCE_EXHAUSTED" in said:
            return f"no space left on {self.folder} ({shutil.disk_usage(self.folder).free / 1e6:,.1f} MB free)"
        return said[:300]

    def _wait_and_log(self) -> None:
        """A save that fails does not end a run: it is told, and tried again at the next due step."""
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
        """Copies `state` to the host and writes it in the background; `state` may be donated right after.

        Waits for the save before it. `metrics["loss"]` is the evaluation loss at this step, where there is
        one. A save that fails is told; the last one fails in `wait`.
        Raises: ValueError where `step` is there already; SaveFailed where one of several processes cannot begin.
        """
        self._wait_and_log()
        if step in self._manager.all_steps():
            raise ValueError(f"step {step} of {self.location} is saved already; delete it or begin another run")
        self._saving = step
        files = {name: base64.b64encode(content).decode() for name, content in tokenizer.items()}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(jax.tree.map(key_data, _as_dict(state))),
            source=ocp.args.JsonSave(dict(source)),
            config=ocp.args.JsonSave(dict(config)),
            tokenizer=ocp.args.JsonSave(files),
            extra=ocp.args.JsonSave(dict(extra or {})),
        )
        told = {"loss": loss_of(metrics)} if math.isfinite(loss_of(metrics)) else {}

        try:
            self._manager.save(step, args=items, metrics=told, force=True)  # when to save is the caller's decision
        except Exception as error:
            failed = self._failed(error)
            if jax.process_count() > 1:
                raise failed from error  # the others are in the middle of it
            self.say(str(failed))
            return
        self._verified.add(step)
        if not self.config.async_save:
            self._wait_and_log()

    def _before_commit(self) -> None:
        """Called by Orbax, in its thread on process 0, when all have written and before the rename."""
        write_digests(self._unfinished())

    def _unfinished(self) -> Path:
        """The folder of what is being saved."""
        assert self._saving is not None
        temporary = sorted(self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        return temporary[-1] if temporary else self.folder / str(self._saving)

    def folder_of(self, step: int) -> Path:
        """Where the files of a checkpoint can be read."""
        return self.folder / str(step)

    def _quarantine(self, step: int, why: str) -> None:
        folder = self.folder / str(step)
        target, count = folder.with_name(f"{step}.{why}"), 1
        while target.exists():
            count += 1
            target = folder.with_name(f"{step}.{why}-{count}")
        folder.rename(target)

    def superseded(self) -> list[str]:
        """Names of checkpoints that were moved away because their steps were to be done anew."""
        return sorted(path.name for path in self.folder.glob("*.superseded*"))

    def discard_after(self, step: int) -> list[int]:
        """Moves checkpoints of later steps away, as `STEP.superseded`: those steps will be done anew.

        Returns: the steps that were moved.
        """
        self.wait()
        newer = [s for s in self.steps() if s > step]

        def move() -> int:
            for later in newer:
                self._quarantine(later, "superseded")
            return len(newer)

        if by_process_0(move):
            self._manager.reload()
        self._verified -= set(newer)
        return newer

    # Reading

    def steps(self) -> list[int]:
        """The steps that are committed, in ascending order."""
        if not self.folder.is_dir():
            return []
        return sorted(ocp.utils.checkpoint_steps(self.folder))

    def latest(self) -> int | None:
        """The newest committed step, unchecked; see `latest_valid_step`."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the lowest evaluation loss among those that are there and have one."""
        losses = {step: loss_of(self._metrics_of(step)) for step in self.steps()}
        known = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        return min(known, key=lambda step: (known[step], step)) if known else None

    def _metrics_of(self, step: int) -> dict[str, Any] | None:
        return _read_json(self.folder / str(step) / "metrics" / "metrics")

    def before(self, step: int) -> int | None:
        """The newest committed step before this one, unchecked, as process 0 finds it."""
        self.wait()
        found = by_process_0(lambda: max((s for s in self.steps() if s < step), default=-1))
        return None if found < 0 else found

    def latest_valid_step(self) -> int | None:
        """The newest step whose files are all as they were written; None where nothing was ever saved.

        Newer ones that are damaged are set aside as `STEP.damaged`, so that the run can save that step again.
        Raises: ValueError where there are checkpoints and none is whole.
        """
        self.wait()
        steps = self.steps()
        chosen = by_process_0(lambda: self._choose(steps))
        if chosen < 0 and steps:
            raise ValueError(f"{self.location}: none of its checkpoints is whole: {', '.join(map(str, steps))}")
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
            instead = f"falling back to step {older[-1]}" if older else "there is no older one"
            self.say(f"checkpoint of step {step} is damaged: {damage}; {instead}")
            if not self._read_only and older:
                self._quarantine(step, "damaged")
        return -1

    def _damage(self, step: int) -> str | None:
        if step in self._verified:
            return None
        folder = self.folder_of(step)
        if not (folder / DIGESTS).exists():
            self.say(f"checkpoint of step {step} carries no digests, so nothing can be checked; using it as it is")
            return None
        return verify_digests(folder)

    def check(self, step: int) -> None:
        """Raises: ValueError where `step` is not there or a file of it is not as it was written."""
        self.wait()
        steps = self.steps()
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"step={step}: no such checkpoint in {self.location}; there are: {known}")
        found: list[str] = []

        def look() -> int:
            found.append(self._damage(step) or "")
            return len(found[0])

        if by_process_0(look):
            detail = found[0] if found else "process 0 names the file"
            raise ValueError(f"step={step}: this checkpoint is damaged: {detail}; others: {', '.join(map(str, steps))}")
        self._verified.add(step)

    def restore(self, step: int | None, abstract_state: State) -> Restored[State]:
        """The whole state, onto the shardings of `abstract_state` (a tree of `jax.ShapeDtypeStruct`).

        The mesh and the number of processes may differ from those that saved it. Without a step, the newest
        whole one.
        Raises: ValueError where there is none, where an explicit one is damaged, or where it holds another
        structure.
        """
        chosen = self._checked(step)
        wanted = _as_dict(abstract_state)
        got = self._read(chosen, wanted, whole=True)
        return Restored(chosen, dataclasses.replace(abstract_state, **got))  # type: ignore[type-var]

    def restore_params(
        self, step: int | None, abstract_params: Tree, *, within: tuple[str | int, ...] = ("params",)
    ) -> Tree:
        """Only the parameters, cast to the dtypes of `abstract_params`; nothing else is read.

        `within` is the path to another tree of the same shape, such as an average inside the optimizer state.
        """
        wanted = abstract_params
        for name in reversed(within):
            wanted = {str(name): wanted}
        got = self._read(self._checked(step), wanted, whole=False)
        for name in within:
            got = got[int(name) if isinstance(got, list | tuple) else str(name)]
        return got

    def _checked(self, step: int | None) -> int:
        if step is not None:
            self.check(step)
            return step
        newest = self.latest_valid_step()
        if newest is None:
            raise ValueError(f"{self.location}: holds no checkpoint")
        return newest

    def _read(self, step: int, wanted: Tree, *, whole: bool) -> Tree:
        """The part `memory_from_error` of the state of `step`; `whole`: nothing else may be there, nor other dtypes."""
        raw = jax.tree.map(prng_free_spec, wanted)
        folder = epath.Path(self.folder_of(step) / "state")
        # Orbax keeps this in a place that all handlers share: the last one made decides for those that write.
        reader = ocp.PyTreeCheckpointHandler(multiprocessing_options=self._processes)
        stored = reader.metadata(folder).tree
        if not whole:  # optax states are tuples, which Orbax stores, and restores in part, as lists
            raw = shaped_like(stored, raw)
        check_structure(f"step {step} of {self.location}", leaf_paths(stored), leaf_paths(raw), whole=whole)
        restore_args = ocp.checkpoint_utils.construct_restore_args(raw)
        args = ocp.args.PyTreeRestore(item=raw, restore_args=restore_args, partial_restore=not whole)
        got = reader.restore(folder, args=args)
        return jax.tree.map(wrap_keys, wanted, got) if whole else got

    def read_json(self, step: int, item: str) -> dict[str, Any]:
        """`source`, `config`, `tokenizer` or `extra` of a step, without touching an array."""
        self.check(step)
        content = _read_json(self.folder_of(step) / item / "metadata")
        if content is None:
            raise ValueError(f"step {step} of {self.location}: holds no {item}")
        return content

    def read_tokenizer(self, step: int) -> dict[str, bytes]:
        """The tokenizer's files by name."""
        return {name: base64.b64decode(text) for name, text in self.read_json(step, "tokenizer").items()}


def _as_dict(state: Any) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def by_process_0(ask: Callable[[], int]) -> int:
    """What process 0 answers, on every process: the others may see other files, or none."""
    if jax.process_count() == 1:
        return ask()
    failed = -(2**31)
    answer, error = 0, None
    if jax.process_index() == 0:
        try:
            answer = ask()
        except Exception as raised:  # the others wait for an answer, whatever it is
            answer, error = failed, raised
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
    if error is not None:
        raise error
    if answer == failed:
        raise OSError("process 0 could not read the checkpoints; its own message says why")
    return answer
