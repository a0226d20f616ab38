"""Adapters on a frozen base, from the command line."""

import json
import shutil
import signal
import time

import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright, start

BASE = [*TINY, "source=[synthetic]", "model.tied_embeddings=false", "task.num_steps=4"]
STEPS = 16
ADAPTERS = [*BASE, "init_from=base", "adapter.rank=4", f"task.num_steps={STEPS}", "checkpoint.save_interval_steps=4"]
LORA = [*ADAPTERS, "adapter=lora"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, and LoRA on it that nobody disturbs."""
    folder = tmp_path_factory.mktemp("adapters")
    meshwright(folder, "train", "run=base", *BASE)
    out, _ = meshwright(folder, "train", "run=a", *LORA)
    assert "starts with new adapters on the weights of base, step 4" in out
    assert "adapter: lora, rank 4, scale 8: 11,776 trainable parameters, 7.13% of the model" in out
    return folder


def test_a_killed_run_ends_as_the_unbroken_one_and_holds_adapters_only(home):
    process = start(home, "train", "run=killed", *LORA)
    lines = home / "runs" / "killed" / "metrics.jsonl"
    while process.poll() is None and (not lines.exists() or len(lines.read_bytes().splitlines()) < 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    meshwright(home, "train", "run=killed", *LORA)
    assert losses(home, "killed") == losses(home, "a")
    mine, theirs = inspect(home, "killed"), inspect(home, "a")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256", "step"):
        assert mine[key] == theirs[key], key
    assert mine["parameters"] == 165_184 and mine["trainable_parameters"] == 11_776


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_any_mesh_gives_the_same_losses(home, method):
    mesh = ["fake_devices=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "task.num_steps=6"]
    there = "a"
    if method != "lora":
        there = method
        meshwright(home, "train", f"run={method}", *ADAPTERS, f"adapter={method}", "task.num_steps=6")
    meshwright(home, "train", f"run={method}_mesh", *ADAPTERS, f"adapter={method}", *mesh)
    mine, theirs = losses(home, f"{method}_mesh"), losses(home, there)
    for step, loss in mine.items():
        assert loss == pytest.approx(theirs[step], rel=1e-5), step


def test_it_evaluates_writes_and_is_exported_merged(home):
    evaluated = json.loads(meshwright(home, "evaluate", "run=a", "format=json")[0])
    last = json.loads((home / "runs" / "a" / "summary.json").read_text())["evaluation"]
    assert evaluated["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    out, _ = meshwright(home, "generate", "run=a", "prompt=the", "task.max_new_tokens=4", "task.temperature=0")
    assert out.startswith("the")
    meshwright(home, "convert", "from=a", f"to=hf:{home}/merged")
    tuned = [*BASE, "tokenizer=bytes", f"init_from=hf:{home}/merged", "task.num_steps=2"]
    meshwright(home, "train", "run=from_merged", *tuned)
    first = json.loads((home / "runs" / "from_merged" / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
    assert first < losses(home, "a")[1]  # of the same batch


def test_peft_folders_go_out_and_come_in(home):
    meshwright(home, "convert", "from=base", f"to=hf:{home}/base_hf")
    started = [*ADAPTERS, f"init_from=hf:{home}/base_hf", "tokenizer=bytes", "adapter=qlora", "task.num_steps=8"]
    out, _ = meshwright(home, "train", "run=q", *started)
    assert "on a base of nf4" in out
    out, _ = meshwright(home, "convert", "from=q", f"to=peft:{home}/peft")
    assert "rank 4, 11,776 parameters in float32, read back and equal" in out
    described = json.loads((home / "peft" / "adapter_config.json").read_text())
    assert described["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    again = [*BASE, f"init_from=peft:{home}/peft", "tokenizer=bytes", "task.num_steps=2"]
    out, _ = meshwright(home, "train", "run=again", *again)
    assert "starts with the adapters of peft:" in out
    assert losses(home, "again")[1] < losses(home, "q")[1]  # of the same batch


def test_what_stands_on_nothing_or_on_another_base_is_refused(home, tmp_path):
    _, err = meshwright(home, "train", "run=none", *BASE, "adapter=lora", expect=2)
    assert "adapter.method=lora: adapters need trained weights; set init_from=" in err
    _, err = meshwright(home, "train", "run=a", *LORA, "adapter.rank=8", expect=2)
    assert "adapter.rank=8: the run 'a' was started with adapter.rank=4" in err
    shutil.copytree(home / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "base").rename(tmp_path / "runs" / "first")
    meshwright(tmp_path, "train", "run=base", *BASE, "seed=1")
    _, err = meshwright(tmp_path, "train", "run=a", *LORA, f"task.num_steps={STEPS + 4}", expect=2)
    assert "init_from=base@4: these weights are no longer those that the adapters were trained on" in err
