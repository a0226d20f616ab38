"""Metric trackers: console and `metrics.jsonl` always, W&B and TensorBoard if configured.

Only process 0 has trackers. The JSONL file is the source of truth: each row is written immediately, whereas W&B buffers
its last rows in memory. An optional tracker that fails is reported once and disabled; it never ends a run.
"""

import enum
import html
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

START = "run/start"  # metric: number of a restart, logged at the step that it resumed from
Metrics = Mapping[str, float]
Say = Callable[[str], None]


class Tracker(Protocol):
    """Destination of metrics, texts and images."""

    def log_config(self, config: Mapping[str, Any]) -> None: ...

    def log(self, step: int, metrics: Metrics) -> None: ...

    def log_text(self, step: int, name: str, text: str) -> None: ...

    def log_image(self, step: int, name: str, path: Path) -> None: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def finish(self, exit_code: int = 0) -> None: ...


class NoopTracker:
    """Tracker that does nothing; base class of trackers that support only some methods."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def log_text(self, step: int, name: str, text: str) -> None:
        pass

    def log_image(self, step: int, name: str, path: Path) -> None:
        pass

    def summary(self, values: Mapping[str, Any]) -> None:
        pass

    def finish(self, exit_code: int = 0) -> None:
        pass


@dataclass
class TrackerConfig:
    """Base of all optional trackers."""

    kind: str = ""

    def build(self, *, run_folder: Path, run_name: str, start_step: int) -> Tracker:
        raise ValueError(f"tracker.kind={self.kind}: choose trackers with tracker=[NAME,...]")


class WandbMode(enum.Enum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class WandbConfig(TrackerConfig):
    """Weights & Biases."""

    kind: str = "wandb"
    project: str = "meshwright"  # W&B project
    entity: str | None = None  # W&B user or team; null: the account's default
    group: str | None = None  # W&B group, shown together
    tags: list[str] = field(default_factory=list)  # W&B tags
    mode: WandbMode | None = None  # W&B mode; null: the environment variable WANDB_MODE, otherwise online

    def build(self, *, run_folder: Path, run_name: str, start_step: int) -> Tracker:
        return WandbTracker(self, run_folder=run_folder, run_name=run_name)


@dataclass
class TensorboardConfig(TrackerConfig):
    """TensorBoard event files in the run folder."""

    kind: str = "tensorboard"
    flush_seconds: int = 10  # seconds between flushes; a kill loses at most this much

    def build(self, *, run_folder: Path, run_name: str, start_step: int) -> Tracker:
        return TensorboardTracker(run_folder / "tensorboard", flush_seconds=self.flush_seconds, start_step=start_step)


class JsonlTracker(NoopTracker):
    """Writes `metrics.jsonl`: one object per line with `step`, `time` (Unix time) and metrics (null if not finite)."""

    def __init__(self, path: Path, *, start_step: int = 0):
        """Drops rows of steps after `start_step`, which will be repeated, and lines truncated by a kill."""
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_rows(path, after=start_step)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""  # rows not written yet because the disk is full

    def log(self, step: int, metrics: Metrics) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._unwritten += (json.dumps({"step": step, "time": time.time(), **values}) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)  # the file position is wrong after a partial write was truncated
        try:
            if self._file.write(self._unwritten) == len(self._unwritten):
                self._unwritten = b""
                return
        except OSError:
            pass
        self._file.truncate(end)

    def finish(self, exit_code: int = 0) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSONL file and skips lines truncated by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def drop_rows(path: Path, *, after: int) -> None:
    """Keeps valid rows with `step <= after`. Atomic: a kill leaves the old file or the new one."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["step"] <= after]
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


class WandbTracker(NoopTracker):
    """Logs to one W&B run across restarts, using an id stored in the run folder."""

    def __init__(self, config: WandbConfig, *, run_folder: Path, run_name: str):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise it resolves a host name even when offline
        import wandb

        self._wandb = wandb
        run_folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=list(config.tags) or None,
            mode=config.mode.value if config.mode is not None else None,
            name=run_name,
            id=wandb_id(run_folder, run_name),
            resume="allow",
            dir=str(run_folder),
            # The git remote URL may contain a password; environment.json records the commit.
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
        )
        # Plot against train/step: after a kill, W&B would drop points because its own step counter decreases.
        self._run.define_metric("train/step")
        self._run.define_metric("*", step_metric="train/step")
        self._run.define_metric("eval/loss", step_metric="train/step", summary="min")

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(without_secrets(config), allow_val_change=True)

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({**metrics, "train/step": step})

    def log_text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False), "train/step": step})

    def log_image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path)), "train/step": step})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def finish(self, exit_code: int = 0) -> None:
        self._run.finish(exit_code=exit_code)


def wandb_id(run_folder: Path, run_name: str) -> str:
    """Returns the W&B run id: run name and eight random characters, created at the first start and then reused.

    The name alone is not unique: a run of that name in another folder would resume the same W&B run.
    """
    path = run_folder / "wandb" / "id"
    if path.exists():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', run_name)[:55]}-{secrets.token_hex(4)}"
    partial = path.with_name("id.tmp")
    partial.write_text(name)
    os.replace(partial, path)
    return name


_SECRET = re.compile(r"(^|_)(password|passwd|secret|api_key|access_key|access_token|auth_token|credentials?)$", re.I)


def without_secrets(config: Any, key: str = "") -> Any:
    """Returns `config` with the values of secret keys (passwords, tokens, API keys) replaced by `***`."""
    if isinstance(config, Mapping):
        return {name: without_secrets(value, str(name)) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [without_secrets(value, key) for value in config]
    return "***" if _SECRET.search(key) and config is not None else config


class TensorboardTracker(NoopTracker):
    """Writes TensorBoard event files without TensorFlow."""

    def __init__(self, folder: Path, *, flush_seconds: int = 10, start_step: int = 0):
        """Raises: ValueError if tensorboardX is not installed."""
        try:
            from tensorboardX import SummaryWriter
            from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
        except ImportError as error:
            raise ValueError(
                "tracker=tensorboard: needs tensorboardX; install it with: pip install -e '.[tensorboard]'"
            ) from error
        # Hide points from this step on, written by an earlier start that was killed.
        purge = start_step + 1 if start_step else None
        self._summary = Summary
        self._writer = SummaryWriter(str(folder), flush_secs=flush_seconds, purge_step=purge)

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._writer.add_text("config", f"```\n{json.dumps(without_secrets(config), indent=2, default=str)}\n```", 0)

    def log(self, step: int, metrics: Metrics) -> None:
        # One event for all metrics: one call per scalar would take milliseconds in total.
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        writer = self._writer.file_writer
        assert writer is not None
        writer.add_summary(self._summary(value=values), step)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, f"```\n{text}\n```", step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        from matplotlib.image import imread

        self._writer.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    def summary(self, values: Mapping[str, Any]) -> None:
        self._writer.add_text("summary", f"```\n{json.dumps(dict(values), indent=2, default=str)}\n```", 0)

    def finish(self, exit_code: int = 0) -> None:
        self._writer.close()


class Trackers:
    """Forwards to several trackers. Optional ones are disabled with one log line when they fail."""

    def __init__(
        self,
        always: Sequence[Tracker] = (),
        optional: Mapping[str, Tracker] | None = None,
        *,
        say: Say = print,
    ):
        self._always = list(always)
        self._optional = dict(optional or {})
        self._say = say

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in self._always:
            call(tracker)
        for name, tracker in list(self._optional.items()):
            try:
                call(tracker)
            except Exception as error:  # network, service or library error
                del self._optional[name]
                self._say(f"tracker {name} failed and is disabled: {_first_line(error)}")

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log_config(config))

    def log(self, step: int, metrics: Metrics) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def log_text(self, step: int, name: str, text: str) -> None:
        self._each(lambda tracker: tracker.log_text(step, name, text))

    def log_image(self, step: int, name: str, path: Path) -> None:
        self._each(lambda tracker: tracker.log_image(step, name, path))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.summary(values))

    def finish(self, exit_code: int = 0) -> None:
        """Flushes and closes all trackers. Call it also after an error; calling it twice is harmless."""
        self._each(lambda tracker: tracker.finish(exit_code))
        self._always, self._optional = [], {}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def build_trackers(
    configs: Mapping[str, TrackerConfig],
    *,
    run_folder: Path,
    run_name: str,
    always: Sequence[Tracker] = (),
    start_step: int = 0,
    say: Say = print,
) -> Trackers:
    """Builds the trackers of a run. Call it on every process; only process 0 gets trackers.

    `always`: trackers of every run, in addition to `metrics.jsonl`; their errors end the run.

    Raises: ValueError if a tracker is not installed. Unreachable trackers are reported and disabled.
    """
    import jax

    if jax.process_index() != 0:
        return Trackers()
    optional: dict[str, Tracker] = {}
    for name, config in configs.items():
        try:
            optional[name] = config.build(run_folder=run_folder, run_name=run_name, start_step=start_step)
        except ValueError:
            raise
        except Exception as error:  # no account or network: the run continues without this tracker
            say(f"tracker {name} could not be started and is disabled: {_first_line(error)}")
    jsonl = JsonlTracker(run_folder / "metrics.jsonl", start_step=start_step)
    return Trackers([jsonl, *always], optional, say=say)
