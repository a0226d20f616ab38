"""The command line as a user has it: train, kill, resume, write, inspect."""

import json
import random
import shutil
import signal
import time

import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright, metrics, start

SOURCES = [
    "source=[synthetic]",
    "+source@data.sources.second=synthetic",
    "data.sources.second.seed=1",
    "+source@data.sources.third=synthetic",
    "data.sources.third.seed=2",
    "data.mixture_weights=[5,3,2]",
]
STEPS = 30
RUN = [*TINY, *SOURCES, f"task.num_steps={STEPS}", "checkpoint.save_interval_steps=4", "data.packing=best_fit"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of a mixture of three packed sources that nobody disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    out, _ = meshwright(folder, "train", "run=a", *RUN)
    return folder, out


def test_the_run_folder_holds_what_was_promised(unbroken):
    folder, out = unbroken
    run = folder / "runs" / "a"
    for name in ("config.yaml", "overrides.yaml", "environment.json", "metrics.jsonl", "loss.png", "summary.json"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "checkpoints" / str(STEPS)).is_dir() and (run / "tokenizer").is_dir()
    assert "next:" in out and "meshwright generate run=a" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ended"] == "done" and summary["step"] == STEPS
    assert summary["goodput"]["seconds"]["step"] > 0


def test_metrics_have_their_stable_names(unbroken):
    rows = metrics(unbroken[0], "a")
    train = next(row for row in rows if "train/loss" in row)
    assert {"step", "time", "train/bits_per_byte", "train/grad_norm", "train/learning_rate"} <= set(train)
    assert any("perf/tokens_per_second" in row and "perf/mfu" in row for row in rows)
    last = next(row for row in reversed(rows) if "eval/loss" in row)
    for name in ("synthetic", "second", "third"):
        assert {f"eval/{name}/loss", f"eval/{name}/bits_per_byte"} <= set(last)
    assert sorted(losses(unbroken[0], "a")) == list(range(1, STEPS + 1))


def test_the_loss_falls(unbroken):
    found = losses(unbroken[0], "a")
    assert found[STEPS] < found[1] - 0.3


def test_a_run_killed_again_and_again_ends_as_the_unbroken_one(unbroken, tmp_path):
    draw, kills = random.Random(0), 0
    for _ in range(12):
        process = start(tmp_path, "train", "run=a", *RUN)
        seen = metrics_lines(tmp_path)
        wanted = seen + draw.randint(2, 12)
        while process.poll() is None and (kills >= 3 or metrics_lines(tmp_path) < wanted):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
    assert kills == 3 and process.returncode == 0
    assert losses(tmp_path, "a") == losses(unbroken[0], "a")
    mine, theirs = inspect(tmp_path, "a"), inspect(unbroken[0], "a")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256", "data_position", "step"):
        assert mine[key] == theirs[key], key


def metrics_lines(folder) -> int:
    path = folder / "runs" / "a" / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_sigterm_saves_and_asks_to_be_requeued(unbroken, tmp_path):
    process = start(tmp_path, "train", "run=a", *RUN)
    while process.poll() is None and metrics_lines(tmp_path) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    meshwright(tmp_path, "train", "run=a", *RUN, "resume=must")
    assert losses(tmp_path, "a") == losses(unbroken[0], "a")


@pytest.mark.parametrize("mesh", [["mesh.data=2", "mesh.fsdp=4"], ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]])
def test_any_mesh_sees_the_same_batches_and_losses(unbroken, tmp_path, mesh):
    meshwright(tmp_path, "train", "run=a", *RUN, "fake_devices=8", *mesh)
    close(losses(tmp_path, "a"), losses(unbroken[0], "a"))
    assert inspect(tmp_path, "a")["next_batch_sha256"] == inspect(unbroken[0], "a")["next_batch_sha256"]


def close(mine, theirs):
    assert mine.keys() == theirs.keys()
    for step, loss in theirs.items():
        assert abs(mine[step] - loss) <= 1e-5 * loss, f"step {step}: {mine[step]} and {loss}"


def test_two_processes_train_and_one_goes_on(unbroken, tmp_path):
    mesh = ["fake_devices=2", "mesh.fsdp=2"]
    meshwright(tmp_path, "train", "run=a", *RUN, *mesh, "task.num_steps=12", "launcher.num_processes=2")
    assert (tmp_path / "runs" / "a" / "jobs" / "1" / "process_1.log").exists()
    assert inspect(tmp_path, "a")["saved_on"]["fsdp"] == 2
    meshwright(tmp_path, "train", "run=a", *RUN)
    close(losses(tmp_path, "a"), losses(unbroken[0], "a"))
    assert inspect(tmp_path, "a")["next_batch_sha256"] == inspect(unbroken[0], "a")["next_batch_sha256"]


def test_it_writes_and_evaluates(unbroken):
    folder, _ = unbroken
    out, _ = meshwright(folder, "generate", "run=a", "prompt=the cat ", "task.max_new_tokens=8", "task.temperature=0")
    assert out.startswith("the cat ")
    again, _ = meshwright(
        folder,
        "generate",
        "run=a",
        "prompt=the cat ",
        "task.prompts=[a]",
        "task.max_new_tokens=8",
        "task.temperature=0",
        "format=json",
    )
    rows = [json.loads(line) for line in again.splitlines()]
    assert "the cat " + rows[0]["text"] + "\n" == out
    assert all(len(row["tokens"]) == len(row["logprobs"]) for row in rows)
    out, _ = meshwright(folder, "evaluate", "run=a", "format=json")
    found = json.loads(out)
    last = next(row for row in reversed(metrics(folder, "a")) if "eval/loss" in row)
    assert found["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    (folder / "pets.jsonl").write_text(
        '{"query": "the cat", "choices": ["sat", "qzx"], "gold": 0}\n'
        '{"query": "the cat sat", "choices": ["on", "zq"], "gold": 0}\n'
    )
    out, _ = meshwright(folder, "evaluate", "run=a", "task.eval_tasks=[pets.jsonl]", "format=json")
    assert json.loads(out)["problems"]["pets"]["n"] == 2
    out, _ = meshwright(folder, "evaluate", "run=a", "task.eval_tasks=[pets.jsonl]")
    assert "pets" in out and "stderr" in out
    (folder / "pairs.jsonl").write_text('{"sentence_good": "the cat sat", "sentence_bad": "the cat qzx"}\n')
    scored = ["evaluate", "run=a", "task.eval_tasks=[pairs.jsonl]"]
    plain, _ = meshwright(folder, *scored)
    with_prefix, _ = meshwright(folder, *scored, "task.prefix='<|endoftext|>'")
    assert "acc 1.0000" in plain and "acc 1.0000" in with_prefix
    _, err = meshwright(folder, *scored, "task.prefix=nothing", expect=2)
    assert "task.prefix='nothing': is not a special token" in err
    _, err = meshwright(folder, "evaluate", "run=a", "task.eval_tasks=[pest.jsonl]", expect=2)
    assert "task.eval_tasks=pest.jsonl: file not found" in err
    out, _ = meshwright(folder, "runs", "format=json")
    assert [row["run"] for row in json.loads(out)] == ["a"]


def test_new_weights_begin_from_another_run(unbroken):
    folder, _ = unbroken
    out, _ = meshwright(folder, "train", "run=next", *RUN, "task.num_steps=2", "init_from=a@28")
    assert "starts with the weights of a, step 28" in out
    assert losses(folder, "next")[1] < losses(folder, "a")[1] - 0.3


def test_what_may_not_change_is_refused_by_name(unbroken):
    folder, _ = unbroken
    _, err = meshwright(folder, "train", "run=a", *RUN, "model.num_layers=3", expect=2)
    assert "model.num_layers=3: the run 'a' was started with model.num_layers=2" in err
    _, err = meshwright(folder, "train", "run=a", *RUN, "resume=never", expect=2)
    assert "resume=never" in err
    _, err = meshwright(folder, "train", "run=a", *RUN, "data.seq_len=16", expect=2)
    assert "reset=[data]" in err
    assert "seq_len: 32" in (folder / "runs" / "a" / "config.yaml").read_text()  # the refused one left no trace


def test_a_reset_forgets_once_and_loses_nothing(unbroken, tmp_path):
    shutil.copytree(unbroken[0] / "runs", tmp_path / "runs")
    before = losses(tmp_path, "a")
    again = ["run=a", *RUN, "reset=[optimizer,data,step]"]
    out, _ = meshwright(tmp_path, "train", *again, "task.num_steps=3")
    assert f"resumes at step {STEPS}, without its optimizer and data and step" in out
    after = losses(tmp_path, "a")
    assert sorted(after) == [1, 2, 3] and after[1] < before[1] - 0.3
    run = tmp_path / "runs" / "a"
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()) == [0, 3]
    assert (run / "checkpoints" / f"{STEPS}.superseded").is_dir()
    assert len((run / "metrics.before_reset_1.jsonl").read_text().splitlines()) >= STEPS
    out, _ = meshwright(tmp_path, "train", *again, "task.num_steps=5")
    assert "resumes at step 3 (reset=[optimizer,data,step] was done before)" in out
    assert sorted(losses(tmp_path, "a")) == [1, 2, 3, 4, 5]
