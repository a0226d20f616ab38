"""What makes runs faster changes nothing else, and benchmarks compare what is the same."""

import json
import subprocess
import sys

import pytest

from tests.end_to_end.run import ROOT, TINY, environment, losses, meshwright


def test_a_kernel_trains_as_plain_attention_does(tmp_path):
    common = [*TINY, "data.seq_len=128", "source=[python_stdlib]", "data.packing=best_fit", "task.num_steps=3"]
    meshwright(tmp_path, "train", "run=plain", *common)
    meshwright(tmp_path, "train", "run=kernel", "model.attention.implementation=splash", *common)
    plain, kernel = losses(tmp_path, "plain"), losses(tmp_path, "kernel")
    assert plain.keys() == kernel.keys() == {1, 2, 3}
    assert all(abs(kernel[step] / plain[step] - 1) < 1e-5 for step in plain)
    # Rows of problems are of other lengths than the kernel takes, and another machine has none of its kind.
    (tmp_path / "pets.jsonl").write_text('{"query": "the cat", "choices": ["sat", "qzx"], "gold": 0}\n')
    out, _ = meshwright(tmp_path, "evaluate", "run=kernel", "task.eval_tasks=[pets.jsonl]", "format=json")
    assert json.loads(out)["problems"]["pets"]["n"] == 1
    _, err = meshwright(tmp_path, "train", "run=triton", "model.attention.implementation=triton", *common, expect=2)
    assert "model.attention.implementation=triton: does not support model.dtype=float32" in err


def run_step(folder, only: str) -> dict:
    command = ["benchmarks/step.py", "--models", "tiny", "--dtypes", "float32", "--rounds", "2", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, *command, "--only", only, "--results", str(folder)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr  # their losses are alike
    return json.loads((folder / "step.json").read_text())["results"][0]


def test_the_trainers_step_is_compared_with_one_written_by_hand(tmp_path):
    found = run_step(tmp_path, "bare JAX")["peers"]["bare JAX"]
    assert found["off"] < 1e-5
    assert len(found["seconds"]["meshwright"]) == 2 and (tmp_path / "step.png").stat().st_size > 0


@pytest.mark.parity
def test_and_with_pytorch_and_transformers(tmp_path):
    pytest.importorskip("transformers")
    found = run_step(tmp_path, "PyTorch eager,transformers")["peers"]
    assert found.keys() == {"PyTorch eager", "transformers"} and max(one["off"] for one in found.values()) < 1e-5
