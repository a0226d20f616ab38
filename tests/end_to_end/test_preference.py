"""Preference optimisation on pairs of answers, from the command line."""

import json

import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright, metrics

STEPS = 10
KEPT = [a for a in TINY if not a.startswith(("data.seq_len", "task.sample_tokens", "source"))]
DPO = [
    *KEPT,
    "phase=dpo",
    "init_from=base",
    "tokenizer.chat_template=plain",
    "data.sources.jsonl.paths=[pairs.jsonl]",
    "data.sources.jsonl.validation_fraction=0.2",
    "data.seq_len=64",
    "optimizer.learning_rate=3e-3",
    "task.sample_tokens=0",
    f"task.num_steps={STEPS}",
    "checkpoint.save_interval_steps=3",
]
BAD = [
    '{"prompt": "1?", "chosen": "yes"}',
    '{"prompt": "1?", "chosen": "yes", "rejected": "yes"}',
    '{"prompt": "1?", "chosen": " ", "rejected": "yes"}',
    '{"prompt": "1?", "chosen": 3, "rejected": "yes"}',
]


def pairs(folder):
    """In every layout that can be told apart."""
    rows = []
    for i in range(48):
        good, bad = f"{i} is good", f"no {i}"
        turn = lambda text: [{"role": "assistant", "content": text}]
        question = [{"role": "user", "content": f"{i}?"}]
        rows.append(
            [
                {"prompt": f"{i}?", "chosen": good, "rejected": bad},
                {"chosen": [*question, *turn(good)], "rejected": [*question, *turn(bad)]},
                {"instruction": f"{i}?", "input": "", "chosen": good, "rejected": bad},
                {"conversations": [{"from": "human", "value": f"{i}?"}]}
                | {"chosen": {"from": "gpt", "value": good}, "rejected": {"from": "gpt", "value": bad}},
                {name: f"\n\nHuman: {i}?\n\nAssistant: {text}" for name, text in (("chosen", good), ("rejected", bad))},
            ][i % 5]
        )
    (folder / "pairs.jsonl").write_text("\n".join([*map(json.dumps, rows), *BAD]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference")
    pairs(folder)
    meshwright(folder, "train", "run=base", *TINY, "source=[synthetic]", "task.num_steps=4", "schedule.warmup_steps=1")
    out, _ = meshwright(folder, "train", "run=a", *DPO)
    assert "starts with the weights of base, step 4" in out and "4 bad records skipped" in out
    return folder


def test_the_margin_of_held_out_pairs_grows_from_nothing(home):
    assert losses(home, "a")[1] == pytest.approx(0.6931472, abs=1e-5)  # policy and reference are one
    rows = [row for row in metrics(home, "a") if "eval/jsonl/reward_margin" in row]
    assert rows[-1]["eval/jsonl/reward_margin"] > 0.05 and rows[-1]["eval/jsonl/reward_accuracy"] > 0.6
    bad = json.loads((home / "runs" / "a" / "summary.json").read_text())["bad_records"]["jsonl"]["pairs.jsonl"]
    assert {entry["first"].split(":")[0] for entry in bad.values()} == {"line 49", "line 50", "line 51", "line 52"}


def test_evaluation_finds_the_reference_again(home):
    last = json.loads((home / "runs" / "a" / "summary.json").read_text())["evaluation"]
    found = json.loads(meshwright(home, "evaluate", "run=a", "format=json")[0])
    for key in ("eval/loss", "eval/reward_margin", "eval/reward_accuracy"):
        assert found[key] == pytest.approx(last[key], rel=1e-5), key
    out, _ = meshwright(home, "evaluate", "run=a")
    assert "reward margin" in out


def test_a_run_that_stops_and_goes_on_keeps_its_reference(home):
    for until in (4, STEPS):
        out, _ = meshwright(home, "train", "run=stopped", *DPO, f"task.num_steps={until}")
    assert "resumes at step 4" in out
    assert losses(home, "stopped") == losses(home, "a")
    mine, theirs = inspect(home, "stopped"), inspect(home, "a")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256"):
        assert mine[key] == theirs[key], key


def test_a_mesh_and_microbatches_change_nothing(home):
    mesh = ["fake_devices=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "data.batch_size=8", "task.num_steps=4"]
    plain = ["data.batch_size=8", "task.num_steps=4"]
    meshwright(home, "train", "run=eight", *DPO, *plain)
    meshwright(home, "train", "run=mesh", *DPO, *mesh, "task.gradient_accumulation_steps=2")
    want = losses(home, "eight")
    for step, loss in losses(home, "mesh").items():
        assert loss == pytest.approx(want[step], rel=1e-5), step


def test_adapters_have_the_base_as_their_reference(home):
    lora = [*DPO, "adapter=lora", "adapter.rank=4", "adapter.target_modules=[attention,mlp]"]
    meshwright(home, "train", "run=lora", *lora)
    assert losses(home, "lora")[1] == pytest.approx(0.6931472, abs=1e-5)
    assert losses(home, "lora")[STEPS] < 0.69
    meshwright(home, "train", "run=lora_stopped", *lora, "task.num_steps=5")
    meshwright(home, "train", "run=lora_stopped", *lora)
    assert losses(home, "lora_stopped") == losses(home, "lora")


def test_a_reference_that_is_asked_in_advance_is_not_held_and_changes_nothing(home):
    cached = [*DPO, "objective.precompute_ref_log_probs=true"]
    out, _ = meshwright(home, "train", "run=cached", *cached, "task.num_steps=4")
    assert "reference: precomputed" in out
    out, _ = meshwright(home, "train", "run=cached", *cached)
    assert "precomputed" not in out and "resumes at step 4" in out
    for step, loss in losses(home, "cached").items():
        assert loss == pytest.approx(losses(home, "a")[step], rel=1e-6), step
    last, online = (
        json.loads((home / "runs" / run / "summary.json").read_text())["evaluation"] for run in ("cached", "a")
    )
    assert last["eval/reward_margin"] == pytest.approx(online["eval/reward_margin"], rel=1e-5)
    other, _ = meshwright(home, "train", "run=longer", *cached, "data.seq_len=80", "task.num_steps=2")
    assert "reference: precomputed" in other  # another length, another table
    lora = ["adapter=lora", "adapter.rank=4", "adapter.target_modules=[attention]", "task.num_steps=2"]
    meshwright(home, "train", "run=cached_lora", *cached, *lora)
    assert losses(home, "cached_lora")[1] == pytest.approx(0.6931472, abs=1e-5)


def test_a_reference_that_moves_is_part_of_the_checkpoint(home):
    moving = [
        *DPO,
        "objective.ref_model_sync_steps=3",
        "objective.use_weighting=true",
        "task.gradient_accumulation_steps=2",
    ]
    meshwright(home, "train", "run=moving", *moving)
    for until in (4, STEPS):
        meshwright(home, "train", "run=moving_stopped", *moving, f"task.num_steps={until}")
    assert losses(home, "moving_stopped") == losses(home, "moving")
    mine, theirs = inspect(home, "moving_stopped"), inspect(home, "moving")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256"):
        assert mine[key] == theirs[key], key
    last = json.loads((home / "runs" / "moving" / "summary.json").read_text())["evaluation"]
    found = json.loads(meshwright(home, "evaluate", "run=moving", "format=json")[0])
    assert found["eval/reward_margin"] == pytest.approx(last["eval/reward_margin"], rel=1e-5)


MISTAKES = {
    "adapters on a reference that moves": (
        ["objective.ref_model_sync_steps=2", "adapter=lora"],
        "set objective.ref_model_sync_steps=0",
    ),
    "a cache of nothing": (
        ["objective.loss_type=cpo", "objective.precompute_ref_log_probs=true"],
        "objective.loss_type=cpo has no reference",
    ),
    "no reference": (
        ["init_from=null", "source=[jsonl]"],
        "init_from=null: objective=preference needs a reference model",
    ),
    "plain text": (["data.format=text"], "needs data.format=preference"),
    "smoothing": (
        ["objective.loss_type=ipo", "objective.label_smoothing=0.1"],
        "not supported with objective.loss_type=ipo",
    ),
    "too many bad": (["data.max_bad_fraction=0.01"], "data.max_bad_fraction=0.01: 4 of"),
}


@pytest.mark.parametrize("case", MISTAKES, ids=str)
def test_mistakes_are_named(home, case):
    changes, said = MISTAKES[case]
    _, err = meshwright(home, "train", "run=wrong", *DPO, *changes, expect=2)
    assert said in err
    assert not (home / "runs" / "wrong" / "config.yaml").exists()


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_need_none(home, loss):
    meshwright(
        home, "train", f"run={loss}", *DPO, f"objective.loss_type={loss}", "objective.beta=1", "task.num_steps=2"
    )
    assert not json.loads((home / "runs" / loss / "summary.json").read_text()).get("reference")
