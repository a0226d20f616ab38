"""SkyPilot launcher: recorded task files and commands."""

import os
import subprocess

import yaml

from launch.launchers import skypilot
from launch.launchers.job import Job
from launch.launchers.launcher_registry import LAUNCHERS, launch
from tests.launch.jobs import composed, job, same_as_recorded
from tests.launch.programs import files_with, program

SKYPILOT = LAUNCHERS["skypilot"]
OPTIONS = ["launcher=skypilot", "launcher.accelerators=H100:8", "launcher.num_nodes=2", "launcher.spot=true"]
OPTIONS += ["launcher.bucket=s3://me/runs", "launcher.env=[WANDB_API_KEY,GREETING=hello]"]
SECRET = "sentinel-1848"


def test_the_task_and_its_launch_are_as_recorded():
    one = job(*OPTIONS)
    same_as_recorded("skypilot.txt", SKYPILOT.recipe([one]).render(one.folder) + "\n")


def test_a_run_is_launched_looked_at_and_stopped_without_a_secret_in_sight(tmp_path, monkeypatch, capfd):
    calls = program(tmp_path, "sky", {"queue": "echo 1 RUNNING"})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    overrides = ["run=a", *OPTIONS]
    assert launch([(composed(*overrides), overrides)]) == 0
    one = Job.load(tmp_path / "runs" / "a" / "jobs" / "1")
    assert SKYPILOT.status(one) == "cluster a:\n1 RUNNING"
    assert "sky down a" in SKYPILOT.stop(one)
    lines = [line.split() for line in calls.read_text().splitlines()]
    assert [line[0] for line in lines] == ["launch", "logs", "queue", "cancel"]
    assert lines[0][-3:] == ["--secret", "WANDB_API_KEY", str(one.folder / "task.yaml")]
    said = capfd.readouterr()
    assert files_with(tmp_path, SECRET) == [] and SECRET not in said.out + said.err
    assert (one.code / "pyproject.toml").exists()  # installed by the setup command


def test_each_job_of_a_sweep_has_its_task_and_cluster(tmp_path, monkeypatch):
    calls = program(tmp_path, "sky")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    asked = [[f"run={name}", "launcher=skypilot"] for name in ("a", "b")]
    assert launch([(composed(*overrides), overrides) for overrides in asked]) == 0
    clusters = [line.split()[3] for line in calls.read_text().splitlines()]
    assert clusters == ["a", "b"]
    for name in clusters:
        task = yaml.safe_load((tmp_path / "runs" / name / "jobs" / "1" / "task.yaml").read_text())
        assert task["name"] == f"{name}-1" and f"runs/{name}/jobs/1/code" in task["workdir"]


def test_the_nodes_find_the_first_one_and_start_again(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\necho "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID" >> "$HOME/seen"\n'
        '[ $(wc -l < "$HOME/seen") -eq 1 ] && kill -9 $$\nexit 0\n'
    )
    python.chmod(0o755)
    run = skypilot.task(job(*OPTIONS, f"launcher.python={python}"))["run"]
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    env |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    ended = subprocess.run(["bash", "-c", run], env=env, capture_output=True, text=True)
    assert ended.returncode == 0 and "ended with 137; restart 1 of 3" in ended.stdout
    assert (tmp_path / "seen").read_text().splitlines() == ["10.0.0.1:61440 2 1"] * 2
