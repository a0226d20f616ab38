"""Jobs: snapshots, restarts, and secrets that must never be written to disk."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from configs.schema import GROUPS, to_plain
from launch.exit_codes import is_restartable
from launch.launchers import supervisor
from launch.launchers.job import (
    MARK,
    Job,
    cli_flags,
    code_files,
    freeze,
    jobs_folder,
    pack_code,
    public_name,
    secrets,
    take_folder,
)
from launch.launchers.launcher_registry import LAUNCHERS, launch, launches
from launch.launchers.supervisor import AttemptResult, supervise
from tests.end_to_end.run import ROOT
from tests.launch.jobs import composed, job

LOCAL = LAUNCHERS["local"]
KILLED, PREEMPTED = AttemptResult(-9, "process 1 was killed by SIGKILL"), AttemptResult(75, "process 0 was preempted")


def supervised(ends, steps=(), **settings):
    """Returns the exit code, the number of processes of each attempt, and the messages."""
    ends, steps, counts, said = iter(ends), iter(steps), [], []

    def attempt(count):
        counts.append(count)
        return next(ends)

    settings = {"count": 4, "max_restarts": 3, "elastic": False} | settings
    code = supervise(attempt, saved_step=lambda: next(steps, None), say=said.append, **settings)
    return code, counts, said


def test_a_preempted_or_killed_job_starts_again_and_says_why():
    code, counts, said = supervised([PREEMPTED, KILLED, AttemptResult(0)], steps=[None, 4, 4, 8])
    assert code == 0 and counts == [4, 4, 4]
    assert said == [
        "process 0 was preempted; restart 1 of 3 with 4 processes, from step 4",
        "process 1 was killed by SIGKILL; restart 2 of 3 with 4 processes, from step 8",
    ]


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_what_another_start_would_not_help_ends_at_once(code):
    assert supervised([AttemptResult(code)]) == (code, [4], [])


def test_a_job_that_was_told_to_end_does_not_start_again():
    assert supervised([AttemptResult(75, asked=True)])[:2] == (75, [4])


def test_restarts_are_counted_out():
    code, counts, said = supervised([KILLED] * 3, max_restarts=2)
    assert code == 128 + 9 and len(counts) == 3
    assert said[-1].endswith("not restarted: launcher.max_restarts=2 reached")


def test_an_elastic_job_goes_on_with_half_where_two_starts_gained_nothing():
    steps = [None, 4, 4, 4, 4, 4, 4, 8]
    ends = [KILLED] * 3 + [AttemptResult(0)]
    assert supervised(ends, steps, elastic=True)[1] == [4, 4, 4, 2]
    assert supervised(ends, steps)[1] == [4, 4, 4, 4]
    assert supervised([KILLED] * 6, elastic=True, max_restarts=5)[1] == [4, 4, 2, 2, 1, 1]


def test_an_elastic_job_halves_on_where_the_mesh_does_not_divide():
    ends = [KILLED, KILLED, AttemptResult(2, "process 0 ended with 2"), AttemptResult(0)]
    code, counts, said = supervised(ends, elastic=True)
    assert (code, counts) == (0, [4, 4, 2, 1]) and said[-1].startswith("process 0 ended with 2; restart 3 of 3 with 1")
    assert supervised([AttemptResult(2)], elastic=True)[:2] == (2, [4])


def test_who_was_killed_went_first_whatever_the_others_said():
    assert supervisor.first_failure({0: 1, 1: -9}) == (1, -9)
    assert supervisor.first_failure({0: 75, 1: 2}) == (1, 2)
    assert supervisor.first_failure({0: 75, 1: 75}) == (0, 75)
    assert [code for code in (0, 1, 2, 75, 130, 137, 143, -9) if is_restartable(code)] == [75, 137, 143, -9]


def test_local_processes_start_again_and_the_mark_reaches_them(tmp_path, capfd):
    python = tmp_path / "python"  # the job's interpreter; kills itself the first time
    python.write_text(f'#!/bin/sh\necho "${MARK} $GREETING" >> tries\n[ $(wc -l < tries) -gt 1 ] || kill -9 $$\n')
    python.chmod(0o755)
    one = job("launcher.max_restarts=1", "launcher.env=[GREETING=hello]", folder=tmp_path / "a" / "jobs" / "1")
    one = replace(one, python=str(python), workdir=str(tmp_path))
    one.folder.mkdir(parents=True)
    assert LOCAL.run(one) == 0
    assert (tmp_path / "tries").read_text() == "1 hello\n1 hello\n"
    assert "was killed by SIGKILL; restart 1 of 1 with 1 process, from step 0" in capfd.readouterr().err
    assert Job.load(one.folder).handle["code"] == 0


def test_an_elastic_job_on_this_machine_goes_on_with_one_process(tmp_path, capfd):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ -z "$JAX_NUM_PROCESSES" ] || kill -9 $$\n')
    python.chmod(0o755)
    options = ["launcher.num_processes=2", "launcher.max_restarts=2", "launcher.elastic=true"]
    one = replace(job(*options, folder=tmp_path / "a" / "jobs" / "1"), python=str(python), workdir=str(tmp_path))
    one.folder.mkdir(parents=True)
    assert LOCAL.run(one) == 0
    assert "restart 2 of 2 with 1 process, from step 0" in capfd.readouterr().err


def test_a_job_freezes_the_code_the_commit_and_the_config(tmp_path):
    config = composed("run=a", f"output_dir={tmp_path}", "launcher.num_processes=2")
    folder = take_folder(jobs_folder(config.output_dir, config.run))
    one = Job(folder, "a", "train", ["run=a"], config.launcher, sys.executable, str(tmp_path), {"pid": 7})
    freeze(one, config)
    assert folder == tmp_path / "a" / "jobs" / "1" and take_folder(folder.parent).name == "2"
    assert Job.load(folder) == one
    assert yaml.safe_load((folder / "config.yaml").read_text()) == to_plain(config)
    for name in code_files(ROOT):
        assert (folder / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(folder.rglob("*.pyc"))
    assert pack_code(folder / "code") == pack_code(folder / "code")
    # The snapshot runs, even when started from the checkout, and knows its commit.
    seen = subprocess.run(
        [sys.executable, "-P", "-c", "import launch.run_folder as r; print(r.__file__, r.git_state())"],
        cwd=ROOT, env=os.environ | one.environment(), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert seen.startswith(str(folder / "code"))
    if (folder / "code" / "git.json").exists():
        assert str(json.loads((folder / "code" / "git.json").read_text())) in seen


def test_a_dry_run_of_every_launcher_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_KEY", "sentinel-5150")
    for kind in LAUNCHERS:
        overrides = ["run=a", f"launcher={kind}", "launcher.dry_run=true", *NEEDS.get(kind, [])]
        overrides += ["launcher.env=[SECRET_KEY,PLAIN=seen]"]
        assert launch([(composed(*overrides), overrides)]) == 0
        shown = capsys.readouterr().out
        assert "launch.cli" in shown and "PLAIN" in shown and "sentinel" not in shown, kind
        assert "launcher.dry_run" not in shown, "the commands shown are those that would run"
    assert list(tmp_path.iterdir()) == []


NEEDS = {
    "k8s": ["launcher.image=me/meshwright", "launcher.secret=keys"],
    "tpu_vm": ["launcher.accelerator=v6e-16", "launcher.runtime=v2-alpha-tpuv6e", "launcher.zone=us-east5-b"],
}


def test_every_launcher_has_its_settings_and_all_that_the_tasks_call():
    assert set(LAUNCHERS) == set(GROUPS["launcher"])
    for kind, launcher in LAUNCHERS.items():
        for name in ("recipe", "submit", "status", "logs", "stop"):
            assert callable(getattr(launcher, name)), (kind, name)


def test_only_what_asks_for_a_job_launches_one(monkeypatch):
    assert not launches(composed())
    assert launches(composed("launcher.num_processes=2")) and launches(composed("launcher.max_restarts=1"))
    assert not launches(composed("task=plan", "launcher.num_processes=2"))
    monkeypatch.setenv(MARK, "1")
    assert not launches(composed("launcher.num_processes=2"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("launcher.env=[WANDB_API_KEY=abc123]", "give only the name: launcher.env=[WANDB_API_KEY]"),
        ("launcher.env=[a b]", "not a valid environment variable name"),
        ("launcher.max_restarts=-1", "launcher.max_restarts=-1: must be at least 0"),
    ],
)
def test_a_wrong_launcher_is_refused_without_telling_a_secret(override, said):
    with pytest.raises(ValueError) as error:
        composed(override)
    assert said in str(error.value) and "abc123" not in str(error.value)


def test_a_variable_that_is_not_set_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["run=a", "launcher.num_processes=2", "launcher.env=[NOT_SET_KEY]"]
    with pytest.raises(ValueError, match=r"launcher.env=\[NOT_SET_KEY\]: not set in this shell"):
        launch([(composed(*overrides), overrides)])
    assert list(tmp_path.iterdir()) == []
    assert secrets(composed("launcher.env=[A,B=2]").launcher, {"A": "1", "C": "3"}) == {"A": "1"}


def test_jobs_of_a_sweep_need_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = composed("run=a", "launcher.num_processes=2")
    with pytest.raises(ValueError, match="run=a: several jobs of the sweep have this name"):
        launch([(config, []), (config, [])])


def test_flags_of_hydra_go_along_but_not_the_one_that_sweeps():
    line = ["model=tiny", "-m", "--config-dir", "mine", "--config-name=x", "~schedule", "+a=1"]
    assert cli_flags(line) == ["--config-dir", "mine", "--config-name=x"]


def test_names_for_clusters_are_those_of_dns():
    assert public_name("Big_Run.v2", 3) == "big-run-v2-3"
    assert public_name("7b", 1) == "run-7b-1" and len(public_name("x" * 99, 12)) <= 50


def test_a_supervisor_is_known_by_more_than_its_number(tmp_path):
    tmp_path = tmp_path / "1"
    tmp_path.mkdir()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    one = job(folder=tmp_path).update_handle(pid=child.pid, began=supervisor.began(child.pid), host=os.uname().nodename)
    assert supervisor.alive(one) and "running" in LOCAL.status(one)
    assert "asked process" in LOCAL.stop(one)
    assert child.wait() == -signal.SIGTERM
    assert not supervisor.alive(one) and "ended without an exit code" in LOCAL.status(one)
    another = one.update_handle(pid=os.getpid())  # the process ID was reused
    assert not supervisor.alive(another)
    with pytest.raises(ValueError, match="was started on elsewhere"):
        LOCAL.stop(one.update_handle(host="elsewhere"))
