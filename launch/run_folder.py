"""The folder of a run: what stands where in it, who writes it, and whether a config may go on with it.

A run of an object store (`output_dir=s3://BUCKET/runs`) is worked on in a copy on this machine, below `runs/.store`. What the
store holds counts: the copy follows it at each start, and goes there before each checkpoint and at the end.
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

# Keys that may not change while a run goes on: they decide the shapes of what was saved, or what its numbers mean.
SHAPE_KEYS = ("model", "adapter", "tokenizer", "objective.kind", "optimizer.kind")
# Keys inside them that only say how to compute, not what.
FREE_KEYS = (*(f"model.{key}" for key in COMPUTE_KEYS), "model.dtype", "tokenizer.train_max_bytes")
GIT_FILE = "git.json"  # beside packages that were copied out of their checkout: the state of that
COPIES = Path("runs") / ".store"  # of the runs of stores, in the folder of the command
NOT_SENT = ("checkpoints", "jobs", "code", "read")  # folders that a store gets in another way, or never
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy", "wandb")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """`runs/NAME` and the names in it that other tools may hold on to."""

    path: Path
    store: Store | None = None  # where it is kept, if not in `path`, which then is a copy
    _sent: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict, compare=False)  # size, time by name

    @property
    def where(self) -> str:
        """For people."""
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
    def incidents(self) -> Path:
        return self.path / "incidents"

    def checkpointer(
        self,
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> Checkpointer:
        """The run's checkpoints, wherever they are."""
        if self.store is None:
            return Checkpointer(self.checkpoints, config, read_only=read_only, say=say)
        import jax

        process = jax.process_index()
        own = "checkpoints" if process == 0 else f"checkpoints_{process}"  # hosts need not see each other's disks
        return RemoteCheckpointer(
            self.store.inside("checkpoints"),
            self.path / ("read" if read_only else own),
            config,
            read_only=read_only,
            say=say,
            before_commit=self.send,
        )

    def has_checkpoints(self) -> bool:
        if self.store is not None:
            return any(name.isdigit() for name in self.store.inside("checkpoints").folders())
        return any(path.name.isdigit() for path in self.checkpoints.glob("*"))

    def send(self) -> None:
        """Puts the files that changed into the store; checkpoints go their own way. By process 0 alone."""
        if self.store is None:
            return
        tops = [top for top in self.path.iterdir() if not top.name.startswith(NOT_SENT)]
        for file in sorted(inner for top in tops for inner in (top.rglob("*") if top.is_dir() else [top])):
            if file.is_dir() or file.name.endswith(".tmp"):
                continue
            name = file.relative_to(self.path).as_posix()
            try:
                stat, content = file.stat(), file.read_bytes()  # at once: others may be appending to it
            except FileNotFoundError:  # it had a name for a moment only
                continue
            if self._sent.get(name) != (stat.st_size, stat.st_mtime_ns):
                self.store.write(name, content)
                self._sent[name] = (stat.st_size, stat.st_mtime_ns)

    def fetch(self) -> None:
        """Makes the copy what the store holds; one of a run that is no longer there is moved away."""
        if self.store is None:
            return
        there = self._of_store()
        if "config.yaml" not in there and self.config.exists():
            number = len(list(self.path.parent.glob(f"{self.name}.gone*"))) + 1
            os.replace(self.path, self.path.with_name(f"{self.name}.gone_{number}"))
        self.store.get(there, self.path)

    def _of_store(self) -> list[str]:
        assert self.store is not None
        names, inside = self.store.top()
        return names + [name for part in inside if not part.startswith(NOT_SENT) for name in self.store.files(part)]

    def saved_config(self) -> RunConfig:
        """The config that the run was started with.

        Raises: ValueError where there is no such run, with the names that there are.
        """
        if not self.config.exists():
            from launch.config_errors import did_you_mean

            around = self.where.rpartition("/")[0]
            there = [folder.name for folder in folders(around)]
            hint = did_you_mean(self.name, there) if there else f"; {around} holds no runs yet"
            raise ValueError(f"run={self.name}: there is no such run in {around}{hint}")
        return from_saved(yaml.safe_load(self.config.read_text()))

    def set_metrics_aside(self) -> None:
        """Keeps what was measured before a `reset=[step]`, whose rows will have the same steps again."""
        if self.metrics.exists():
            number = len(list(self.path.glob("metrics.before_reset*.jsonl"))) + 1
            os.replace(self.metrics, self.path / f"metrics.before_reset_{number}.jsonl")

    def write_start(self, config: RunConfig, overrides: list[str]) -> None:
        """What this start of the run was told and where it runs. By process 0 alone."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.config, yaml.safe_dump(to_plain(config), sort_keys=False))
        write_whole(self.path / "overrides.yaml", yaml.safe_dump(overrides))
        write_whole(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")


def run_folder(config: RunConfig) -> RunFolder:
    """The folder of this run; of one in a store its copy, as new as what the store holds."""
    return folder_in(config.output_dir, config.run)


def folder_in(runs: str, name: str) -> RunFolder:
    """Raises: ValueError for a URL that has a secret in it, or a store that cannot be had."""
    if not is_url(runs):
        return RunFolder(Path(runs) / name)
    folder = RunFolder(local_copy(runs) / name, Store(f"{runs.rstrip('/')}/{name}", _say))
    try:
        folder.fetch()
    except FileNotFoundError as error:
        raise ValueError(f"output_dir={runs}: is not there ({error}); make the bucket first") from None
    return folder


def folders(runs: str) -> list[RunFolder]:
    """All runs of a folder or a store."""
    if not is_url(runs):
        return [RunFolder(path.parent) for path in sorted(Path(runs).glob("*/config.yaml"))]
    store = Store(runs, _say)
    return [folder_in(runs, name) for name in store.folders() if store.has(f"{name}/config.yaml")]


def local_copy(url: str) -> Path:
    """Where what lies in a store is worked on."""
    check_url(url, "runs")
    scheme, _, rest = url.partition("://")
    return COPIES / scheme / rest.strip("/")


def _say(text: str) -> None:
    print(text, flush=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once: a reader, or a kill, finds the old one or the new one."""
    half = path.with_name(path.name + ".tmp")
    half.write_text(text)
    os.replace(half, path)


def environment() -> dict[str, Any]:
    """Where the run stands: versions, machine, devices, commit. Never the environment variables, which hold keys."""
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
    """Commit of the code that runs and whether files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    if (frozen := here.parent / GIT_FILE).exists():
        return json.loads(frozen.read_text())
    try:
        run = lambda *a: subprocess.run(
            ["git", "-C", str(here), *a], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return {
            "commit": run("rev-parse", "HEAD"),
            "changed_files": run("status", "--short").splitlines()[:50],
        }
    except (OSError, subprocess.SubprocessError):
        return None


def refuse_drift(saved: RunConfig, config: RunConfig, name: str) -> None:
    """Raises: ValueError naming the first key that may not change while the run `name` goes on."""
    before, now = to_plain(saved), to_plain(config)
    if saved.adapter.active and None not in (config.init_from, saved.init_from) and config.init_from != saved.init_from:
        raise ValueError(
            f"init_from={config.init_from}: the adapters of the run {name!r} stand on init_from={saved.init_from}; "
            "set it back, or leave it out"
        )
    for key in SHAPE_KEYS:
        for path, old, new in _differences(_at(before, key), _at(now, key), key):
            if any(path == key or path.startswith(f"{key}.") for key in FREE_KEYS):
                continue
            raise ValueError(
                f"{path}={new}: the run {name!r} was started with {path}={old}, and its checkpoints depend on it; "
                f"set it back, or begin another run with run=NAME (init_from={name} brings the weights along)"
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
