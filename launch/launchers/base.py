"""What all launchers share: the calls of the tasks, following a job of a cluster, and showing a log that grows."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic

from launch import exit_codes
from launch.launchers.job import Config, Job, Recipe


class Launcher(ABC, Generic[Config]):
    """One place where jobs run. `jobs`: one, or those of a sweep."""

    shares_disk = True  # processes see this machine's disk
    local_secrets = True  # values of `launcher.env` come from this shell

    @abstractmethod
    def recipe(self, jobs: Sequence[Job[Config]]) -> Recipe:
        """What will be run; a pure function."""

    @abstractmethod
    def submit(self, jobs: Sequence[Job[Config]], recipe: Recipe) -> int:
        """Carries the recipe out and, with `follow`, stays. Returns the exit code."""

    @abstractmethod
    def status(self, job: Job[Config]) -> str:
        """One line."""

    @abstractmethod
    def logs(self, job: Job[Config], *, follow: bool) -> int:
        """Prints what the job printed. Returns the exit code."""

    @abstractmethod
    def stop(self, job: Job[Config]) -> str:
        """Asks the job to end with a checkpoint, where the place allows it. Returns what was done."""


class ClusterLauncher(Launcher[Config]):
    """A launcher whose jobs a cluster runs: they outlive this process, and the cluster is asked for their state."""

    over: tuple[str, ...]  # first words of states of jobs that have ended; the first one is success
    pause: float  # seconds between looks

    @abstractmethod
    def start(self, jobs: Sequence[Job[Config]], recipe: Recipe) -> Iterator[tuple[Job[Config], str]]:
        """Hands the jobs over. Yields each as recorded, and what it is there: `is SLURM job 17`.

        Raises: ValueError where the cluster refuses.
        """

    @abstractmethod
    def label(self, job: Job[Config]) -> str:
        """What the cluster calls the job."""

    @abstractmethod
    def state(self, job: Job[Config]) -> str:
        """As the cluster reports it, in a few words."""

    @abstractmethod
    def log_view(self, jobs: Sequence[Job[Config]]) -> Callable[[str], None]:
        """What shows new lines of the log, given the state of the first job."""

    def submit(self, jobs: Sequence[Job[Config]], recipe: Recipe) -> int:
        started = []
        for job, what in self.start(jobs, recipe):
            print(f"run {job.run!r}: job {job.number} {what}", flush=True)
            started.append(job)
        return self.follow(started) if jobs[0].launcher.follow else 0

    def follow(self, jobs: Sequence[Job[Config]]) -> int:
        """Says states as they change, and shows the log, until all jobs are over. Ctrl-C leaves them running."""
        show, said = self.log_view(jobs), [""] * len(jobs)
        try:
            while True:
                states = [self.state(job) for job in jobs]
                for job, before, state in zip(jobs, said, states, strict=True):
                    if state != before:
                        say(f"{self.label(job)}: {state}")
                said = states
                show(states[0])
                if all(map(self.is_over, states)):
                    return max(self.exit_code(job, state) for job, state in zip(jobs, states, strict=True))
                time.sleep(self.pause)
        except KeyboardInterrupt:
            return left_running(jobs)

    def is_over(self, state: str) -> bool:
        return state.startswith(self.over)

    def exit_code(self, job: Job[Config], state: str) -> int:
        """Of a job that is over."""
        return 0 if state.startswith(self.over[0]) else exit_codes.FAILED

    def status(self, job: Job[Config]) -> str:
        return f"{self.label(job)}: {self.state(job)}"


def say(text: str) -> None:
    print(f"meshwright: {text}", file=sys.stderr, flush=True)


def left_running(jobs: Sequence[Job]) -> int:
    """Says, after Ctrl-C, how to look at jobs that go on elsewhere, and how to stop them. Returns the exit code."""
    stops = "; ".join(f"meshwright stop run={job.run}" for job in jobs)
    say(f"left; the job goes on. To look: meshwright logs run={jobs[0].run} follow=true; to stop: {stops}")
    return exit_codes.INTERRUPTED


# A log that grows

LOG_PAUSE = 0.5  # seconds


class LogTail:
    """Prints what has come to a file since the last look; a file that is not there yet is empty."""

    def __init__(self, path: Path):
        self._path, self._at = path, 0

    def show(self) -> None:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                text = file.read()
        except FileNotFoundError:
            return
        self._at += len(text)
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


def show_log(path: Path, *, follow: bool, ended: Callable[[], bool]) -> int:
    """Prints the file and, with `follow`, what comes until `ended()` or Ctrl-C."""
    tail = LogTail(path)
    try:
        while True:
            last = not follow or ended()  # asked before the look: what came until the end is shown
            tail.show()
            if last:
                return 0
            time.sleep(LOG_PAUSE)
    except KeyboardInterrupt:
        return 0
