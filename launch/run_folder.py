"""Run folders: file layout, writers, and checks that a config may resume a run.

A run in an object store (`output_dir=s3://BUCKET/runs`) has a local copy under `runs/.store`. The store is
authoritative: the copy is updated from it at each start, and uploaded before each checkpoint and at the end.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from configs.schema import RunConfig, from_saved, to_plain
from data.object_store import Store, check_url, is_url
from models.config import COMPUTE_KEYS
from trainer.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from trainer.checkpoint.remote_checkpointer import RemoteCheckpointer

# Keys that may not change when a run resumes: they determine the shapes or the meaning of saved values.
SHAPE_KEYS = ("model", "adapter", "tokenizer", "objective.kind", "optimizer.kind")
# Keys inside them that affect only how values are computed, so they may change.
FREE_KEYS = (*(f"model.{key}" for key in COMPUTE_KEYS), "model.dtype", "tokenizer.train_max_bytes")
GIT_FILE = "git.json"  # next to packages copied from a checkout: the state of that checkout
COPIES = Path("runs") / ".store"  # local copies of runs in object stores, relative to the working directory
NOT_SENT = ("checkpoints", "jobs", "code", "read")  # folders uploaded separately, or never
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy", "wandb")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """`runs/NAME` and the stable file names in it."""

    path: Path
    store: Store | None = None  # the authoritative copy, if not `path`
    _sent: dict[str, tuple[int, int]] = dataclasses.field(
        default_factory=dict, compare=False
    )  # (size, mtime in ns) of uploaded files

    @property
    def where(self) -> str:
        """Returns the location to display: the path or the URL."""
        return str(self.path if self.store is None else self.store.url)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def rollbacks(self) -> Path:
        return self.path / "rollbacks"

    def checkpointer(
        self,
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> Checkpointer:
        """Returns a checkpointer for the run's local or remote checkpoints."""
        if self.store is None:
            return Checkpointer(self.checkpoints, config, read_only=read_only, say=say)
        import jax

        process = jax.process_index()
        own = "checkpoints" if process == 0 else f"checkpoints_{process}"  # hosts may not share a disk
        return RemoteCheckpointer(
            self.store.subfolder("checkpoints"),
            self.path / ("read" if read_only else own),
            config,
            read_only=read_only,
            say=say,
            before_commit=self.send,
        )

    def has_checkpoints(self) -> bool:
        if self.store is not None:
            return any(name.isdigit() for name in self.store.subfolder("checkpoints").folders())
        return any(path.name.isdigit() for path in self.checkpoints.glob("*"))

    def send(self) -> None:
        """Uploads changed files, except checkpoints, to the store. Call it on process 0 only."""
        if self.store is None:
            return
        tops = [top for top in self.path.iterdir() if not top.name.startswith(NOT_SENT)]
        for file in sorted(inner for top in tops for inner in (top.rglob("*") if top.is_dir() else [top])):
            if file.is_dir() or file.name.endswith(".tmp"):
                continue
            name = file.relative_to(self.path).as_posix()
            try:
                stat, content = file.stat(), file.read_bytes()  # stat before reading: other processes may be appending
            except FileNotFoundError:  # a short-lived file
                continue
            if self._sent.get(name) != (stat.st_size, stat.st_mtime_ns):
                self.store.write(name, content)
                self._sent[name] = (stat.st_size, stat.st_mtime_ns)

    def fetch(self) -> None:
        """Updates the local copy from the store; the copy of a run deleted from the store is renamed."""
        if self.store is None:
            return
        remote = self._remote_files()
        if "config.yaml" not in remote and self.config.exists():
            number = len(list(self.path.parent.glob(f"{self.name}.gone*"))) + 1
            os.replace(self.path, self.path.with_name(f"{self.name}.gone_{number}"))
        self.store.get(remote, self.path)

    def _remote_files(self) -> list[str]:
        assert self.store is not None
        names, subfolders = self.store.list_dir()
        return names + [name for part in subfolders if not part.startswith(NOT_SENT) for name in self.store.files(part)]

    def saved_config(self) -> RunConfig:
        """Returns the saved config of the run.

        Raises: ValueError if the run does not exist, with similar names.
        """
        if not self.config.exists():
            from launch.config_errors import did_you_mean

            parent = self.where.rpartition("/")[0]
            names = [folder.name for folder in folders(parent)]
            hint = did_you_mean(self.name, names) if names else f"; {parent} contains no runs yet"
            raise ValueError(f"run={self.name}: no such run in {parent}{hint}")
        try:
            return from_saved(yaml.safe_load(self.config.read_text()))
        except ValueError as error:
            raise ValueError(
                f"{self.where}: {error}; the run was written by an incompatible version of Meshwright. Export it "
                "with that version (convert from=RUN to=hf:FOLDER) and start from init_from=hf:FOLDER, or choose "
                "another run=NAME"
            ) from error

    def set_metrics_aside(self) -> None:
        """Renames the metrics written before a `reset=[step]`, whose steps will repeat."""
        if self.metrics.exists():
            number = len(list(self.path.glob("metrics.before_reset*.jsonl"))) + 1
            os.replace(self.metrics, self.path / f"metrics.before_reset_{number}.jsonl")

    def write_start(self, config: RunConfig, overrides: list[str]) -> None:
        """Writes config, overrides and environment of this start. Call it on process 0 only."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, yaml.safe_dump(to_plain(config), sort_keys=False))
        write_whole(self.path / "overrides.yaml", yaml.safe_dump(overrides))
        write_whole(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")


def run_folder(config: RunConfig) -> RunFolder:
    """Returns the folder of this run; for a run in a store, its updated local copy."""
    return folder_in(config.output_dir, config.run)


def folder_in(output_dir: str, name: str) -> RunFolder:
    """Returns the folder of a run by name. Raises: ValueError for a URL with a secret or an unreachable store."""
    if not is_url(output_dir):
        return RunFolder(Path(output_dir) / name)
    folder = RunFolder(local_copy(output_dir) / name, Store(f"{output_dir.rstrip('/')}/{name}", _say))
    try:
        folder.fetch()
    except FileNotFoundError as error:
        raise ValueError(f"output_dir={output_dir}: does not exist ({error}); create the bucket first") from None
    return folder


def folders(output_dir: str) -> list[RunFolder]:
    """Returns all runs in a folder or store."""
    if not is_url(output_dir):
        return [RunFolder(path.parent) for path in sorted(Path(output_dir).glob("*/config.yaml"))]
    store = Store(output_dir, _say)
    return [folder_in(output_dir, name) for name in store.folders() if store.has(f"{name}/config.yaml")]


def local_copy(url: str) -> Path:
    """Returns the local folder that mirrors a store URL."""
    check_url(url, "output_dir")
    scheme, _, rest = url.partition("://")
    return COPIES / scheme / rest.strip("/")


def _say(text: str) -> None:
    print(text, flush=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically: readers see the old or the new content, also after a kill."""
    partial_file = path.with_name(path.name + ".tmp")
    partial_file.write_text(text)
    os.replace(partial_file, path)


def environment() -> dict[str, Any]:
    """Describes versions, machine, devices and commit. Excludes environment variables, which may hold secrets."""
    import jax

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    flags = {
        name: os.environ[name] for name in ("XLA_FLAGS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS") if name in os.environ
    }
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "folder": os.getcwd(),
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "versions": versions,
        "flags": flags,
        "backend": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
    }


def git_state() -> dict[str, Any] | None:
    """Returns the commit of the running code and its changed files; None outside a checkout."""
    package = Path(__file__).resolve().parent
    if (frozen := package.parent / GIT_FILE).exists():
        return json.loads(frozen.read_text())
    try:
        run = lambda *a: subprocess.run(
            ["git", "-C", str(package), *a], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return {
            "commit": run("rev-parse", "HEAD"),
            "changed_files": run("status", "--short").splitlines()[:50],
        }
    except (OSError, subprocess.SubprocessError):
        return None


def refuse_drift(saved: RunConfig, config: RunConfig, name: str) -> None:
    """Raises: ValueError naming the first changed key that the run `name` cannot resume with."""
    before, now = to_plain(saved), to_plain(config)
    if saved.adapter.active and None not in (config.init_from, saved.init_from) and config.init_from != saved.init_from:
        raise ValueError(
            f"init_from={config.init_from}: the adapters of the run {name!r} were trained on init_from="
            f"{saved.init_from}; restore that value, or remove the key"
        )
    for key in SHAPE_KEYS:
        for path, old, new in _differences(_at(before, key), _at(now, key), key):
            if any(path == key or path.startswith(f"{key}.") for key in FREE_KEYS):
                continue
            raise ValueError(
                f"{path}={new}: the run {name!r} was started with {path}={old}, and its checkpoints depend on it; "
                f"restore that value, or start a new run with run=NAME (init_from={name} copies the weights)"
            )


def _at(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _differences(old: Any, new: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [(path, old, new)]
