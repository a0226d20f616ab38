"""Learning from answers that are good or not, from the command line."""

import json

import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright, metrics

STEPS = 8
KEPT = [a for a in TINY if not a.startswith(("data.seq_len", "source"))]
KTO = [
    *KEPT, "phase=kto", "init_from=base", "tokenizer.chat_template=plain", "data.sources.jsonl.paths=[judged.jsonl]",
    "data.sources.jsonl.validation_fraction=0.2", "data.seq_len=64", "optimizer.learning_rate=3e-3",
    f"task.num_steps={STEPS}", "checkpoint.save_interval_steps=3",
]  # fmt: skip
BAD = [
    '{"prompt": "1?", "completion": "yes"}',
    '{"prompt": "1?", "completion": "yes", "label": "maybe"}',
    '{"prompt": "1?", "completion": " ", "label": true}',
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("kto"), []
    for i in range(48):
        good, answer = i % 2 == 0, f"{i} is good" if i % 2 == 0 else f"no {i}"
        turns = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]
        rows.append(
            [
                {"prompt": f"{i}?", "completion": answer, "label": good},
                {"messages": turns, "label": int(good)},
                {"prompt": f"{i}?", "chosen": f"{i} is good", "rejected": f"no {i}"},
            ][i % 3]
        )
    (folder / "judged.jsonl").write_text("\n".join([*map(json.dumps, rows), *BAD]))
    meshwright(folder, "train", "run=base", *TINY, "source=[synthetic]", "task.num_steps=4", "schedule.warmup_steps=1")
    out, _ = meshwright(folder, "train", "run=a", *KTO)
    assert "starts with the weights of base, step 4" in out and "3 bad records skipped" in out
    return folder


def test_what_is_good_becomes_likelier_and_what_is_not_less(home):
    assert losses(home, "a")[1] == pytest.approx(0.5, abs=1e-5)  # policy and reference are one
    row = [row for row in metrics(home, "a") if "eval/jsonl/reward_good" in row][-1]
    assert row["eval/jsonl/reward_good"] > row["eval/jsonl/reward_bad"]
    bad = json.loads((home / "runs" / "a" / "summary.json").read_text())["bad_records"]["jsonl"]["judged.jsonl"]
    assert set(bad) == {"no field 'label'", "field 'label' is neither true nor false", "empty answer"}


def test_a_run_that_stops_and_goes_on_is_the_same_and_a_cached_reference_too(home):
    for until in (4, STEPS):
        meshwright(home, "train", "run=stopped", *KTO, f"task.num_steps={until}")
    meshwright(home, "train", "run=cached", *KTO, "objective.precompute_ref_log_probs=true")
    assert losses(home, "stopped") == losses(home, "a")
    mine, theirs = inspect(home, "stopped"), inspect(home, "a")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256"):
        assert mine[key] == theirs[key], key
    for step, loss in losses(home, "cached").items():
        assert loss == pytest.approx(losses(home, "a")[step], rel=1e-6), step


def test_a_mesh_changes_nothing(home):
    meshwright(home, "train", "run=mesh", *KTO, "fake_devices=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    for step, loss in losses(home, "mesh").items():
        assert loss == pytest.approx(losses(home, "a")[step], rel=1e-5), step


MISTAKES = {
    "no reference": (["init_from=null", "tokenizer=bytes"], "init_from=null: objective=kto needs a reference model"),
    "other records": (["data.format=preference"], "objective=kto needs data.format=unpaired_preference"),
    "too many bad": (["data.max_bad_fraction=0.01"], "data.max_bad_fraction=0.01: 3 of"),
}


@pytest.mark.parametrize("case", MISTAKES, ids=str)
def test_mistakes_are_named(home, case):
    changes, said = MISTAKES[case]
    _, err = meshwright(home, "train", "run=wrong", *KTO, *changes, expect=2)
    assert said in err
