"""Launcher interface, job monitoring for clusters and log tailing."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic

from launch import exit_codes
from launch.launchers.job import Config, Job, Recipe


class Launcher(ABC, Generic[Config]):
    """A backend that runs jobs. `jobs` holds one job, or all jobs of a sweep."""

    shares_disk = True  # the processes see the file system of this machine
    local_secrets = True  # values of `launcher.env` are read from this shell

    @abstractmethod
    def recipe(self, jobs: Sequence[Job[Config]]) -> Recipe:
        """Returns the files and commands that `submit` will use. Has no side effects."""

    @abstractmethod
    def submit(self, jobs: Sequence[Job[Config]], recipe: Recipe) -> int:
        """Executes the recipe; with `follow`, waits for the jobs. Returns the exit code."""

    @abstractmethod
    def status(self, job: Job[Config]) -> str:
        """Returns a one-line status."""

    @abstractmethod
    def logs(self, job: Job[Config], *, follow: bool) -> int:
        """Prints the job's log. Returns the exit code."""

    @abstractmethod
    def stop(self, job: Job[Config]) -> str:
        """Stops the job, after a checkpoint if the backend supports it. Returns a message for the user."""


class ClusterLauncher(Launcher[Config]):
    """Base class for cluster launchers: jobs outlive this process and their state is polled from the cluster."""

    over: tuple[str, ...]  # prefixes of final job states; the first one means success
    pause: float  # polling interval in seconds

    @abstractmethod
    def start(self, jobs: Sequence[Job[Config]], recipe: Recipe) -> Iterator[tuple[Job[Config], str]]:
        """Submits the jobs. Yields each saved job with its description, such as `is SLURM job 17`.

        Raises: ValueError if the cluster rejects a job.
        """

    @abstractmethod
    def label(self, job: Job[Config]) -> str:
        """Returns the job's name on the cluster."""

    @abstractmethod
    def state(self, job: Job[Config]) -> str:
        """Returns the state reported by the cluster as short text."""

    @abstractmethod
    def log_view(self, jobs: Sequence[Job[Config]]) -> Callable[[str], None]:
        """Returns a function that prints new log lines, given the state of the first job."""

    def submit(self, jobs: Sequence[Job[Config]], recipe: Recipe) -> int:
        started = []
        for job, description in self.start(jobs, recipe):
            print(f"run {job.run!r}: job {job.number} {description}", flush=True)
            started.append(job)
        return self.follow(started) if jobs[0].launcher.follow else 0

    def follow(self, jobs: Sequence[Job[Config]]) -> int:
        """Prints state changes and the log until all jobs have ended. Ctrl-C leaves the jobs running."""
        show, previous = self.log_view(jobs), [""] * len(jobs)
        try:
            while True:
                states = [self.state(job) for job in jobs]
                for job, before, state in zip(jobs, previous, states, strict=True):
                    if state != before:
                        say(f"{self.label(job)}: {state}")
                previous = states
                show(states[0])
                if all(map(self.is_over, states)):
                    return max(self.exit_code(job, state) for job, state in zip(jobs, states, strict=True))
                time.sleep(self.pause)
        except KeyboardInterrupt:
            return left_running(jobs)

    def is_over(self, state: str) -> bool:
        return state.startswith(self.over)

    def exit_code(self, job: Job[Config], state: str) -> int:
        """Returns the exit code of a job that has ended."""
        return 0 if state.startswith(self.over[0]) else exit_codes.FAILED

    def status(self, job: Job[Config]) -> str:
        return f"{self.label(job)}: {self.state(job)}"


def say(text: str) -> None:
    print(f"meshwright: {text}", file=sys.stderr, flush=True)


def left_running(jobs: Sequence[Job]) -> int:
    """Prints, after Ctrl-C, how to follow or stop jobs that keep running. Returns the exit code."""
    stops = "; ".join(f"meshwright stop run={job.run}" for job in jobs)
    say(f"detached; the job is still running. Follow: meshwright logs run={jobs[0].run} follow=true; stop: {stops}")
    return exit_codes.INTERRUPTED


# Log tailing

LOG_PAUSE = 0.5  # seconds


class LogTail:
    """Prints text appended to a file since the last call; a missing file counts as empty."""

    def __init__(self, path: Path):
        self._path, self._offset = path, 0

    def show(self) -> None:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        self._offset += len(text)
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


def show_log(path: Path, *, follow: bool, ended: Callable[[], bool]) -> int:
    """Prints the file; with `follow`, also new text until `ended()` or Ctrl-C."""
    tail = LogTail(path)
    try:
        while True:
            last = not follow or ended()  # checked before reading, so that all output up to the end is shown
            tail.show()
            if last:
                return 0
            time.sleep(LOG_PAUSE)
    except KeyboardInterrupt:
        return 0
