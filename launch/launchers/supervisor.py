"""Starting the processes of a job again, where this process sees them all: on this machine, or through Ray.

When one is lost the others cannot go on without it, so all end and all begin again, from the newest checkpoint.
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
from launch.launchers.base import Launcher, say, show_log
from launch.launchers.job import Config, Job, Recipe, secrets
from launch.startup_timing import began

GRACE_SECONDS = 10.0  # for the others, when one has died: they may wait for it in a collective for ever

Attempt = Callable[[int], "Ended"]


@dataclass(frozen=True)
class Ended:
    """How one start of all processes ended."""

    code: int  # of the process that went first; below 0: by this signal
    why: str = ""
    process: int = 0  # which one that was
    asked: bool = False  # somebody wanted it to end


def supervise(
    attempt: Attempt,
    *,
    count: int,
    max_restarts: int,
    elastic: bool,
    saved_step: Callable[[], int | None],
    say: Callable[[str], None],
) -> int:
    """Calls `attempt(number of processes)` until it ends well, or another start makes no sense. Returns the exit code.

    `saved_step`: of the newest checkpoint. `elastic`: two ends in a row that brought no newer one halve the number, and
    again where the run's mesh cannot do with that.
    """
    restarts, in_vain, halved = 0, 0, False
    while True:
        before = saved_step()
        ended = attempt(count)
        too_few = halved and count > 1 and ended.code == exit_codes.WRONG_INPUT  # the mesh does not divide
        if ended.asked or not (too_few or exit_codes.is_restartable(ended.code)):
            return as_exit_code(ended.code)
        if restarts == max_restarts:
            if max_restarts:
                say(f"{ended.why}; not restarted: launcher.max_restarts={max_restarts} is used up")
            return as_exit_code(ended.code)
        restarts += 1
        step = saved_step()
        in_vain = in_vain + 1 if step == before else 0
        if elastic and count > 1 and (in_vain >= 2 or too_few):
            count, in_vain, halved = count // 2, 0, True
        place = "the beginning" if step is None else f"step {step}"
        say(f"{ended.why}; restart {restarts} of {max_restarts} with {processes(count)}, from {place}")


def watch(
    codes: Callable[[], list[int | None]],
    *,
    end_all: Callable[[], None],
    kill_all: Callable[[], None],
    pause: float = 0.05,
) -> Ended:
    """Waits for all processes; passes signals on; stops the rest when one has failed.

    `codes`: how each process ended, None while it runs. `end_all` tells those that run to save and end.
    """
    asked = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        end_all()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    first: tuple[int, int] | None = None
    killed_at = 0.0
    try:
        while True:
            found = codes()
            failed = {i: code for i, code in enumerate(found) if code}
            if failed and first is None:
                first, killed_at = first_end(failed), time.monotonic() + GRACE_SECONDS
                if first[1] not in (exit_codes.PREEMPTED, exit_codes.WRONG_INPUT):
                    end_all()  # who is preempted or told a mistake leaves together with the others
            if None not in found:
                break
            if first is not None and time.monotonic() > killed_at:
                kill_all()
            time.sleep(pause)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        kill_all()
    if first is None:
        return Ended(0)
    index, code = first
    return Ended(code, f"process {index} {in_words(code)}", index, asked)


def as_exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def in_words(code: int) -> str:
    """How a process ended, by its code."""
    if code == exit_codes.PREEMPTED:
        return "was preempted"
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def first_end(codes: Mapping[int, int]) -> tuple[int, int]:
    """Of processes that were found ended at once, badly: whose end led to the others', and its code.

    Who was killed could say nothing, and those who say 1 may have missed it.
    """
    index = min(codes, key=lambda i: (codes[i] >= 0, codes[i] not in (exit_codes.WRONG_INPUT, exit_codes.FAILED), i))
    return index, codes[index]


def saved_step_of(job: Job) -> Callable[[], int | None]:
    checkpoints = job.folder.parents[1] / "checkpoints"
    runs = next((a.partition("=")[2] for a in reversed(job.arguments) if a.startswith("output_dir=")), "")
    store = Store(f"{runs}/{job.run}/checkpoints") if is_url(runs) else None

    def newest() -> int | None:
        names = store.folders() if store else [path.name for path in checkpoints.glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=None)

    return newest


def supervise_job(job: Job[LocalConfig] | Job[RayConfig], attempt: Attempt, count: int) -> int:
    """Supervises `count` processes as the job's settings say, and records the exit code, which it returns."""
    code = supervise(
        attempt,
        count=count,
        max_restarts=job.launcher.max_restarts,
        elastic=job.launcher.elastic,
        saved_step=saved_step_of(job),
        say=say,
    )
    job.noted(code=code)
    return code


class SupervisedLauncher(Launcher[Config]):
    """A launcher whose jobs have a supervisor on this machine: this process, or one in the background."""

    @abstractmethod
    def carry_out(self, job: Job[Config]) -> int:
        """Starts the processes, and again where that helps; returns the exit code."""

    def submit(self, jobs: Sequence[Job[Config]], recipe: Recipe) -> int:
        """One job after the other in this process; those of `launcher.follow=false` at once, in the background."""
        codes = []
        for job in jobs:
            if job.launcher.follow:
                codes.append(self.carry_out(job.noted(**identity(os.getpid()))))
            else:
                detach(job, secrets(job.launcher, os.environ))
                print(f"run {job.run!r}: job {job.number} runs in the background, log: {job.log}")
        return max(codes, default=0)

    def status(self, job: Job[Config]) -> str:
        if alive(job):
            return f"running, process {job.handle['pid']} on {job.handle['host']}"
        code = job.handle.get("code")
        return "ended without a word: killed, or the machine was" if code is None else f"ended with {code}"

    def logs(self, job: Job[Config], *, follow: bool) -> int:
        return show_log(job.log, follow=follow, ended=lambda: not alive(job))

    def stop(self, job: Job[Config]) -> str:
        if not alive(job):
            return self.status(job)
        os.kill(job.handle["pid"], signal.SIGTERM)
        return f"told process {job.handle['pid']} to save and end"


# A supervisor in the background, and how a process is found again


def supervisor_command(job: Job) -> list[str]:
    return [job.python, "-P", "-m", "launch.launchers", str(job.folder)]


def detach(job: Job, variables: Mapping[str, str]) -> None:
    """Starts a supervisor for the job that outlives this process."""
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
    job.noted(**identity(child.pid))


def alive(job: Job) -> bool:
    """Whether the supervisor still runs.

    Raises: ValueError where it is on another machine.
    """
    host = job.handle.get("host")
    if host not in (None, os.uname().nodename):
        raise ValueError(f"run={job.run}: its job {job.number} was started on {host}; ask there")
    return is_alive(job.handle)


def identity(pid: int) -> dict[str, Any]:
    """A process, so that it is known again."""
    return {"pid": pid, "began": began(pid), "host": os.uname().nodename}


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether a process of this machine is still the same one."""
    if process.get("pid") is None or process.get("host") != os.uname().nodename:
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return began(process["pid"]) == process.get("began")
