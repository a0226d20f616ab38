"""The folder of a run: what stands where in it, who writes it, and whether a config may go on with it."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from configs.schema import RunConfig, from_saved, to_plain
from models.config import HOW

# Keys that may not change while a run goes on: they decide the shapes of what was saved, or what its numbers mean.
SHAPE_KEYS = ("model", "adapter", "tokenizer", "objective.kind", "optimizer.kind")
# Keys inside them that only say how to compute, not what.
FREE_KEYS = (*(f"model.{key}" for key in HOW), "model.dtype", "tokenizer.train_bytes")
GIT_FILE = "git.json"  # beside packages that were copied out of their checkout: the state of that
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "numpy", "wandb")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """`runs/NAME` and the names in it that other tools may hold on to."""

    path: Path

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

    def has_checkpoints(self) -> bool:
        return any(path.name.isdigit() for path in self.checkpoints.glob("*"))

    def saved_config(self) -> RunConfig:
        """The config that the run was started with.

        Raises: ValueError where there is no such run, with the names that there are.
        """
        if not self.config.exists():
            from launch.messages import did_you_mean

            there = sorted(p.parent.name for p in self.path.parent.glob("*/config.yaml"))
            hint = did_you_mean(self.name, there) if there else f"; {self.path.parent} holds no runs yet"
            raise ValueError(f"run={self.name}: there is no such run in {self.path.parent}{hint}")
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
    return RunFolder(Path(config.runs) / config.run)


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
