"""Ray launcher: recorded commands and errors. tests/end_to_end/test_ray.py uses a real cluster."""

import sys

import pytest

from launch.launchers.launcher_registry import LAUNCHERS
from tests.launch.jobs import composed, job, same_as_recorded

RAY = LAUNCHERS["ray"]
OPTIONS = [
    "launcher=ray",
    "launcher.hosts=2",
    "launcher.gpus_per_host=8",
    "launcher.env=[WANDB_API_KEY,GREETING=hello]",
]


def test_the_drivers_and_the_actors_commands_are_as_recorded():
    one = job(*OPTIONS)
    same_as_recorded("ray.txt", RAY.recipe([one]).render(one.folder) + "\n")


def test_without_ray_the_way_to_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="launcher=ray: Ray is not installed; install it with"):
        RAY.submit([job(*OPTIONS)], RAY.recipe([]))


def test_no_hosts_are_refused():
    with pytest.raises(ValueError, match=r"launcher.hosts=0: must be at least 1"):
        composed("launcher=ray", "launcher.hosts=0")
