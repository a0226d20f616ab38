"""Runs a trial as a separate `meshwright train` command with any launcher, and reads its metrics and outcome."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.schema import RunConfig
from configs.sweeps import SweepSearchConfig
from configs.tasks import TrainConfig
from launch import exit_codes
from launch.config_errors import did_you_mean
from launch.launchers.job import ROOT, cli_flags, newest_job, python_path
from launch.launchers.launcher_registry import LAUNCHERS
from launch.launchers.supervisor import exit_description, is_alive
from launch.run_folder import RunFolder, run_folder
from launch.sweeps.study import Trial
from trainer.hooks import STOPPED_EARLY
from trainer.loop import DONE

PROGRAM = (sys.executable, "-P", "-m", "launch.cli")  # -P: keeps the working directory off sys.path, as for jobs
WITH_THE_COMMAND = ("local", "ray")  # launchers whose processes end with the command that started them
PARTS = 50  # train/... metrics are averaged over windows of 1/50 of a run
STARTS = 3  # maximum number of starts of a trial that is preempted
GRACE = 600.0  # seconds for a trial of an earlier sweep to save a checkpoint and exit


class MetricReader:
    """Reads the values of one metric by step from a growing `metrics.jsonl`."""

    def __init__(self, path: Path, metric: str, num_steps: int):
        self._path, self._metric = path, metric
        self._width = max(1, num_steps // PARTS) if metric.startswith("train/") else 1
        self._file: tuple[int, int] | None = None  # inode and read offset
        self._rows: dict[int, float | None] = {}
        self.names: set[str] = set()
        self.step = 0

    def update(self) -> None:
        """Reads new rows. A file truncated by a resumed run is read again from its start."""
        try:
            with open(self._path, "rb") as file:
                found = os.fstat(file.fileno())
                inode, offset = self._file or (found.st_ino, 0)
                if inode != found.st_ino or found.st_size < offset:
                    self._rows, offset = {}, 0
                file.seek(offset)
                text = file.read()
        except FileNotFoundError:
            return
        complete = text.rfind(b"\n") + 1  # an incomplete row is read with the next update
        self._file = (found.st_ino, offset + complete)
        for line in text[:complete].splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.step = row["step"]
            self.names |= set(row) - {"step", "time"}
            if self._metric in row:
                self._rows[row["step"]] = row[self._metric]

    def reports(self) -> dict[int, float]:
        """Returns values by step; train/... metrics as means over complete windows. Skips non-finite values."""
        parts: dict[int, list[float | None]] = {}
        for step, value in self._rows.items():
            parts.setdefault(math.ceil(step / self._width) * self._width, []).append(value)
        over = {at: values for at, values in parts.items() if at <= self.step}
        return {at: sum(v) / len(v) for at, v in over.items() if None not in v}  # type: ignore[arg-type]

    def value(self) -> float | None:
        """Returns the last value; None if there is none or it is not finite."""
        if not self._rows:
            return None
        last = max(self._rows)
        values = [value for step, value in self._rows.items() if step > last - self._width]
        return None if None in values else sum(values) / len(values)  # type: ignore[arg-type]


@dataclass
class Outcome:
    """Outcome of a trial's command."""

    done: bool
    again: bool = False  # interrupted; another start resumes it
    value: float | None = None
    message: str = ""
    code: int = 0


@dataclass
class RunningTrial:
    """A running trial."""

    trial: Trial
    config: RunConfig  # composed config of the trial
    child: subprocess.Popen
    log: Path
    measured: MetricReader
    rejoined: bool  # the command only follows a job submitted by an earlier sweep
    since: float = field(default_factory=time.monotonic)
    asked: bool = False  # a stop was requested

    @property
    def seconds(self) -> float:
        return self.trial.seconds + time.monotonic() - self.since

    def stop(self) -> str:
        """Asks the trial, once, to save a checkpoint and exit. Returns a message for the user."""
        if self.asked:
            return ""
        self.asked = True
        kind = self.config.launcher.kind
        job = None if kind in WITH_THE_COMMAND else newest_job(self.config.output_dir, self.config.run)
        if job is None:
            if self.child.poll() is None:
                self.child.send_signal(signal.SIGTERM)
            return "asked to save a checkpoint and exit"
        try:
            return LAUNCHERS[kind].stop(job)
        except ValueError as error:  # the job cannot be stopped, but the command that follows it can
            self.child.send_signal(signal.SIGTERM)
            return f"not stopped: {error}"

    def outcome(self, search: SweepSearchConfig) -> Outcome:
        """Returns the outcome of a command that has ended."""
        code = self.child.wait()
        self.measured.update()
        folder = run_folder(self.config)
        if finished(folder):
            return self._measured(search)
        if self.asked or self.rejoined or code == exit_codes.PREEMPTED:
            return Outcome(False, again=True, code=code, message=exit_description(code))
        if code == 0 and not folder.config.exists():
            message = f"{folder.path} not found: run folders must be on a file system visible to the sweep"
            return Outcome(False, message=message, code=exit_codes.FAILED)
        if code == 0:
            return Outcome(False, again=True, message="was interrupted")
        killed = code < 0 or code > 128
        return Outcome(False, message=(not killed and last_words(self.log)) or exit_description(code), code=code)

    def _measured(self, search: SweepSearchConfig) -> Outcome:
        value = self.measured.value()
        if value is not None:
            return Outcome(True, value=value)
        if search.metric in self.measured.names:
            return Outcome(False, message=f"{search.metric} is not finite", code=exit_codes.FAILED)
        hint = did_you_mean(search.metric, sorted(self.measured.names))
        why = f"sweep.metric={search.metric}: the run did not log this metric{hint}"
        return Outcome(False, message=why, code=exit_codes.WRONG_INPUT)


def finished(folder: RunFolder) -> bool:
    """Returns whether a run has finished training."""
    try:
        return json.loads(folder.summary.read_text()).get("ended") in (DONE, STOPPED_EARLY)
    except (OSError, json.JSONDecodeError):
        return False


def command(arguments: Sequence[str], trial: Trial) -> list[str]:
    """Returns the arguments of a trial after `meshwright`."""
    return ["train", *cli_flags(sys.argv[1:]), *arguments, *trial.arguments, f"run={trial.run}"]


def start(
    trial: Trial,
    config: RunConfig,
    arguments: Sequence[str],
    search: SweepSearchConfig,
    *,
    log: Path,
    code: Path | None = None,
    gpus: Sequence[str] = (),
    rejoin: bool = False,
) -> RunningTrial:
    """Starts the command of a trial.

    `code`: folder with the packages to run; None: the current ones. `rejoin`: follow the cluster job submitted by an
    earlier sweep, if there is one.
    """
    words = command(arguments, trial)
    rejoin = (
        rejoin
        and config.launcher.kind not in WITH_THE_COMMAND
        and newest_job(config.output_dir, config.run) is not None
    )
    if rejoin:
        words = ["logs", f"output_dir={config.output_dir}", f"run={trial.run}", "follow=true"]
    environment = {**os.environ, "PYTHONPATH": python_path(code or ROOT)}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        child = subprocess.Popen(
            [*PROGRAM, *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches only the sweep, which stops its trials
            preexec_fn=_end_with_the_sweep if sys.platform == "linux" else None,
        )
    measured = MetricReader(run_folder(config).metrics, search.metric, num_steps(config))
    return RunningTrial(trial, config, child, log, measured, rejoined=rejoin)


def num_steps(config: RunConfig) -> int:
    assert isinstance(config.task, TrainConfig)
    return config.task.num_steps


def _end_with_the_sweep() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: SIGTERM when the sweep dies


def wait_for_orphan(trial: Trial, say: Callable[[str], None]) -> None:
    """Stops the process of a trial that outlived its sweep and waits for it to exit.

    Raises: ValueError if it does not exit within GRACE seconds.
    """
    if not is_alive(trial.process):
        return
    pid = trial.process["pid"]
    say(f"{trial.run} is still running as process {pid}; asking it to save a checkpoint and exit")
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + GRACE
    while is_alive(trial.process):
        if time.monotonic() > until:
            raise ValueError(f"run={trial.run}: its process {pid} does not exit; kill it, then repeat the command")
        time.sleep(0.2)


def last_words(log: Path) -> str:
    """Returns the last Meshwright message of a log, or else its last line."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    ours = [line.removeprefix("meshwright: ") for line in lines[-20:] if line.startswith("meshwright: ")]
    return (ours or lines or [""])[-1]


def gpu_shares(search: SweepSearchConfig, kind: str) -> list[list[str]]:
    """Returns the GPUs of each trial slot; empty lists if all trials share all GPUs.

    Raises: ValueError if there are too few GPUs.
    """
    if not search.gpus_per_trial:
        return [[] for _ in range(search.max_concurrent_trials)]
    if kind != "local":
        raise ValueError(
            f"sweep.gpus_per_trial={search.gpus_per_trial}: applies only to launcher=local; set the GPU keys of "
            f"launcher={kind} instead"
        )
    visible = visible_gpus()
    needed = search.gpus_per_trial * search.max_concurrent_trials
    if len(visible) < needed:
        raise ValueError(
            f"sweep.gpus_per_trial={search.gpus_per_trial}: {search.max_concurrent_trials} concurrent trials need "
            f"{needed} GPUs, but this machine has {len(visible)}; lower sweep.max_concurrent_trials"
        )
    share = search.gpus_per_trial
    return [visible[slot * share : (slot + 1) * share] for slot in range(search.max_concurrent_trials)]


def visible_gpus() -> list[str]:
    """Returns the IDs of the GPUs visible to child processes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device]
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(found.stdout.splitlines()) if line.startswith("GPU ")]
