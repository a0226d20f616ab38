"""Cloud TPU launcher: recorded gcloud commands and the script that runs on each worker."""

import json
import os
import subprocess

import pytest

from launch.launchers import tpu_vm
from launch.launchers.job import Job
from launch.launchers.launcher_registry import LAUNCHERS, launch
from tests.end_to_end.run import wait_for
from tests.launch.jobs import composed, job, same_as_recorded
from tests.launch.programs import files_with, program

TPU_VM = LAUNCHERS["tpu_vm"]
OPTIONS = ["launcher=tpu_vm", "launcher.accelerator=v6e-16", "launcher.runtime=v2-alpha-tpuv6e"]
OPTIONS += ["launcher.zone=us-east5-b", "launcher.spot=true", "launcher.env=[WANDB_API_KEY,GREETING=hello]"]
SECRET = "sentinel=4711 '$HOME'"


def test_the_script_and_the_commands_are_as_recorded():
    one = job(*OPTIONS, "launcher.project=mine")
    same_as_recorded("tpu_vm.txt", TPU_VM.recipe([one]).render(one.folder) + "\n")


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """A fake gcloud whose slice has two workers and becomes active once created."""
    workers = json.dumps({"networkEndpoints": [{}, {}]})
    answers = {
        "queued-resources create": f"touch {tmp_path}/made",
        "queued-resources describe": f"[ -e {tmp_path}/made ] && echo ACTIVE || {{ echo NOT_FOUND >&2; exit 1; }}",
        "tpu-vm describe": f"echo '{workers}'",
        "cat meshwright/jobs/a-1/exit_code": "echo 0",
        "|| echo running": "echo running",
    }
    calls = program(tmp_path, "gcloud", answers)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(tpu_vm, "PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    return calls


def test_every_worker_is_started_and_secrets_pass_through_its_input_alone(gcloud, tmp_path, capfd):
    overrides = ["run=a", *OPTIONS]
    assert launch([(composed(*overrides), overrides)]) == 0
    said = capfd.readouterr()
    one = Job.load(tmp_path / "runs" / "a" / "jobs" / "1")
    lines = gcloud.read_text().splitlines()
    work = f"--command=bash meshwright/{tpu_vm.place(one)}"
    started = [line for line in lines if work in line]
    assert ["--worker=0" in started[0], "--worker=1" in started[1], len(started)] == [True, True, 2]
    assert sum("queued-resources create" in line for line in lines) == 1
    assert "tail -n +1 -F log" in lines[-3]
    given = gcloud.with_name("gcloud.calls.input")
    assert given.read_text().count(f"WANDB_API_KEY={SECRET}\n") == 2
    assert files_with(tmp_path, "sentinel=4711", but=(given,)) == [] and "sentinel=4711" not in said.out + said.err
    assert TPU_VM.status(one) == "TPU a: running"
    assert "gcloud compute tpus queued-resources delete a" in TPU_VM.stop(one)


def test_a_slice_that_is_there_is_used_and_one_that_was_taken_away_is_asked_for_again(gcloud, tmp_path):
    one = job(*OPTIONS, folder=tmp_path / "1")
    (tmp_path / "made").touch()
    tpu_vm.start(one)
    assert "queued-resources create" not in gcloud.read_text()
    gcloud.unlink()
    gone = "[ -e made2 ] && echo ACTIVE || echo SUSPENDED"
    workers = json.dumps({"networkEndpoints": [{}]})
    answers = {"resources describe": gone, "resources create": "touch made2", "tpu-vm describe": f"echo '{workers}'"}
    program(tmp_path, "gcloud", answers)
    tpu_vm.start(one)
    verbs = [line.split()[3] for line in gcloud.read_text().splitlines() if "queued-resources" in line]
    assert verbs == ["describe", "delete", "create", "describe"]


def test_the_workers_script_starts_again_and_knows_the_secret(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\necho "$MESHWRIGHT_JOB $GREETING $PYTHONPATH $# $WANDB_API_KEY" >> "$HOME/seen"\n'
        '[ $(wc -l < "$HOME/seen") -eq 1 ] && exit 75\nexit 3\n'
    )
    python.chmod(0o755)
    one = job(*OPTIONS, f"launcher.python={python}")
    folder = tmp_path / "meshwright" / tpu_vm.place(one)
    folder.mkdir(parents=True)
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run(["bash", "-c", tpu_vm.script(one)], input=f"WANDB_API_KEY={SECRET}\0".encode(), env=env, check=True)
    assert wait_for((folder / "exit_code").exists, seconds=20)
    words = len(one.arguments) + 4
    assert (tmp_path / "seen").read_text().splitlines() == [f"1 hello {folder}/code {words} {SECRET}"] * 2
    assert (folder / "exit_code").read_text() == "3\n"
    assert "ended with 75; restart 1 of 3" in (folder / "log").read_text()


def test_a_stopped_worker_does_not_start_again(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\ntrap "exit 75" TERM\ntouch "$HOME/started"\nwhile true; do sleep 0.05; done\n')
    python.chmod(0o755)
    one = job(*OPTIONS, f"launcher.python={python}")
    folder = tmp_path / "meshwright" / tpu_vm.place(one)
    folder.mkdir(parents=True)
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run(["bash", "-c", tpu_vm.script(one)], input=b"", env=env, check=True)
    assert wait_for((tmp_path / "started").exists, seconds=20)
    subprocess.run(["bash", "-c", tpu_vm.stop_requested(one)], cwd=tmp_path, check=True)
    assert wait_for((folder / "exit_code").exists, seconds=20)
    assert (folder / "exit_code").read_text() == "75\n" and "restart" not in (folder / "log").read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launcher=tpu_vm"], "launcher.accelerator='': required by tpu_vm"),
        ([*OPTIONS, "launcher.reserved=true"], "launcher.spot=true: cannot be combined with launcher.reserved=true"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, said):
    with pytest.raises(ValueError) as error:
        composed(*overrides)
    assert said in str(error.value)
