"""A document that is nothing like the others: the run drops it, or goes back before it, killed in between or not."""

import json
import random

import numpy as np
import pytest

from tests.end_to_end.run import TINY, losses, meshwright, metrics

STEPS = 100
RUN = [
    *TINY, "source=[text]", "data.sources.text.paths=[poison.txt]", "checkpoint.save_interval_steps=10",
    "loss_spikes.window=64", "loss_spikes.num_std=20",
    "optimizer.learning_rate=3e-3", "data.max_eval_batches=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("spikes"), random.Random(0)
    lines = ["".join(rng.choice("abcd") for _ in range(31)) for _ in range(1000)]
    lines[700] = "".join(rng.choice("efghijklmnopqrstuvwxyz0123456789") for _ in range(31))
    (folder / "poison.txt").write_text("\n".join(lines))
    return folder


def dropped(folder, run):
    return [row["step"] for row in metrics(folder, run) if row.get("train/dropped")]


def test_a_dropped_update_is_the_same_in_a_run_that_was_stopped_before_it(folder):
    meshwright(folder, "train", "run=whole", *RUN, "loss_spikes.policy=skip", f"task.num_steps={STEPS}")
    found = dropped(folder, "whole")
    assert len(found) == 1 and found[0] > 60
    meshwright(folder, "train", "run=broken", *RUN, "loss_spikes.policy=skip", f"task.num_steps={found[0] - 2}")
    out, _ = meshwright(folder, "train", "run=broken", *RUN, "loss_spikes.policy=skip", f"task.num_steps={STEPS}")
    assert dropped(folder, "broken") == found and f"step {found[0]}: update dropped: loss" in out
    assert losses(folder, "broken") == losses(folder, "whole")


def test_a_run_goes_back_and_leaves_the_data_out(folder):
    out, _ = meshwright(folder, "train", "run=back", *RUN, "loss_spikes.policy=rollback", f"task.num_steps={STEPS}")
    incident, *more = sorted((folder / "runs" / "back" / "rollbacks").glob("*.json"))
    told = json.loads(incident.read_text())
    to, step, (first, end) = told["rolled_back_to"], told["step"], told["rows"]
    assert not more and to == step // 10 * 10 and (first, end) == (8 * to, 8 * step)
    assert f"resumes at step {to}" in out and sorted(losses(folder, "back")) == list(range(1, STEPS + 1))
    assert not dropped(folder, "back")  # the rows of the run, once it had gone back
    batch = np.load(incident.with_suffix(".npz"))
    assert batch["tokens"].shape == (8, 32) and (batch["tokens"] > ord("d")).any()
    out, _ = meshwright(folder, "replay", "run=back", f"task.rollback={incident.stem}", "task.rows=1", "format=json")
    again = json.loads(out[out.index("{") :])
    [worst] = again["rows"]
    assert again["same"] and [row["step"] for row in again["updates"]] == list(range(to + 1, step + 1))
    assert set(worst["text"].strip()) - set("abcd")  # the document that is like no other
