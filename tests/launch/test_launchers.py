"""Launcher base classes: following cluster jobs and tailing logs."""

from collections.abc import Callable

import pytest

from launch import exit_codes
from launch.launchers.job import Recipe
from launch.launchers.launcher import ClusterLauncher, show_log
from tests.launch.jobs import job


class Scripted(ClusterLauncher):
    """A cluster whose jobs go through the given states; exceptions among them are raised."""

    over, pause = ("done", "failed"), 0.0

    def __init__(self, *states):
        self.states, self.shown = list(states), []

    def recipe(self, jobs):
        return Recipe()

    def start(self, jobs, recipe):
        for one in jobs:
            yield one, f"is the {self.label(one)}"

    def label(self, job):
        return f"thing {job.number}"

    def state(self, job):
        state = self.states.pop(0)
        if isinstance(state, BaseException):
            raise state
        return state

    def log_view(self, jobs) -> Callable[[str], None]:
        return self.shown.append

    def logs(self, job, *, follow):
        return 0

    def stop(self, job):
        return ""


@pytest.mark.parametrize(("end", "code"), [("done", 0), ("failed (why)", exit_codes.FAILED)])
def test_a_job_is_followed_to_its_end_and_each_state_is_said_once(end, code, capsys):
    launcher = Scripted("waits", "waits", "runs", end)
    assert launcher.submit([job()], Recipe()) == code
    said = capsys.readouterr()
    assert said.out == "run 'a': job 1 is the thing 1\n"
    assert said.err.splitlines() == [f"meshwright: thing 1: {state}" for state in ("waits", "runs", end)]
    assert launcher.shown == ["waits", "waits", "runs", end]


def test_ctrl_c_leaves_a_job_of_a_cluster_running(capsys):
    assert Scripted("runs", KeyboardInterrupt()).submit([job()], Recipe()) == exit_codes.INTERRUPTED
    assert "detached; the job is still running" in capsys.readouterr().err


def test_without_follow_a_job_is_only_handed_over():
    assert Scripted().submit([job("launcher.follow=false")], Recipe()) == 0


def test_a_log_is_shown_up_to_what_came_before_the_end(tmp_path, capsys):
    log, looks = tmp_path / "log", iter([False, True])

    def ended() -> bool:
        with log.open("a") as file:
            file.write("more\n")
        return next(looks)

    assert show_log(log, follow=False, ended=ended) == 0 and capsys.readouterr().out == ""
    assert show_log(log, follow=True, ended=ended) == 0
    assert capsys.readouterr().out == "more\nmore\n"
