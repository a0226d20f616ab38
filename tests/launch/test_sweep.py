"""The sweep command: starts and outcomes of trials, invalid input, and exact resumption."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.sweeps import SweepSearchConfig
from launch.cli import run
from launch.launchers.supervisor import identity
from launch.sweeps import trials
from launch.sweeps.study import DONE, FAILED, PRUNED, Trial
from launch.sweeps.trials import MetricReader, RunningTrial, command, gpu_shares, start
from launch.tasks.sweep import check_launcher, read_definition, refuse_drift, wandb_groups
from tests.launch import sweeps
from tests.launch.jobs import composed, job
from tests.launch.programs import program
from trainer.tracker import read_rows

RATE, LAYERS = "optimizer.learning_rate", "model.num_layers"
# Trials are forked from a worker in which other tests have used JAX, and call exec immediately.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

TINY = ["model=tiny", "schedule=constant", "schedule.warmup_steps=0", "task.num_steps=6", "sweep.seed=1"]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Runs trials with the substitute program. Returns the folder of runs."""
    monkeypatch.setattr(trials, "PROGRAM", (sys.executable, sweeps.__file__))
    monkeypatch.setattr("launch.sweeps.runner.PAUSE", 0.02)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def swept(*arguments: str) -> int:
    return run(["sweep", *TINY, "output_dir=runs", *arguments])


def results(runs: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (runs / "sweeps" / name / "results.jsonl").read_text().splitlines()]


MISTAKES = {
    "a misspelt key": (["optimizer.lerning_rate=log:1e-4..1e-2"], "did you mean 'optimizer.learning_rate'"),
    "a misspelt value": (["optimizer=adamw,moun"], "optimizer=moun: no such optimizer; did you mean 'muon'"),
    "a value of another type": ([f"{LAYERS}=2,many"], "model.num_layers=many: must be an integer"),
    "a key of some choices alone": (
        ["optimizer=adamw,sgd", "optimizer.b2=0.9,0.99"],
        "optimizer.b2: no such key",
    ),
    "a schedule that does not fit": (["seed=1,2", "schedule=wsd", "schedule.decay_fraction=3"], "decay_fraction=3"),
    "nothing that varies": ([], "sweep: no key varies"),
    "a key given twice": (["seed=1,2", "++seed=3"], "seed: set to one value and also varied by the sweep"),
    "pruning without evaluations": (["seed=1,2", "sweep.pruning=median"], "set task.eval_every=N below task.num_steps"),
    "runs in a bucket": (["seed=1,2", "output_dir=s3://a/b"], "output_dir=s3://a/b: a sweep needs local run folders"),
    "a misspelt key of the sweep": (["seed=1,2", "sweep.trails=3"], "did you mean 'sweep.trials'"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named_before_anything_starts(quick, capfd, arguments, said):
    assert swept(*arguments) == 2
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err
    assert not quick.exists()


def test_trials_run_and_the_best_is_printed(quick, capfd):
    assert swept("run=a", f"{RATE}=1e-4,1e-2,1e-1", "sweep.max_concurrent_trials=2") == 0
    rows = results(quick, "a")
    assert [row["value"] for row in rows] == [4 + 1 / 6, 1 / 6, 1 + 1 / 6]
    assert [row["state"] for row in rows] == [DONE] * 3
    out = capfd.readouterr().out
    assert "best: a-001, eval/loss 0.16667" in out
    assert out.index("a-001  ") < out.index("a-002  ") < out.index("a-000  ")  # the table, best first
    assert f"output_dir=runs {RATE}=0.01 run=a-best" in out
    assert (quick / "sweeps" / "a" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert not (quick / "sweeps" / "a" / "process.json").exists()


def test_a_sweep_that_is_told_to_end_saves_and_goes_on_as_if_nothing_had_been(quick, capfd, monkeypatch):
    given = (f"{RATE}=log:1e-5..1", f"{LAYERS}=1,2", "sweep.trials=3", "sweep.method=tpe")
    assert swept("run=whole", *given) == 0
    monkeypatch.setenv("SECONDS_OF_A_STEP", "0.05")

    def tell() -> None:
        cut = quick / "cut-001" / "metrics.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (cut.exists() and len(cut.read_text().splitlines()) >= 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    assert swept("run=cut", *given) == 75
    teller.join()
    assert "stopped with 1 of 3 trials ended; run the same command to resume" in capfd.readouterr().err
    assert len((quick / "cut-001" / "metrics.jsonl").read_text().splitlines()) < 6
    monkeypatch.delenv("SECONDS_OF_A_STEP")
    assert swept("run=cut", *given) == 0
    same = lambda name: [(row["params"], row["value"], row["state"]) for row in results(quick, name)]
    assert same("cut") == same("whole")
    assert (quick / "cut-001" / "starts").read_text() == "start\n" * 2
    assert [row["step"] for row in read_rows(quick / "cut-001" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_would_not_compare_is_refused():
    begun = {"parameters": {RATE: "log:1e-5..1"}, "method": "random", "seed": 0, "arguments": ["model=tiny", "seed=1"]}
    for change, said in {
        ("method", "tpe"): "sweep.method=tpe: the sweep 'a' was started with sweep.method=random",
        ("parameters", RATE): f"{RATE}=2,4: the sweep 'a' was started with {RATE}=log:1e-5..1",
        ("parameters", LAYERS): f"{LAYERS}=2,4: the sweep 'a' was started without it",
        ("arguments", "seed=2"): "seed=2: the sweep 'a' was started with seed=1",
        ("arguments", None): "seed is not given: the sweep 'a' was started with seed=1",
    }.items():
        key, value = change
        now = dict(begun)
        now[key] = value
        if key == "parameters":
            now[key] = {**begun["parameters"], value: "2,4"}
        if key == "arguments":
            now[key] = ["model=tiny", *([value] if value else [])]
        with pytest.raises(
            ValueError, match="would not be comparable; restore that value, or start another"
        ) as refused:
            refuse_drift(begun, now, "a")
        assert said in str(refused.value)
    refuse_drift(begun, dict(begun), "a")


def test_a_sweep_of_an_older_version_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text('{"over": {}, "goal": "min"}')
    with pytest.raises(ValueError, match=r"sweep\.json was written by an older version.*start another sweep"):
        read_definition(tmp_path)


def test_a_sweep_gets_more_trials_but_no_others(quick, capfd):
    given = ["run=a", f"{RATE}=log:1e-5..1", "sweep.method=random"]
    assert swept(*given, "sweep.trials=2") == 0
    before = results(quick, "a")
    assert swept(*given, "sweep.trials=2", "task.num_steps=7") == 2
    assert "task.num_steps=7: the sweep 'a' was started with task.num_steps=6" in capfd.readouterr().err
    assert swept(*given, "sweep.trials=3", "sweep.max_concurrent_trials=2", "launcher.max_restarts=0") == 0
    after = results(quick, "a")
    compared = lambda rows: [(row["params"], row["value"], row["seconds"]) for row in rows]
    assert len(after) == 3 and compared(after[:2]) == compared(before)


def test_a_run_of_something_else_is_left_alone(quick, capfd):
    (quick / "a-000").mkdir(parents=True)
    assert swept("run=a", "seed=1,2") == 2
    assert "choose another name with run=NAME" in capfd.readouterr().err


def test_two_processes_do_not_carry_out_one_sweep(quick, capfd):
    folder = quick / "sweeps" / "a"
    folder.mkdir(parents=True)
    (folder / "process.json").write_text(json.dumps(identity(os.getppid())))
    assert swept("run=a", "seed=1,2") == 2
    assert f"process {os.getppid()} already runs this sweep" in capfd.readouterr().err


def test_a_trial_may_fail_or_be_preempted_and_the_others_go_on(quick, capfd):
    given = ("run=a", f"{RATE}=1e-2", f"{LAYERS}=1,3,5,6,2", "sweep.max_concurrent_trials=2")
    assert swept(*given) == 0
    rows = results(quick, "a")
    assert [row["state"] for row in rows] == [DONE, FAILED, DONE, FAILED, DONE]
    assert rows[1]["message"] == "model.num_layers=3: is not wanted here"
    assert rows[3]["message"] == "eval/loss is not finite"
    assert "a-001 failed: model.num_layers=3: is not wanted here; log:" in capfd.readouterr().out
    assert (quick / "a-002" / "starts").read_text() == "start\n" * 2  # preempted once
    assert swept(*given, "sweep.retry_failed=true") == 0
    again = results(quick, "a")
    assert again[:5] == rows and [row["params"] for row in again[5:]] == [rows[1]["params"], rows[3]["params"]]


def test_values_that_do_not_go_together_are_a_failed_trial(quick):
    varied = ["model.attention.num_heads=4,6", "model.attention.num_kv_heads=2,4"]  # each right with the other's first
    given = ["model=tiny", "output_dir=runs", "run=a", "schedule=constant", "task.num_steps=6", f"{RATE}=1e-2", *varied]
    assert run(["sweep", *given]) == 0
    rows = results(quick, "a")
    assert [row["state"] for row in rows] == [DONE, DONE, DONE, FAILED]
    assert rows[3]["message"].startswith("model.attention.num_kv_heads=4: ")


def test_a_wrong_command_ends_a_sweep_at_its_first_trial_and_the_same_goes_on_with_the_others(quick, capfd):
    assert swept("run=a", f"{RATE}=1e-2", f"{LAYERS}=4,1,2") == 2
    assert "sweep stopped: the first trial failed, a-000 with: model.num_layers=4: is not" in capfd.readouterr().err
    assert [row["state"] for row in results(quick, "a")] == [FAILED]
    assert swept("run=a", f"{RATE}=1e-2", f"{LAYERS}=4,1,2") == 0


def test_a_sweep_of_which_nothing_succeeds_ends_soon(quick, capfd):
    assert swept("run=a", f"{LAYERS}=3,6", f"{RATE}=1e-2,1e-3,1e-4,1e-5") == 1
    assert "sweep stopped: the first 3 trials failed" in capfd.readouterr().err
    assert [row["state"] for row in results(quick, "a")] == [FAILED] * 3


def test_a_metric_that_no_run_measures_is_named(quick, capfd):
    assert swept("run=a", f"{RATE}=1e-2,1e-3", "sweep.metric=eval/los") == 2
    assert "sweep.metric=eval/los: the run did not log this metric; did you mean 'eval/loss'" in capfd.readouterr().err


def test_trials_that_promise_nothing_are_pruned(quick, monkeypatch):
    monkeypatch.setenv("SECONDS_OF_A_STEP", "0.05")
    given = [f"{RATE}=1e-2,2e-2,5e-3,1e-5", "task.num_steps=20", "task.eval_every=1"]
    assert swept("run=a", *given, "sweep.pruning=median", "sweep.warmup_steps=4") == 0
    rows = results(quick, "a")
    assert [row["state"] for row in rows] == [DONE, DONE, DONE, PRUNED]
    assert 4 < rows[3]["step"] < 20 and rows[3]["value"] is None
    assert rows[3]["last"] == pytest.approx(9 + 1 / rows[3]["step"])


def test_measured_values_are_those_of_the_file(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "time": 0.0, "train/loss": 10.0 / step} for step in range(1, 101)]
    rows[49]["eval/loss"], rows[99]["eval/loss"] = 3.0, 2.0
    lines = [json.dumps(row) + "\n" for row in rows]
    evaluated, trained = MetricReader(file, "eval/loss", 100), MetricReader(file, "train/loss", 100)
    evaluated.update()
    assert evaluated.reports() == {} and evaluated.value() is None
    file.write_text("".join(lines[:60]) + lines[60][:10])  # an incomplete row
    for one in (evaluated, trained):
        one.update()
    assert evaluated.reports() == {50: 3.0} and evaluated.step == 60
    assert trained.reports()[60] == (10 / 59 + 10 / 60) / 2 and len(trained.reports()) == 30
    half = tmp_path / "half"
    half.write_text("".join(lines[:40]))  # as a resumed run does, which drops rows
    half.replace(file)
    evaluated.update()
    assert evaluated.reports() == {} and evaluated.step == 40
    with file.open("a") as more:
        more.write("".join(lines[40:]))
    for one in (evaluated, trained):
        one.update()
    assert evaluated.reports() == {50: 3.0, 100: 2.0} and evaluated.value() == 2.0
    assert trained.value() == (10 / 99 + 10 / 100) / 2


def test_keys_of_the_task_vary_without_a_prefix(quick, capfd):
    given = [
        "model=tiny",
        "output_dir=runs",
        "run=a",
        "num_steps=4,6",
        "sweep.parameters={early_stopping_patience:'1,2'}",
        "launcher.dry_run=true",
    ]
    assert run(["sweep", *given[:3], given[3], given[5]]) == 0 and run(["sweep", *given[:3], *given[4:]]) == 0
    shown = capfd.readouterr().out
    assert "task.num_steps=6 run=a-001" in shown and "task.early_stopping_patience=2 run=a-001" in shown


def test_a_dry_run_shows_the_commands_of_the_real_one(quick, capfd):
    given = ["run=a", f"{RATE}=log:1e-5..1", "sweep.method=random", "sweep.trials=3"]
    assert swept(*given, "launcher.dry_run=true") == 0
    shown = [line.removeprefix("$ ") for line in capfd.readouterr().out.splitlines() if line.startswith("$ ")]
    assert not quick.exists()
    assert swept(*given) == 0
    assert shown == [row["command"] for row in results(quick, "a")] and len(shown) == 3


def test_trials_are_a_group_in_wandb_where_no_other_is_given():
    assert wandb_groups(composed("run=a", "tracker=[wandb,tensorboard]")) == ["trackers.wandb.group=a"]
    assert wandb_groups(composed("run=a", "tracker=[wandb]", "trackers.wandb.group=mine")) == []


def test_a_preset_holds_a_space_and_the_command_line_adds_to_it(quick):
    assert swept("run=a", "sweep=learning_rate", f"{LAYERS}=1,2", "sweep.trials=2") == 0
    assert all(set(row["params"]) == {RATE, LAYERS} for row in results(quick, "a"))


def test_gpus_are_shared_out_among_the_places(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    search = SweepSearchConfig(max_concurrent_trials=2, gpus_per_trial=2)
    assert gpu_shares(search, "local") == [["4", "5"], ["6", "7"]]
    search.max_concurrent_trials = 3
    with pytest.raises(ValueError, match="3 concurrent trials need 6 GPUs, but this machine has 4"):
        gpu_shares(search, "local")
    with pytest.raises(ValueError, match="applies only to launcher=local; set the GPU keys of launcher=slurm"):
        gpu_shares(search, "slurm")


TPU = ["launcher=tpu_vm", "launcher.accelerator=v6e-16", "launcher.runtime=r", "launcher.zone=z"]


@pytest.mark.parametrize(
    ("options", "parallel", "said"),
    [
        (TPU, 1, "launcher.name=null: each trial would create a separate TPU"),
        ([*TPU, "launcher.name=mine"], 2, "sweep.max_concurrent_trials=2: launcher.name=mine runs one trial at a time"),
        (["launcher=skypilot", "launcher.cluster=mine"], 2, "launcher.cluster=mine runs one trial at a time"),
        (["launcher=slurm", "launcher.follow=false"], 1, "launcher.follow=false: not supported for sweeps"),
    ],
)
def test_launchers_that_could_not_tell_trials_apart_are_refused(options, parallel, said):
    with pytest.raises(ValueError) as refused:
        check_launcher(composed(*options), parallel)
    assert said in str(refused.value)
    check_launcher(composed("launcher=skypilot"), 2)
    check_launcher(composed(*TPU, "launcher.name=mine"), 1)


@pytest.fixture
def queued(tmp_path, monkeypatch):
    """Returns a trial whose job runs in SLURM, its config, and the log of scancel calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["meshwright"])
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    calls = program(tmp_path, "scancel")
    program(tmp_path, "scontrol", {"show": "echo JobState=RUNNING NodeList=n1"})
    one = job("launcher=slurm", folder=tmp_path / "runs" / "s-000" / "jobs" / "1")
    one.folder.mkdir(parents=True)
    one.update_handle(id="17", log=str(one.log))
    monkeypatch.setattr(trials, "PROGRAM", (sys.executable, "-c", "import time; time.sleep(60)"))
    config = composed("launcher=slurm", "run=s-000", "output_dir=runs")
    return Trial(0, "s-000", "running", {}, process={"pid": 1}), config, calls


def test_a_job_that_an_earlier_sweep_left_in_a_cluster_is_followed_and_stopped_there(queued, tmp_path):
    trial, config, calls = queued
    one: RunningTrial = start(trial, config, [], SweepSearchConfig(), log=tmp_path / "log", rejoin=True)
    try:
        assert one.rejoined and one.child.args[-4:] == ["logs", "output_dir=runs", "run=s-000", "follow=true"]
        assert one.stop() == "asked SLURM job 17 to save a checkpoint and exit"
        assert calls.read_text() == "--signal=TERM 17\n" and one.child.poll() is None
        assert one.stop() == ""  # once
        assert len(calls.read_text().splitlines()) == 1
    finally:
        one.child.kill()
        one.child.wait()
    assert one.outcome(SweepSearchConfig()).again


def test_trials_run_the_code_as_it_was(quick, tmp_path, monkeypatch):
    say = "import launch.exit_codes as e, os; open('where', 'a').write(e.__file__ + os.linesep); raise SystemExit(2)"
    monkeypatch.setattr(trials, "PROGRAM", (sys.executable, "-P", "-c", say))
    assert swept("run=a", "seed=1,2") == 2
    copy = tmp_path / "runs" / "sweeps" / "a" / "code" / "launch" / "exit_codes.py"
    assert (tmp_path / "where").read_text() == f"{copy}\n"


def test_a_trial_is_a_plain_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["meshwright", "--config-dir=mine"])
    trial = Trial(3, "a-003", "running", {RATE: "0.01"})
    assert command(["model=tiny"], trial) == ["train", "--config-dir=mine", "model=tiny", f"{RATE}=0.01", "run=a-003"]


def test_without_optuna_the_way_to_it_is_said(quick, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert swept("seed=1,2") == 2
    assert "sweep: Optuna is not installed; install it with: pip install -e '.[sweep]'" in capfd.readouterr().err
