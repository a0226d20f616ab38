"""Several processes of one run on this machine, joined over loopback: a cluster to try things on."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from configs.launchers import LocalConfig
from launch import exit_codes
from launch.launchers import supervisor
from launch.launchers.following import show_log
from launch.launchers.job import Job, Recipe, assignments, secrets
from launch.launchers.supervisor import Ended

GRACE_SECONDS = 10.0  # for the others, when one has died: they may wait for it in a collective for ever

status, stop = supervisor.status, supervisor.stop


def recipe(jobs: Sequence[Job]) -> Recipe:
    """One command for each process, with what it gets in its environment."""
    commands = []
    for job in jobs:
        launcher = of(job)
        for index in range(launcher.num_processes):
            settings = joined(launcher.num_processes, index, launcher.port or "PORT")
            commands.append(["env", *assignments({**job.environment(), **settings}), *job.command()])
    return Recipe(commands=commands)


def of(job: Job) -> LocalConfig:
    assert isinstance(job.launcher, LocalConfig)
    return job.launcher


def joined(count: int, index: int, port: int | str) -> dict[str, str]:
    if count == 1:
        return {}
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }


def submit(jobs: Sequence[Job], recipe: Recipe) -> int:
    """One job after the other; those of `launcher.follow=false` at once, in the background."""
    codes = []
    for job in jobs:
        if job.launcher.follow:
            codes.append(carry_out(supervisor.attached(job)))
        else:
            job = supervisor.detach(job, secrets(job.launcher, os.environ))
            print(f"run {job.run!r}: job {job.number} runs in the background, log: {job.log}")
    return max(codes, default=0)


def carry_out(job: Job) -> int:
    """Starts the processes, and again where that helps; returns the exit code.

    Process 0 has this terminal; the others write to `process_K.log` in the job's folder.
    """
    launcher = of(job)
    code = supervisor.supervise(
        lambda count: attempt(job, count),
        count=launcher.num_processes,
        max_restarts=launcher.max_restarts,
        elastic=launcher.elastic,
        saved_step=supervisor.saved_step_of(job),
        say=supervisor.say,
    )
    job.noted(code=code)
    return code


def attempt(job: Job, count: int) -> Ended:
    """Starts `count` processes and follows them to the end of the last."""
    port = of(job).port or free_port()
    children = []
    for index in range(count):
        code_first = os.pathsep.join(filter(None, [str(job.code), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, **job.environment(code_first), **joined(count, index, port)}
        output = None if index == 0 else open(process_log(job, index), "ab")  # noqa: SIM115
        children.append(subprocess.Popen(job.command(), cwd=job.workdir, env=env, stdout=output, stderr=output))
        if output is not None:
            output.close()
    return _follow(job, children)


def process_log(job: Job, index: int) -> Path:
    return job.folder / f"process_{index}.log"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _follow(job: Job, children: list[subprocess.Popen]) -> Ended:
    """Waits for all; passes signals on; stops the rest when one has failed."""
    asked = False

    def end_all() -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)  # SIGTERM alone leads all processes to the same step

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        end_all()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    first: tuple[int, int] | None = None
    try:
        stopped_at = 0.0
        while any(child.poll() is None for child in children):
            failed = {i: child.returncode for i, child in enumerate(children) if child.poll() not in (None, 0)}
            if failed and first is None:
                first, stopped_at = supervisor.first_end(failed), time.monotonic()
                if first[1] not in (exit_codes.PREEMPTED, exit_codes.WRONG_INPUT):
                    end_all()  # who is preempted or told a mistake leaves together with the others
            if first is not None and time.monotonic() - stopped_at > GRACE_SECONDS:
                for child in children:
                    child.kill()
            time.sleep(0.05)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            child.kill()
    codes = {i: code for i, child in enumerate(children) if (code := child.wait())}
    if not codes:
        return Ended(0)
    index, code = first or supervisor.first_end(codes)
    why = f"process {index} {supervisor.in_words(code)}"
    if index and code not in (exit_codes.PREEMPTED, exit_codes.WRONG_INPUT):
        why += f"; see {process_log(job, index)}"
    if code == exit_codes.FAILED or code < 0:
        supervisor.say(why)
    return Ended(code, why, asked)


def logs(job: Job, *, follow: bool) -> int:
    if not job.log.exists():
        others = sorted(job.folder.glob("process_*.log"))
        print(f"process 0 wrote to its terminal; the others to {', '.join(map(str, others)) or 'none'}")
        return 0
    return show_log(job.log, follow=follow, ended=lambda: not supervisor.alive(job))
