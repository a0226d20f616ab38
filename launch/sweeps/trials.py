"""A trial that runs: a `meshwright train` of its own, through any launcher, and what its run folder tells of it."""

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
from launch.launchers.registry import LAUNCHERS
from launch.launchers.supervisor import exit_description, is_alive
from launch.run_folder import RunFolder, run_folder
from launch.sweeps.study import Trial
from trainer.hooks import STOPPED_EARLY
from trainer.loop import DONE

PROGRAM = (sys.executable, "-P", "-m", "launch.cli")  # -P: as a job's; the working folder is no place for packages
WITH_THE_COMMAND = ("local", "ray")  # launchers whose processes end with the command that started them
PARTS = 50  # of a run: of train/... a value is the mean over one
STARTS = 3  # of a trial that is preempted without being asked
GRACE = 600.0  # seconds that the process of an earlier sweep gets to save


class Measured:
    """The values of one metric in a `metrics.jsonl` that grows, by step."""

    def __init__(self, path: Path, metric: str, num_steps: int):
        self._path, self._metric = path, metric
        self._width = max(1, num_steps // PARTS) if metric.startswith("train/") else 1
        self._file: tuple[int, int] | None = None  # which file, and how much of it was read
        self._rows: dict[int, float | None] = {}
        self.names: set[str] = set()
        self.step = 0

    def look(self) -> None:
        """Reads what has come. A file that a resumed run has cut is read anew."""
        try:
            with open(self._path, "rb") as file:
                found = os.fstat(file.fileno())
                which, at = self._file or (found.st_ino, 0)
                if which != found.st_ino or found.st_size < at:
                    self._rows, at = {}, 0
                file.seek(at)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text.rfind(b"\n") + 1  # a row that is being written is for the next look
        self._file = (found.st_ino, at + whole)
        for line in text[:whole].splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.step = row["step"]
            self.names |= set(row) - {"step", "time"}
            if self._metric in row:
                self._rows[row["step"]] = row[self._metric]

    def reports(self) -> dict[int, float]:
        """Values by step: of train/... means over parts of the run that are over; none where one is not finite."""
        parts: dict[int, list[float | None]] = {}
        for step, value in self._rows.items():
            parts.setdefault(math.ceil(step / self._width) * self._width, []).append(value)
        over = {at: values for at, values in parts.items() if at <= self.step}
        return {at: sum(v) / len(v) for at, v in over.items() if None not in v}  # type: ignore[arg-type]

    def value(self) -> float | None:
        """The last value; None where there is none, or it is not finite."""
        if not self._rows:
            return None
        last = max(self._rows)
        values = [value for step, value in self._rows.items() if step > last - self._width]
        return None if None in values else sum(values) / len(values)  # type: ignore[arg-type]


@dataclass
class Outcome:
    """How the command of a trial ended."""

    done: bool
    again: bool = False  # it was cut off: another start goes on with it
    value: float | None = None
    message: str = ""
    code: int = 0


@dataclass
class Running:
    """A trial whose command runs."""

    trial: Trial
    config: RunConfig  # its own, composed
    child: subprocess.Popen
    log: Path
    measured: Measured
    rejoined: bool  # the command only follows a job that an earlier sweep left
    since: float = field(default_factory=time.monotonic)
    asked: bool = False  # to save and end

    @property
    def seconds(self) -> float:
        return self.trial.seconds + time.monotonic() - self.since

    def stop(self) -> str:
        """Asks it to save and end, once. Returns what was done."""
        if self.asked:
            return ""
        self.asked = True
        kind = self.config.launcher.kind
        job = None if kind in WITH_THE_COMMAND else newest_job(self.config.output_dir, self.config.run)
        if job is None:
            if self.child.poll() is None:
                self.child.send_signal(signal.SIGTERM)
            return "told to save and end"
        try:
            return LAUNCHERS[kind].stop(job)
        except ValueError as error:  # the command that follows it ends all the same
            self.child.send_signal(signal.SIGTERM)
            return f"is not stopped: {error}"

    def outcome(self, search: SweepSearchConfig) -> Outcome:
        """Of a command that has ended."""
        code = self.child.wait()
        self.measured.look()
        folder = run_folder(self.config)
        if finished(folder):
            return self._measured(search)
        if self.asked or self.rejoined or code == exit_codes.PREEMPTED:
            return Outcome(False, again=True, code=code, message=exit_description(code))
        if code == 0 and not folder.config.exists():
            where = f"{folder.path} is not there: run folders must be seen from where the sweep runs"
            return Outcome(False, message=where, code=exit_codes.FAILED)
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
        why = f"sweep.metric={search.metric}: the run measured no such thing{hint}"
        return Outcome(False, message=why, code=exit_codes.WRONG_INPUT)


def finished(folder: RunFolder) -> bool:
    """Whether a run came to its end."""
    try:
        return json.loads(folder.summary.read_text()).get("ended") in (DONE, STOPPED_EARLY)
    except (OSError, json.JSONDecodeError):
        return False


def command(arguments: Sequence[str], trial: Trial) -> list[str]:
    """The words of a trial after `meshwright`."""
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
) -> Running:
    """Starts the command of a trial. `code`: the packages that run, else these.

    `rejoin`: where an earlier sweep left a job of it in a cluster, the command follows that.
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
            start_new_session=True,  # Ctrl-C is for the sweep, which tells its trials
            preexec_fn=_end_with_the_sweep if sys.platform == "linux" else None,
        )
    measured = Measured(run_folder(config).metrics, search.metric, num_steps(config))
    return Running(trial, config, child, log, measured, rejoined=rejoin)


def num_steps(config: RunConfig) -> int:
    assert isinstance(config.task, TrainConfig)
    return config.task.num_steps


def _end_with_the_sweep() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it saves and ends


def wait_for_orphan(trial: Trial, say: Callable[[str], None]) -> None:
    """Waits for the process of a trial that outlived its sweep.

    Raises: ValueError where it does not end.
    """
    if not is_alive(trial.process):
        return
    pid = trial.process["pid"]
    say(f"{trial.run} still runs, process {pid}; it is told to save and end")
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + GRACE
    while is_alive(trial.process):
        if time.monotonic() > until:
            raise ValueError(f"run={trial.run}: process {pid} of it does not end; end it, then give the command again")
        time.sleep(0.2)


def last_words(log: Path) -> str:
    """What a log says of its end: the last line of ours, else the last one."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    ours = [line.removeprefix("meshwright: ") for line in lines[-20:] if line.startswith("meshwright: ")]
    return (ours or lines or [""])[-1]


def gpu_shares(search: SweepSearchConfig, kind: str) -> list[list[str]]:
    """The GPUs of each place of a trial; empty lists where all are for all.

    Raises: ValueError where there are too few.
    """
    if not search.gpus_per_trial:
        return [[] for _ in range(search.max_concurrent_trials)]
    if kind != "local":
        raise ValueError(
            f"sweep.gpus_per_trial={search.gpus_per_trial}: is of this machine's; launcher={kind} has keys of its own"
        )
    seen = gpus_here()
    if len(seen) < search.gpus_per_trial * search.max_concurrent_trials:
        raise ValueError(
            f"sweep.gpus_per_trial={search.gpus_per_trial}: {search.max_concurrent_trials} trials at once need "
            f"{search.gpus_per_trial * search.max_concurrent_trials} GPUs, and this machine shows {len(seen)}; lower sweep.max_concurrent_trials"
        )
    share = search.gpus_per_trial
    return [seen[place * share : (place + 1) * share] for place in range(search.max_concurrent_trials)]


def gpus_here() -> list[str]:
    """Numbers of the GPUs that a process started here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device]
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(found.stdout.splitlines()) if line.startswith("GPU ")]
