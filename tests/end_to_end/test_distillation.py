"""Distillation from the command line: a student of some of its teacher's layers."""

import json

import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright

STEPS = 10
TEACHER = [*TINY, "source=[synthetic]", "model.num_layers=4", "task.num_steps=12"]
KEPT = [a for a in TINY if not a.startswith(("model", "tokenizer"))]
STUDENT = [
    *KEPT,
    "phase=distill", "source=[synthetic]", "objective.teacher=teacher", "init_from=teacher", "prune.layers=[0,3]",
    f"task.num_steps={STEPS}", "checkpoint.save_interval_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    meshwright(folder, "train", "run=teacher", *TEACHER)
    out, _ = meshwright(folder, "train", "run=a", *STUDENT)
    assert "starts with the weights of teacher, step 12, 2 of its 4 layers" in out
    return folder


def test_the_student_comes_nearer_and_is_evaluated_against_its_teacher(home):
    last = json.loads((home / "runs" / "a" / "summary.json").read_text())["evaluation"]
    found = json.loads(meshwright(home, "evaluate", "run=a", "format=json")[0])
    for key in ("eval/loss", "eval/divergence", "eval/teacher_nll", "eval/agreement"):
        assert found[key] == pytest.approx(last[key], rel=1e-5), key
    assert losses(home, "a")[STEPS] < losses(home, "a")[1]


def test_a_run_that_stops_and_goes_on_keeps_its_teacher(home):
    for until in (5, STEPS):
        meshwright(home, "train", "run=stopped", *STUDENT, f"task.num_steps={until}")
    assert losses(home, "stopped") == losses(home, "a")
    mine, theirs = inspect(home, "stopped"), inspect(home, "a")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256"):
        assert mine[key] == theirs[key], key


def test_a_mesh_changes_nothing(home):
    mesh = ["fake_devices=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "task.num_steps=4"]
    meshwright(home, "train", "run=mesh", *STUDENT, *mesh)
    for step, loss in losses(home, "mesh").items():
        assert loss == pytest.approx(losses(home, "a")[step], rel=1e-5), step


def test_a_narrower_student_learns_from_the_layers_of_its_teacher(home):
    narrow = [
        "prune.width.embed_dim=32", "prune.width.intermediate_dim=64",
        "prune.width.num_heads=2", "prune.width.num_kv_heads=2",
        "objective.feature_loss.layer_mapping=[[0,1],[1,3]]", "objective.feature_loss.teacher_dim=64",
        "objective.feature_loss.attention_loss_weight=0.5",
    ]  # fmt: skip
    out, _ = meshwright(home, "train", "run=narrow", *STUDENT, *narrow)
    assert "pruned to embed 32 of 64" in out
    assert losses(home, "narrow")[STEPS] < losses(home, "narrow")[1]
    meshwright(home, "train", "run=narrow_stopped", *STUDENT, *narrow, "task.num_steps=5")
    meshwright(home, "train", "run=narrow_stopped", *STUDENT, *narrow)
    mine, theirs = inspect(home, "narrow_stopped"), inspect(home, "narrow")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256"):
        assert mine[key] == theirs[key], key
    last = json.loads((home / "runs" / "narrow" / "summary.json").read_text())["evaluation"]
    found = json.loads(meshwright(home, "evaluate", "run=narrow", "format=json")[0])
    for key in ("eval/loss", "eval/hidden_distance", "eval/attention_distance"):
        assert found[key] == pytest.approx(last[key], rel=1e-5), key
    meshwright(home, "generate", "run=narrow", "prompt=ab", "task.max_new_tokens=2")  # without the projection
    meshwright(home, "train", "run=after", "init_from=narrow", *KEPT, "source=[synthetic]", "task.num_steps=2")


CACHED = [
    *STUDENT,
    "objective.top_k=8",
    "objective.cache_teacher_logits=true",
    "objective.cache_dtype=float32",
    "objective.alpha=1",
]


def test_a_teacher_that_is_asked_in_advance_is_not_held_and_teaches_the_same(home):
    """Over shuffled rows, microbatches, a mesh and a resume that does not even read it again."""
    meshwright(home, "train", "run=online", *(a for a in CACHED if "cache" not in a))
    out, _ = meshwright(home, "train", "run=cached", *CACHED, "task.num_steps=5")
    assert "teacher: precomputed" in out and "synthetic (validation)" in out
    (home / "runs" / "teacher").rename(home / "runs" / "elsewhere")
    try:
        out, _ = meshwright(home, "train", "run=cached", *CACHED)
    finally:
        (home / "runs" / "elsewhere").rename(home / "runs" / "teacher")
    assert "precomputed" not in out
    mesh = ["fake_devices=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "task.gradient_accumulation_steps=2"]
    out, _ = meshwright(home, "train", "run=cached_mesh", *CACHED, *mesh)
    assert "precomputed" not in out
    for run in ("cached", "cached_mesh"):
        for step, loss in losses(home, run).items():
            assert loss == pytest.approx(losses(home, "online")[step], rel=1e-5, abs=1e-7), (run, step)
    found = [
        json.loads((home / "runs" / run / "summary.json").read_text())["evaluation"] for run in ("cached", "online")
    ]
    assert found[0]["eval/divergence"] == pytest.approx(found[1]["eval/divergence"], rel=1e-4)
    evaluated = json.loads(meshwright(home, "evaluate", "run=cached", "format=json")[0])  # beside the teacher
    assert evaluated["eval/divergence"] == pytest.approx(found[1]["eval/divergence"], rel=1e-4)


MISTAKES = {
    "a width that is no width": (["prune.width.embed_dim=65"], "prune.width.embed_dim=65: the model has 64"),
    "no number of tokens": (
        ["objective.cache_teacher_logits=true"],
        "set their number, for example objective.top_k=64",
    ),
    "layers that the teacher lacks": (["objective.feature_loss.layer_mapping=[[0,4]]"], "the teacher has no layer 4"),
    "no teacher": (["objective.teacher=null"], "objective.teacher=null: distillation needs a teacher; set a run"),
    "a teacher that is not there": (["objective.teacher=nobody"], "objective.teacher=nobody: there is no run"),
    "other tokens": (
        ["tokenizer=characters", "init_from=null", "prune.layers=[]", "model=tiny", "run=other"],
        "its tokenizer differs from this run",
    ),
    "a layer that is not there": (["prune.layers=[0,4]"], "has layers 0 to 3, not 4"),
}


@pytest.mark.parametrize("case", MISTAKES, ids=str)
def test_mistakes_are_named(home, case):
    changes, said = MISTAKES[case]
    _, err = meshwright(home, "train", "run=wrong", *STUDENT, *changes, expect=2)
    assert said in err
