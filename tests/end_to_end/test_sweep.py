"""Sweeps of real runs: on this machine, and through a SLURM whose jobs outlive the sweep."""

import json
import shlex
from pathlib import Path

import pytest

from tests.end_to_end.run import TINY, losses, meshwright, metrics, start, wait_for
from tests.end_to_end.slurm_cluster import Cluster, why_not

RUN = [*TINY, "source=[synthetic]", "data.packing=best_fit", "data.max_eval_batches=1"]
RATES = "optimizer.learning_rate=log:1e-4..1e-1"


def results(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / "sweeps" / name / "results.jsonl").read_text().splitlines()]


def test_a_trial_is_what_its_command_does_by_hand(tmp_path):
    given = [RATES, "sweep.trials=2", "sweep.method=random", "sweep.max_concurrent_trials=2", "task.num_steps=3"]
    out, _ = meshwright(tmp_path, "sweep", *RUN, "run=a", *given)
    rows = sorted(results(tmp_path, "a"), key=lambda row: row["value"])
    assert [row["state"] for row in rows] == ["done", "done"] and rows[0]["params"] != rows[1]["params"]
    assert f"best: {rows[0]['run']}, eval/loss {rows[0]['value']:.5g}" in out
    assert (tmp_path / "runs" / "sweeps" / "a" / "sweep.png").exists()
    by_hand = shlex.split(out.strip().splitlines()[-1])
    assert by_hand[:2] == ["meshwright", "train"] and by_hand[-1] == "run=a-best"
    meshwright(tmp_path, *by_hand[1:])
    assert [row["eval/loss"] for row in metrics(tmp_path, "a-best") if "eval/loss" in row] == [rows[0]["value"]]
    assert losses(tmp_path, "a-best") == losses(tmp_path, rows[0]["run"])


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "SLURM is there")
def test_a_sweep_that_is_killed_finds_its_job_in_slurm_again(tmp_path):
    given = [*RUN, "run=a", "optimizer.learning_rate=1e-3,1e-2", "task.num_steps=300", "launcher=slurm"]
    with Cluster(["n1"]) as cluster:
        sweep = start(tmp_path, "sweep", *given, **cluster.environment)
        measured = tmp_path / "runs" / "a-000" / "metrics.jsonl"
        assert wait_for(lambda: measured.exists() and measured.read_text().count("\n") > 2, sweep)
        sweep.kill()
        sweep.wait()
        out, _ = meshwright(tmp_path, "sweep", *given, **cluster.environment)
        assert "a-000 resumed" in out
    assert [row["state"] for row in results(tmp_path, "a")] == ["done", "done"]
    for name in ("a-000", "a-001"):
        assert [path.name for path in (tmp_path / "runs" / name / "jobs").iterdir()] == ["1"]  # one job each
        assert sorted(losses(tmp_path, name)) == list(range(1, 301))
