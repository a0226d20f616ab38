"""Fine-tuning on conversations, from the command line: begun, stopped, resumed, on a mesh, and what goes wrong."""

import json

import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright, metrics

STEPS = 12
SFT = [
    *(a for a in TINY if not a.startswith(("data.seq_len", "task.sample_tokens"))),
    "phase=sft",
    "tokenizer.chat_template=plain",
    "data.sources.jsonl.paths=[chats.jsonl]",
    "data.sources.jsonl.validation_fraction=0.2",
    "data.seq_len=64",
    "task.sample_tokens=0",
    f"task.num_steps={STEPS}",
    "checkpoint.save_interval_steps=3",
]
BAD = ['{"messages": [', '{"messages": []}', json.dumps({"messages": [{"role": "user", "content": "x"}]})]


def chats(folder, name="chats.jsonl", bad=BAD):
    talk = lambda i: [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} and {i + 1}"}]
    rows = [json.dumps({"messages": talk(i) + talk(i + 1) * (i % 2)}) for i in range(60)]
    (folder / name).write_text("\n".join([*rows, *bad]))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    chats(folder)
    out, _ = meshwright(folder, "train", "run=a", *SFT, "task.sample_tokens=4", "task.sample_prompt=5?")
    return folder, out


def test_a_run_learns_the_answers_and_says_what_it_left_out(unbroken):
    folder, out = unbroken
    found = losses(folder, "a")
    assert found[STEPS] < found[1] - 0.3
    assert "conversations" in out and "in the loss" in out and "3 bad records skipped" in out
    bad = json.loads((folder / "runs" / "a" / "summary.json").read_text())["bad_records"]["jsonl"]["chats.jsonl"]
    places = {reason: entry["first"] for reason, entry in bad.items()}
    assert places == {"invalid JSON": "line 61", "no messages": "line 62", "no assistant turn": "line 63"}
    assert any("eval/jsonl/loss" in row for row in metrics(folder, "a"))
    [sample] = [json.loads(line) for line in (folder / "runs" / "a" / "samples.jsonl").read_text().splitlines()]
    assert sample["prompt"] == "5?" and "User" not in sample["text"]


def test_inspect_shows_the_next_conversation_and_what_is_learnt_of_it(unbroken):
    text = inspect(unbroken[0], "a")["next_example"]
    assert text.startswith("User: ") and "Assistant:⟦ " in text and "<|endoftext|>⟧" in text


def test_a_run_that_stops_and_goes_on_ends_as_the_unbroken_one(unbroken, tmp_path):
    chats(tmp_path)
    for until in (2, 7, STEPS):
        out, _ = meshwright(tmp_path, "train", "run=a", *SFT, f"task.num_steps={until}")
    assert "resumes at step 7" in out
    assert losses(tmp_path, "a") == losses(unbroken[0], "a")
    mine, theirs = inspect(tmp_path, "a"), inspect(unbroken[0], "a")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256", "data_position", "step"):
        assert mine[key] == theirs[key], key


def test_a_mesh_with_microbatches_learns_the_same(unbroken, tmp_path):
    chats(tmp_path)
    mesh = ["fake_devices=4", "mesh.data=2", "mesh.fsdp=2", "task.gradient_accumulation_steps=2"]
    meshwright(tmp_path, "train", "run=a", *SFT, *mesh)
    mine, theirs = losses(tmp_path, "a"), losses(unbroken[0], "a")
    assert all(abs(mine[step] - loss) <= 1e-5 * loss for step, loss in theirs.items())


def test_it_begins_from_a_pretrained_run_and_is_evaluated_on_other_conversations(tmp_path):
    chats(tmp_path)
    chats(tmp_path, "others.jsonl", bad=[])
    meshwright(tmp_path, "train", *TINY, "task.num_steps=2", "run=base")
    adopted = [a for a in SFT if not a.startswith(("model", "tokenizer=", "task.num_steps"))]
    meshwright(tmp_path, "prepare", *(a for a in adopted if not a.startswith("task.")), "run=tuned", "init_from=base")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "prepared").glob("jsonl-*/shard*")}
    meshwright(tmp_path, "train", *adopted, "run=tuned", "init_from=base", "task.num_steps=3")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs" / "prepared").glob("jsonl-*/shard*")} == made
    others = ["source=[jsonl]", "data.sources.jsonl.paths=[others.jsonl]", "data.sources.jsonl.validation_fraction=0.5"]
    out, _ = meshwright(tmp_path, "evaluate", "run=tuned", "format=json", *others)
    characters = sum(len(line) for line in (tmp_path / "others.jsonl").read_text().splitlines())
    assert 0 < json.loads(out)["eval/jsonl/tokens"] < characters / 8, "of conversations only the answers count"


MISTAKES = {
    "too many bad records": ([], BAD * 4, "data.max_bad_fraction=0.1: 12 of 72 records of source jsonl are unusable"),
    "no template": (["tokenizer.chat_template=null"], [], "this tokenizer has no chat template; set one"),
    "cutting conversations": (["data.packing=concat"], [], "data.packing=concat: splits conversations"),
    "a share above one": (["data.max_bad_fraction=2"], [], "data.max_bad_fraction=2.0: must be from 0 to 1"),
    "a format that is none": (["data.sources.jsonl.chat_format=alpaca"], [], "must be one of auto, messages, sharegpt"),
    "rows too short for all": (["data.seq_len=8"], [], "no text to train on; chats.jsonl: longer than data.seq_len=8"),
}


@pytest.mark.parametrize(("arguments", "bad", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named(tmp_path, arguments, bad, said):
    chats(tmp_path, bad=bad)
    _, err = meshwright(tmp_path, "train", *SFT, *arguments, expect=2)
    assert said in err and "Traceback" not in err
