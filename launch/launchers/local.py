"""Local launcher: multiple processes of one run on this machine, connected over the loopback interface."""

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
from launch.launchers.job import Job, Recipe, assignments, distributed_env, python_path
from launch.launchers.launcher import say
from launch.launchers.supervisor import AttemptResult, SupervisedLauncher, supervise_job


class LocalLauncher(SupervisedLauncher[LocalConfig]):
    """Runs process 0 in this terminal; the others write to `process_K.log` in the job folder."""

    def recipe(self, jobs: Sequence[Job[LocalConfig]]) -> Recipe:
        """Returns one command per process, including its environment."""
        commands = []
        for job in jobs:
            launcher = job.launcher
            for index in range(launcher.num_processes):
                settings = distributed_env(launcher.num_processes, index, f"127.0.0.1:{launcher.port or 'PORT'}")
                commands.append(["env", *assignments({**job.environment(), **settings}), *job.command()])
        return Recipe(commands=commands)

    def run(self, job: Job[LocalConfig]) -> int:
        return supervise_job(job, lambda count: attempt(job, count), job.launcher.num_processes)

    def logs(self, job: Job[LocalConfig], *, follow: bool) -> int:
        if job.log.exists():
            return super().logs(job, follow=follow)
        others = sorted(job.folder.glob("process_*.log"))
        print(
            f"process 0 printed to its terminal; logs of the other processes: {', '.join(map(str, others)) or 'none'}"
        )
        return 0


def attempt(job: Job[LocalConfig], count: int) -> AttemptResult:
    """Starts `count` processes and waits until all have ended."""
    port = job.launcher.port or free_port()
    children = []
    for index in range(count):
        env = {
            **os.environ,
            **job.environment(python_path(job.code)),
            **distributed_env(count, index, f"127.0.0.1:{port}"),
        }
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


def _follow(job: Job, children: list[subprocess.Popen]) -> AttemptResult:
    def end_all() -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)  # only SIGTERM makes all processes stop at the same step

    def kill_all() -> None:
        for child in children:
            child.kill()

    ended = supervisor.watch(lambda: [child.poll() for child in children], end_all=end_all, kill_all=kill_all)
    failed = ended.code not in (0, exit_codes.PREEMPTED, exit_codes.WRONG_INPUT)
    if failed and ended.process:
        ended = replace(ended, why=f"{ended.why}; see {process_log(job, ended.process)}")
    if ended.code == exit_codes.FAILED or ended.code < 0:
        say(ended.why)
    return ended
