"""Several processes of one run on this machine, joined over loopback: a cluster to try things on."""

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configs.launchers import LocalConfig
from launch import exit_codes
from launch.launchers import supervisor
from launch.launchers.following import show_log
from launch.launchers.job import Job, Recipe, assignments, joined
from launch.launchers.supervisor import Ended

status, stop = supervisor.status, supervisor.stop


def recipe(jobs: Sequence[Job]) -> Recipe:
    """One command for each process, with what it gets in its environment."""
    commands = []
    for job in jobs:
        launcher = of(job)
        for index in range(launcher.num_processes):
            settings = joined(launcher.num_processes, index, f"127.0.0.1:{launcher.port or 'PORT'}")
            commands.append(["env", *assignments({**job.environment(), **settings}), *job.command()])
    return Recipe(commands=commands)


def of(job: Job) -> LocalConfig:
    assert isinstance(job.launcher, LocalConfig)
    return job.launcher


def submit(jobs: Sequence[Job], recipe: Recipe) -> int:
    return supervisor.submit_each(jobs, carry_out)


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
        env = {**os.environ, **job.environment(code_first), **joined(count, index, f"127.0.0.1:{port}")}
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
    def end_all() -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)  # SIGTERM alone leads all processes to the same step

    def kill_all() -> None:
        for child in children:
            child.kill()

    ended = supervisor.watch(lambda: [child.poll() for child in children], end_all=end_all, kill_all=kill_all)
    told = ended.code not in (0, exit_codes.PREEMPTED, exit_codes.WRONG_INPUT)
    if told and ended.process:
        ended = replace(ended, why=f"{ended.why}; see {process_log(job, ended.process)}")
    if ended.code == exit_codes.FAILED or ended.code < 0:
        supervisor.say(ended.why)
    return ended


def logs(job: Job, *, follow: bool) -> int:
    if not job.log.exists():
        others = sorted(job.folder.glob("process_*.log"))
        print(f"process 0 wrote to its terminal; the others to {', '.join(map(str, others)) or 'none'}")
        return 0
    return show_log(job.log, follow=follow, ended=lambda: not supervisor.alive(job))
