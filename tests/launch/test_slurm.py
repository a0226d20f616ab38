"""SLURM launcher: recorded scripts and parsed states. tests/end_to_end/test_slurm.py uses a real SLURM."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.launchers import slurm
from launch.launchers.launcher_registry import LAUNCHERS, launch
from tests.launch.jobs import composed, job, same_as_recorded

OPTIONS = ["launcher=slurm", "launcher.nodes=4", "launcher.gpus_per_node=8", "launcher.time=12:00:00"]
OPTIONS += ["launcher.partition=main", "launcher.options=[--exclusive]", "launcher.env=[WANDB_API_KEY,NCCL_DEBUG=INFO]"]


def shown(*jobs):
    return LAUNCHERS["slurm"].recipe(jobs).render(jobs[0].folder) + "\n"


def test_the_script_and_its_submission_are_as_recorded():
    same_as_recorded("slurm.txt", shown(job(*OPTIONS)))


def test_a_sweep_is_one_array_as_recorded():
    first = job(*OPTIONS, "launcher.array_limit=2")
    second = replace(first, run="b", folder=Path("/home/me/runs/b/jobs/4"), arguments=["run=b", "prompt='a b'"])
    same_as_recorded("slurm_array.txt", shown(first, second))


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_images_see_the_run_folders_and_the_environment(runtime):
    image = ["launcher.image=/images/mw.sqsh", f"launcher.runtime={runtime}", "launcher.mounts=[/data:/data]"]
    same_as_recorded(f"slurm_{runtime}.txt", shown(job(*OPTIONS, *image)))


@pytest.mark.parametrize("overrides", [[], ["launcher.image=a b.sif", "launcher.runtime=apptainer"]])
def test_the_script_is_bash(tmp_path, overrides):
    prompt = ["task=generate", "task.prompt='it is $HOME and \"more\"'"]
    one = job("launcher=slurm", *overrides, *prompt, folder=tmp_path / "a b" / "jobs" / "1")
    for jobs in ([one], [one, one]):
        checked = subprocess.run(["bash", "-n"], input=slurm.script(jobs), text=True, capture_output=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr


RUNNING, CANCELLED = "JobState=RUNNING", "JobState=CANCELLED"
ENDS = [  # exit code, earlier restarts, state, stop requested: requeued, recorded exit code
    (0, 0, RUNNING, False, False, "0"),
    (75, 0, RUNNING, False, True, None),
    (137, 2, RUNNING, False, True, None),
    (75, 3, RUNNING, False, False, "75"),
    (75, 0, RUNNING, True, False, "75"),
    (75, 0, CANCELLED, False, False, "75"),
    (1, 0, RUNNING, False, False, "1"),
    (2, 0, RUNNING, False, False, "2"),
    (130, 0, RUNNING, False, False, "130"),
    (0, 4, RUNNING, False, False, "1"),
]


@pytest.mark.parametrize(("code", "restarts", "state", "stop", "again", "noted"), ENDS)
def test_the_script_is_queued_again_where_that_helps(tmp_path, code, restarts, state, stop, again, noted):
    one = job("launcher=slurm", folder=tmp_path / "1")
    one.folder.mkdir()
    if stop:
        (one.folder / slurm.STOP).touch()
    for name, body in {
        "srun": f"exit {code}",
        "scontrol": f'echo {state}; [ $1 = show ] || echo "$@" > {tmp_path}/asked',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    subprocess.run(["bash"], input=slurm.script([one]), text=True, env=env)
    asked, file = tmp_path / "asked", one.folder / slurm.EXIT_CODE
    assert asked.exists() == again and (not again or asked.read_text() == "requeue 17\n")
    assert (file.read_text().strip() if file.exists() else None) == noted


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("JobId=7 JobState=PENDING Reason=Resources Restarts=0 NodeList=", "PENDING (Resources)"),
        ("JobId=7 JobState=RUNNING Reason=None Restarts=2 NodeList=n[1,3]", "RUNNING on n[1,3], restart 2"),
        ("JobId=7 JobState=COMPLETED Restarts=0 ExitCode=0:0", "COMPLETED"),
    ],
)
def test_states_are_told_in_a_few_words(line, said):
    assert slurm.state_text(line) == said


def test_without_slurm_the_reason_is_said_and_no_job_is_left(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    overrides = ["run=a", "launcher=slurm"]
    with pytest.raises(ValueError, match="sbatch: command not found; install it"):
        launch([(composed(*overrides), overrides)])
    assert list((tmp_path / "runs" / "a" / "jobs").iterdir()) == []


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match=r"launcher.nodes=0: must be at least 1"):
        composed("launcher=slurm", "launcher.nodes=0")
