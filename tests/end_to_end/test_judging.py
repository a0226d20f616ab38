"""Runs that judge texts, from the command line: rewards, classes, vectors."""

import json

import numpy as np
import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright, metrics

STEPS = 10
KEPT = [a for a in TINY if not a.startswith(("data.seq_len", "model", "tokenizer"))]
COMMON = [
    *KEPT,
    "init_from=base",
    "data.sources.jsonl.validation_fraction=0.2",
    "optimizer.learning_rate=3e-3",
    f"task.num_steps={STEPS}",
    "checkpoint.save_interval_steps=3",
]
PHASES = {
    "classify": [
        "phase=classify",
        "data.seq_len=32",
        "data.classes=[ham,spam]",
        "data.sources.jsonl.paths=[mail.jsonl]",
    ],
    "reward": [
        "phase=reward",
        "data.seq_len=64",
        "tokenizer.chat_template=plain",
        "data.sources.jsonl.paths=[pairs.jsonl]",
    ],
    "embed": ["phase=embed", "data.seq_len=32", "objective.negatives=1", "data.sources.jsonl.paths=[matches.jsonl]"],
}


def write(path, rows) -> None:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judging")
    mail = [
        {"text": f"win cash {i} now", "label": "spam"} if i % 3 else {"text": f"see you at {i}", "label": 0}
        for i in range(96)
    ]
    write(folder / "mail.jsonl", [*mail, {"text": "x"}, {"text": "x", "label": "eggs"}, '{"text": '])
    write(folder / "pairs.jsonl", [{"prompt": f"{i}?", "chosen": "good", "rejected": f"no {i}"} for i in range(48)])
    write(
        folder / "matches.jsonl",
        [{"anchor": f"number {i}", "positive": f"the {i}th", "negative": f"the {i + 7}th"} for i in range(48)],
    )
    meshwright(folder, "train", "run=base", *TINY, "source=[synthetic]", "task.num_steps=4", "schedule.warmup_steps=1")
    for phase, chosen in PHASES.items():
        meshwright(folder, "train", f"run={phase}", *COMMON, *chosen)
    return folder


def evaluation(home, run: str) -> dict[str, float]:
    return json.loads((home / "runs" / run / "summary.json").read_text())["evaluation"]


def test_each_phase_begins_knowing_nothing_and_learns(home):
    assert losses(home, "classify")[1] == losses(home, "reward")[1] == pytest.approx(np.log(2), abs=1e-6)
    assert evaluation(home, "classify")["eval/accuracy"] > 0.9 and evaluation(home, "classify")["eval/roc_auc"] > 0.9
    assert evaluation(home, "reward")["eval/reward_accuracy"] > 0.9
    assert evaluation(home, "embed")["eval/loss"] < 2.2 < losses(home, "embed")[1]
    bad = json.loads((home / "runs" / "classify" / "summary.json").read_text())["bad_records"]["jsonl"]["mail.jsonl"]
    assert {entry["first"].split(":")[0] for entry in bad.values()} == {"line 97", "line 98", "line 99"}


@pytest.mark.parametrize("phase", PHASES)
def test_evaluation_gives_what_training_gave(home, phase):
    found = json.loads(meshwright(home, "evaluate", f"run={phase}", "format=json")[0])
    last = evaluation(home, phase)
    for key in last:
        assert found[key] == pytest.approx(last[key], rel=1e-5, abs=1e-6), key
    assert " n " in meshwright(home, "evaluate", f"run={phase}")[0]


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_stops_and_goes_on_is_the_same_bit_for_bit(home, phase):
    for until in (4, STEPS):
        meshwright(home, "train", "run=stopped_" + phase, *COMMON, *PHASES[phase], f"task.num_steps={until}")
    mine, theirs = inspect(home, "stopped_" + phase), inspect(home, phase)
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256"):
        assert mine[key] == theirs[key], key


@pytest.mark.parametrize("phase", PHASES)
def test_a_mesh_and_microbatches_change_nothing(home, phase):
    mesh = ["fake_devices=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "task.num_steps=4"]
    if phase != "embed":  # whose matches are told from those of their microbatch
        mesh.append("task.gradient_accumulation_steps=2")
    meshwright(home, "train", f"run=mesh_{phase}", *COMMON, *PHASES[phase], *mesh)
    want = losses(home, phase)
    for step, loss in losses(home, f"mesh_{phase}").items():
        assert loss == pytest.approx(want[step], rel=2e-5), step


def test_adapters_train_beside_a_head_of_scores(home):
    lora = [*COMMON, *PHASES["classify"], "adapter=lora", "adapter.rank=4"]
    for until in (5, STEPS):
        out, _ = meshwright(home, "train", "run=lora", *lora, f"task.num_steps={until}")
    assert losses(home, "lora")[1] == pytest.approx(np.log(2), abs=1e-6)
    assert evaluation(home, "lora")["eval/accuracy"] > 0.9
    meshwright(home, "train", "run=lora_whole", *lora)
    assert inspect(home, "lora")["params_sha256"] == inspect(home, "lora_whole")["params_sha256"]
    out, _ = meshwright(home, "predict", "run=lora", "task.texts=['win cash 1 now']")
    assert json.loads(out)["class"] == "spam"
    _, err = meshwright(home, "convert", "from=lora", "to=peft:out", expect=2)
    assert "score head" in err


def test_predictions_of_texts_and_files(home):
    write(
        home / "asked.jsonl", [{"text": "win cash 3 now"}, {"prompt": "1?", "completion": "good"}, {"text": "a" * 99}]
    )
    out, _ = meshwright(home, "predict", "run=classify", "task.texts=[see you at 5, win cash 2 now]")
    first, second = map(json.loads, out.splitlines())
    assert (first["class"], second["class"]) == ("ham", "spam")
    assert sum(second["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    out, _ = meshwright(home, "predict", "run=reward", "task.files=[asked.jsonl]")
    assert [set(json.loads(line)) for line in out.splitlines()] == [{"reward"}] * 3
    (home / "asked.txt").write_text("number 3\n\nthe 3th\nthe 40th\n")
    meshwright(home, "predict", "run=embed", "task.files=[asked.txt]", "task.output=vectors.npy", "task.batch_size=2")
    vectors = np.load(home / "vectors.npy", allow_pickle=False)
    assert vectors.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_a_judge_is_published_and_comes_back(home):
    pytest.importorskip("safetensors")
    meshwright(home, "convert", "from=classify", "to=hf:published")
    told = json.loads((home / "published" / "config.json").read_text())
    assert told["architectures"] == ["LlamaForSequenceClassification"] and told["id2label"] == {"0": "ham", "1": "spam"}
    again = [
        *COMMON,
        *PHASES["classify"],
        "init_from=hf:published",
        "tokenizer=bytes",
        "optimizer.learning_rate=1e-9",
        "model.dtype=float32",
    ]
    meshwright(home, "train", "run=back", *again, "task.num_steps=2")
    told = [
        json.loads(meshwright(home, "predict", f"run={run}", "task.texts=[see you]")[0]) for run in ("back", "classify")
    ]
    assert told[0]["probabilities"] == pytest.approx(told[1]["probabilities"], abs=1e-5)


MISTAKES = {
    "no classes": (["train", "run=wrong", *COMMON, *PHASES["classify"], "data.classes=[]"], "needs at least two"),
    "other records": (
        ["train", "run=wrong", *COMMON, *PHASES["reward"], "data.format=text"],
        "phase=reward sets both",
    ),
    "concat": (["train", "run=wrong", *COMMON, *PHASES["classify"], "data.packing=concat"], "data.packing=best_fit"),
    "writes none": (["generate", "run=classify", "prompt=x"], "meshwright predict run=classify"),
    "judges none": (["predict", "run=base", "task.texts=[x]"], "does not score texts"),
    "nothing asked": (["predict", "run=classify"], "give texts"),
    "no file": (["predict", "run=classify", "task.files=[none.txt]"], "none.txt does not exist"),
    "bad line": (["predict", "run=classify", "task.files=[mail.jsonl]"], "mail.jsonl, "),
    "other outputs": (
        ["train", "run=wrong", *COMMON, *PHASES["reward"], "init_from=base", "run=classify"],
        "model.num_labels",
    ),
    "gguf": (["convert", "from=classify", "to=gguf:a.gguf"], "try to=hf:FOLDER"),
}


@pytest.mark.parametrize("case", MISTAKES, ids=str)
def test_mistakes_are_named(home, case):
    arguments, said = MISTAKES[case]
    _, err = meshwright(home, *arguments, expect=2)
    assert said in err


def test_the_picture_and_metrics_are_there(home):
    assert (home / "runs" / "reward" / "loss.png").exists()
    names = {name for row in metrics(home, "reward") for name in row}
    assert {"train/reward_accuracy", "eval/jsonl/reward_accuracy_longer"} <= names
