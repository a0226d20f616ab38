"""A job: the processes of one launch of a run, recorded in `runs/NAME/jobs/K`.

    job.json     the request, and the launcher's handle of the job
    config.yaml  the resolved config       code/       snapshot of the code that the job runs
    log          output of the job         code.patch  difference to the commit in code/git.json

The submitting process allocates the job number K. Values of environment variables given by name only are never written
to disk.
"""

import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from omegaconf import OmegaConf

from configs.launchers import LauncherConfig
from configs.schema import RunConfig, to_plain, typed_node
from launch import exit_codes
from launch.run_folder import GIT_FILE, git_state, write_whole

ROOT = Path(__file__).resolve().parents[2]  # parent folder of the packages
PACKED = "code.tar.gz"
MARK = "MESHWRIGHT_JOB"  # set in the environment of a job's processes, which must not launch jobs
PACKAGES = ("trainer", "models", "data", "configs", "launch")
INSTALL_FILES = ("pyproject.toml", "README.md")  # required to install the packages


Config = TypeVar("Config", bound=LauncherConfig)


@dataclass(frozen=True)
class Job(Generic[Config]):
    folder: Path  # runs/NAME/jobs/K, absolute
    run: str
    task: str
    arguments: list[str]  # command-line arguments after the task: overrides and Hydra flags
    launcher: Config
    python: str  # interpreter of the submitting process
    workdir: str  # working directory of the submitting process
    handle: dict[str, Any] = field(default_factory=dict)  # launcher-specific identifiers: process ID, cluster job ID

    @property
    def number(self) -> int:
        return int(self.folder.name)

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def command(self, python: str | None = None) -> list[str]:
        """Returns the command of each process. -P keeps the working directory off sys.path."""
        return [python or self.python, "-P", "-m", "launch.cli", self.task, *self.arguments]

    def environment(self, code: str | None = None) -> dict[str, str]:
        """Returns the environment variables other than secrets. `code`: path of the code snapshot for the processes."""
        given = dict(entry.split("=", 1) for entry in self.launcher.env if "=" in entry)
        return {**given, MARK: str(self.number), "PYTHONPATH": code or str(self.code)}

    def pack(self) -> int:
        """Writes the code snapshot to `code.tar.gz` for machines without shared storage. Returns its size in bytes."""
        return (self.folder / PACKED).write_bytes(packed(self.code))

    def noted(self, **handle: Any) -> "Job[Config]":
        """Adds to the handle and saves job.json. Returns the updated job."""
        job = dataclasses.replace(self, handle={**self.handle, **handle})
        job.save()
        return job

    def save(self) -> None:
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "folder"}
        record["launcher"] = to_plain(self.launcher)
        write_whole(self.folder / "job.json", json.dumps(record, indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> "Job":
        record = json.loads((folder / "job.json").read_text())
        launcher = OmegaConf.to_object(typed_node("launcher", record.pop("launcher")))
        assert isinstance(launcher, LauncherConfig)
        return Job(folder=folder.absolute(), launcher=launcher, **record)


@dataclass(frozen=True)
class Recipe:
    """The files that a launcher writes and the commands that it runs."""

    files: dict[str, str] = field(default_factory=dict)  # text by absolute path, or by name in the first job's folder
    commands: list[list[str]] = field(default_factory=list)

    def shown(self, folder: Path) -> str:
        texts = [f"# {folder / name}\n{text.rstrip()}" for name, text in self.files.items()]
        return "\n\n".join([*texts, *(f"$ {shlex.join(command)}" for command in self.commands)])

    def write(self, folder: Path) -> None:
        for name, text in self.files.items():
            (folder / name).write_text(text)


def job_of(config: RunConfig, overrides: list[str], folder: Path) -> Job:
    given = [o for o in overrides if not o.startswith(("task=", "launcher.dry_run="))]
    arguments = [*cli_flags(sys.argv[1:]), *given]
    return Job(folder, config.run, config.task.kind, arguments, config.launcher, sys.executable, os.getcwd())


def cli_flags(arguments: Sequence[str]) -> list[str]:
    """Returns Hydra's command-line flags, such as `--config-dir DIR`, without `--multirun`."""
    given = [a for a in arguments if a.startswith("-") or ("=" not in a and not a.startswith("~"))]
    return [a for a in given if a not in ("-m", "--multirun")]


def jobs_folder(runs: str, run: str) -> Path:
    """Returns the jobs folder: next to the checkpoints, or in ./runs if the checkpoints are in a bucket."""
    return Path("runs" if "://" in runs else runs).absolute() / run / "jobs"


def newest(jobs: Path) -> Path | None:
    numbers = [int(path.name) for path in jobs.glob("*") if path.name.isdigit()]
    return jobs / str(max(numbers)) if numbers else None


def newest_job(runs: str, run: str) -> Job | None:
    folder = newest(jobs_folder(runs, run))
    return Job.load(folder) if folder is not None and (folder / "job.json").exists() else None


def next_folder(jobs: Path) -> Path:
    last = newest(jobs)
    return jobs / str(1 if last is None else int(last.name) + 1)


def take_folder(jobs: Path) -> Path:
    """Creates the folder of the next job. Safe for concurrent submissions."""
    jobs.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder = next_folder(jobs)
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def python_path(code: Path = ROOT) -> str:
    """Returns PYTHONPATH with `code` prepended."""
    return os.pathsep.join(filter(None, [str(code.absolute()), os.environ.get("PYTHONPATH")]))


def secrets(launcher: LauncherConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the values of the variables that `launcher.env` lists by name only.

    Raises: ValueError if one is not set.
    """
    names = [entry for entry in launcher.env if "=" not in entry]
    for name in names:
        if name not in environ:
            raise ValueError(f"launcher.env=[{name}]: not set in this shell; export it or remove it from launcher.env")
    return {name: environ[name] for name in names}


def joined(count: int, index: int, coordinator: str) -> dict[str, str]:
    """Returns the variables by which JAX joins process `index` of `count`. `coordinator`: HOST:PORT of process 0."""
    if count == 1:
        return {}
    return {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }


def freeze(job: Job, config: RunConfig) -> None:
    """Writes a snapshot of the code, its git state and the resolved config to the job folder."""
    freeze_code(job.folder)
    write_whole(job.folder / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
    job.save()


def freeze_code(folder: Path) -> Path:
    """Copies the packages to `folder/code`, with the git commit and the diff to it. Returns the path of the copy."""
    code = folder / "code"
    for name in code_files(ROOT):
        target = code / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    state = git_state()
    if state is not None:
        write_whole(code / GIT_FILE, json.dumps(state, indent=2) + "\n")
        (folder / "code.patch").write_text(_patch(ROOT))
    return code


def _patch(root: Path) -> str:
    """Returns the diff to the commit; for code that is itself a snapshot, the diff saved with it."""
    if (root / GIT_FILE).exists():
        saved = root.parent / "code.patch"
        return saved.read_text() if saved.exists() else ""
    return _git(root, "diff", "HEAD", "--", *PACKAGES) or ""


def code_files(root: Path) -> list[str]:
    """Lists the package files that git does not ignore; outside a git checkout, all files except caches."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    names = [name for name in (listed or "").split("\0") if (root / name).is_file()]
    if not names:
        paths = [path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file()]
        names = [str(path.relative_to(root)) for path in paths if "__pycache__" not in path.parts]
    return sorted([*names, *(name for name in INSTALL_FILES if (root / name).is_file())])


def _git(root: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout if found.returncode == 0 else None


def packed(code: Path) -> bytes:
    """Returns the folder as a reproducible tar.gz: equal files give equal bytes."""
    import gzip

    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for path in sorted(path for path in code.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            info = tarfile.TarInfo(str(path.relative_to(code)))
            info.size, info.mode = path.stat().st_size, 0o644
            archive.addfile(info, io.BytesIO(path.read_bytes()))
    return gzip.compress(plain.getvalue(), mtime=0)


def public_name(run: str, number: int | None = None, limit: int = 50) -> str:
    """Returns a valid DNS label: lower-case letters, digits and hyphens. `number`: job number, appended."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[: limit - 4].strip("-") or "run"
    name = name if name[0].isalpha() else f"run-{name}"
    return name if number is None else f"{name}-{number}"


def assignments(variables: Mapping[str, str]) -> list[str]:
    """Returns shell-quoted NAME=VALUE words for `env` or `export`."""
    return [f"{name}={shlex.quote(value)}" for name, value in variables.items()]


def worth_another_start(code: str) -> str:
    """Returns `exit_codes.is_restartable` as a bash condition on a word such as `$code`."""
    killed = f"[ {code} -gt 128 ] && [ {code} -ne {exit_codes.INTERRUPTED} ]"
    return f"{{ [ {code} -eq {exit_codes.PREEMPTED} ] || {{ {killed}; }}; }}"


def restarted(process: str, max_restarts: int) -> list[str]:
    """Returns bash lines that run `process` and restart it per `is_restartable`, unless `$job/stop` exists.

    SIGTERM is forwarded to the process and prevents further restarts. `$code` holds the last exit code.
    """
    return [
        "restarts=0",
        """trap 'touch "$job/stop"; kill -TERM "$pid"' TERM""",
        "while true; do",
        f"  {process} &",
        '  pid=$!; echo $pid > "$job/pid"',
        "  wait $pid; code=$?",
        "  while kill -0 $pid 2> /dev/null; do wait $pid; code=$?; done  # a signal interrupts wait",
        f'  [ ! -e "$job/stop" ] && [ $restarts -lt {max_restarts} ] && {worth_another_start("$code")} || break',
        "  restarts=$((restarts + 1))",
        f'  echo "meshwright: ended with $code; restart $restarts of {max_restarts}"',
        "done",
    ]


def run_command(
    command: Sequence[str], given: str | None = None, *, shown: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a cluster command. `given`: its standard input. `shown`: print its output to this terminal.

    Raises: ValueError if the command is not installed.
    """
    try:
        return subprocess.run(command, input=given, capture_output=not shown, text=True)
    except FileNotFoundError:
        raise ValueError(f"{command[0]}: command not found; install it, the launcher requires it") from None


def check_output(command: Sequence[str], given: str | None = None) -> str:
    """Returns the output of a command. Raises: ValueError with its error output if it fails."""
    found = run_command(command, given)
    if found.returncode:
        message = found.stderr.strip() or found.stdout.strip()
        raise ValueError(f"{shlex.join(command[:4])} ... failed: {message}")
    return found.stdout.strip()
