"""Supervises and restarts the processes of a job, on this machine or through Ray.

When one process is lost the others cannot continue, so all are stopped and restarted from the latest checkpoint.
"""

import os
import signal
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.launchers import LocalConfig, RayConfig
from data.object_store import Store, is_url
from launch import exit_codes
from launch.launchers.job import Config, Job, Recipe, secrets
from launch.launchers.launcher import Launcher, say, show_log
from launch.startup_timing import began

GRACE_SECONDS = 10.0  # for the other processes after one has died: they may block in a collective forever

Attempt = Callable[[int], "AttemptResult"]


@dataclass(frozen=True)
class AttemptResult:
    """Outcome of one attempt to run all processes."""

    code: int  # exit code of the process that failed first; negative: signal number
    why: str = ""
    process: int = 0  # index of that process
    asked: bool = False  # a signal requested the stop


def supervise(
    attempt: Attempt,
    *,
    count: int,
    max_restarts: int,
    elastic: bool,
    saved_step: Callable[[], int | None],
    say: Callable[[str], None],
) -> int:
    """Calls `attempt(number of processes)` until it succeeds or a restart cannot help. Returns the exit code.

    `saved_step`: returns the step of the latest checkpoint. `elastic`: halves the number of processes after two
    consecutive attempts without a new checkpoint, and again if the mesh does not divide over the reduced number.
    """
    restarts, no_progress, halved = 0, 0, False
    while True:
        before = saved_step()
        ended = attempt(count)
        indivisible = halved and count > 1 and ended.code == exit_codes.WRONG_INPUT  # mesh does not fit `count`
        if ended.asked or not (indivisible or exit_codes.is_restartable(ended.code)):
            return as_exit_code(ended.code)
        if restarts == max_restarts:
            if max_restarts:
                say(f"{ended.why}; not restarted: launcher.max_restarts={max_restarts} reached")
            return as_exit_code(ended.code)
        restarts += 1
        step = saved_step()
        no_progress = no_progress + 1 if step == before else 0
        if elastic and count > 1 and (no_progress >= 2 or indivisible):
            count, no_progress, halved = count // 2, 0, True
        say(f"{ended.why}; restart {restarts} of {max_restarts} with {processes(count)}, from step {step or 0}")


def watch(
    codes: Callable[[], list[int | None]],
    *,
    end_all: Callable[[], None],
    kill_all: Callable[[], None],
    pause: float = 0.05,
) -> AttemptResult:
    """Waits for all processes, forwards signals to them, and stops the rest when one has failed.

    `codes`: returns the exit code of each process, None while it runs. `end_all`: asks the running processes to save a
    checkpoint and exit.
    """
    asked = False

    def forward_signal(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        end_all()

    previous = {number: signal.signal(number, forward_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    first: tuple[int, int] | None = None
    kill_time = 0.0
    try:
        while True:
            found = codes()
            failed = {i: code for i, code in enumerate(found) if code}
            if failed and first is None:
                first, kill_time = first_failure(failed), time.monotonic() + GRACE_SECONDS
                if first[1] not in (exit_codes.PREEMPTED, exit_codes.WRONG_INPUT):
                    end_all()  # on preemption or wrong input all processes exit without being asked
            if None not in found:
                break
            if first is not None and time.monotonic() > kill_time:
                kill_all()
            time.sleep(pause)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        kill_all()
    if first is None:
        return AttemptResult(0)
    index, code = first
    return AttemptResult(code, f"process {index} {exit_description(code)}", index, asked)


def as_exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def exit_description(code: int) -> str:
    """Returns a description of an exit code."""
    if code == exit_codes.PREEMPTED:
        return "was preempted"
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def first_failure(codes: Mapping[int, int]) -> tuple[int, int]:
    """Returns index and exit code of the process that most likely failed first, from those found at the same time.

    Prefers processes killed by a signal: the others may exit with 1 because they lost that peer.
    """
    index = min(codes, key=lambda i: (codes[i] >= 0, codes[i] not in (exit_codes.WRONG_INPUT, exit_codes.FAILED), i))
    return index, codes[index]


def saved_step_of(job: Job) -> Callable[[], int | None]:
    checkpoints = job.folder.parents[1] / "checkpoints"
    output_dir = next((a.partition("=")[2] for a in reversed(job.arguments) if a.startswith("output_dir=")), "")
    store = Store(f"{output_dir}/{job.run}/checkpoints") if is_url(output_dir) else None

    def latest() -> int | None:
        names = store.folders() if store else [path.name for path in checkpoints.glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=None)

    return latest


def supervise_job(job: Job[LocalConfig] | Job[RayConfig], attempt: Attempt, count: int) -> int:
    """Supervises `count` processes with the job's settings. Records and returns the exit code."""
    code = supervise(
        attempt,
        count=count,
        max_restarts=job.launcher.max_restarts,
        elastic=job.launcher.elastic,
        saved_step=saved_step_of(job),
        say=say,
    )
    job.update_handle(code=code)
    return code


class SupervisedLauncher(Launcher[Config]):
    """A launcher whose jobs are supervised on this machine, by this process or a background process."""

    @abstractmethod
    def run(self, job: Job[Config]) -> int:
        """Starts the processes and restarts them on recoverable failures. Returns the exit code."""

    def submit(self, jobs: Sequence[Job[Config]], recipe: Recipe) -> int:
        """Runs the jobs one after another; with `launcher.follow=false`, concurrently in the background."""
        codes = []
        for job in jobs:
            if job.launcher.follow:
                codes.append(self.run(job.update_handle(**identity(os.getpid()))))
            else:
                detach(job, secrets(job.launcher, os.environ))
                print(f"run {job.run!r}: job {job.number} runs in the background, log: {job.log}")
        return max(codes, default=0)

    def status(self, job: Job[Config]) -> str:
        if alive(job):
            return f"running, process {job.handle['pid']} on {job.handle['host']}"
        code = job.handle.get("code")
        if code is None:
            return "ended without an exit code: the supervisor was killed or the machine restarted"
        return f"ended with {code}"

    def logs(self, job: Job[Config], *, follow: bool) -> int:
        return show_log(job.log, follow=follow, ended=lambda: not alive(job))

    def stop(self, job: Job[Config]) -> str:
        if not alive(job):
            return self.status(job)
        os.kill(job.handle["pid"], signal.SIGTERM)
        return f"asked process {job.handle['pid']} to save a checkpoint and exit"


# Background supervisors and process identity


def supervisor_command(job: Job) -> list[str]:
    return [job.python, "-P", "-m", "launch.launchers", str(job.folder)]


def detach(job: Job, variables: Mapping[str, str]) -> None:
    """Starts a supervisor of the job that keeps running after this process ends."""
    with open(job.log, "ab") as log:
        child = subprocess.Popen(
            supervisor_command(job),
            cwd=job.workdir,
            env={**os.environ, **variables, **job.environment()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    job.update_handle(**identity(child.pid))


def alive(job: Job) -> bool:
    """Returns whether the job's supervisor is running.

    Raises: ValueError if it was started on another machine.
    """
    host = job.handle.get("host")
    if host not in (None, os.uname().nodename):
        raise ValueError(f"run={job.run}: job {job.number} was started on {host}; run this command on that machine")
    return is_alive(job.handle)


def identity(pid: int) -> dict[str, Any]:
    """Returns process ID, start time and host, which identify a process even if its ID is reused."""
    return {"pid": pid, "began": began(pid), "host": os.uname().nodename}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Returns whether the process with this `identity` is still running on this machine."""
    if process.get("pid") is None or process.get("host") != os.uname().nodename:
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return began(process["pid"]) == process.get("began")
