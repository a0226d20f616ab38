"""A run with a chat template, from the command line: trained, answered by, begun from, and what goes wrong."""

import json

import pytest

from tests.end_to_end.run import TINY, meshwright

PLAIN = [*TINY, "tokenizer.chat_template=plain", "task.num_steps=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs: `chat` has a template, `base` has none."""
    path = tmp_path_factory.mktemp("runs")
    out, _ = meshwright(path, "train", *PLAIN, "run=chat")
    assert "meshwright generate run=chat chat='Hello'" in out
    meshwright(path, "train", *TINY, "task.num_steps=2", "run=base")
    return path


def test_a_chat_goes_through_the_template(folder):
    said = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], "tools": None}
    (folder / "said.json").write_text(json.dumps(said))
    more = ["task.system=Be [brief], ok", "task.messages_file=said.json", "task.max_new_tokens=4", "format=json"]
    out, _ = meshwright(folder, "generate", "run=chat", "chat=It's {me}", *more)
    row = json.loads(out)
    want = "System: Be [brief], ok\n\nUser: one\n\nAssistant: two<|endoftext|>\n\nUser: It's {me}\n\nAssistant:"
    assert row["prompt"] == want and len(row["tokens"]) <= 4
    out, _ = meshwright(folder, "generate", "run=chat", "chat=Hello", "task.max_new_tokens=4", "task.num_samples=2")
    assert "--- 2 of 2" in out and "User:" not in out


MISTAKES = {
    "a run without a template": (["run=base", "chat=Hi"], "init_from=base tokenizer.chat_template=plain"),
    "a chat and a prompt": (["run=chat", "chat=Hi", "prompt=x"], "a chat and a prompt are mutually exclusive"),
    "a system without a chat": (["run=chat", "task.system=x"], "add chat='Hello'"),
    "a file that is not there": (
        ["run=chat", "task.messages_file=no.json"],
        "task.messages_file=no.json: no such",
    ),
    "roles of another format": (["run=chat", "task.messages_file=bad.json"], "messages[0].role='human'"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_chat_is_named(folder, arguments, said):
    (folder / "bad.json").write_text('[{"role": "human", "content": "x"}]')
    _, err = meshwright(folder, "generate", *arguments, expect=2)
    assert said in err and "Traceback" not in err


def test_a_template_that_the_tokenizer_cannot_write_is_refused_before_anything_is_begun(tmp_path):
    _, err = meshwright(tmp_path, "train", *TINY, "tokenizer.chat_template=chatml", expect=2)
    assert (
        "needs the special tokens <|im_end|>, <|im_start|>" in err
        and not (tmp_path / "runs" / "default" / "config.yaml").exists()
    )


def test_a_base_model_gets_a_template_when_fine_tuning_begins(folder):
    kept = [a for a in TINY if not a.startswith(("model", "tokenizer"))]
    arguments = [*kept, "run=tuned", "init_from=base", "tokenizer.chat_template=plain"]
    meshwright(folder, "train", *arguments, "task.num_steps=2")
    meshwright(folder, "train", *arguments, "task.num_steps=3")  # it resumes
    meshwright(folder, "generate", "run=tuned", "chat=Hello", "task.max_new_tokens=2")
    assert not (folder / "runs" / "base" / "tokenizer" / "chat_template.jinja").exists()


def test_a_run_goes_on_with_the_tokenizer_of_its_checkpoint_only(folder):
    template = folder / "runs" / "chat" / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text().replace("User", "Human"))
    resume = [*PLAIN, "run=chat", "task.num_steps=3"]
    _, err = meshwright(folder, "train", *resume, expect=2)
    assert "chat_template.jinja was changed after it was saved" in err
    for path in template.parent.iterdir():
        path.unlink()
    template.parent.rmdir()
    out, _ = meshwright(folder, "train", *resume)
    assert "resumes at step 2" in out and "User" in template.read_text()
    base = folder / "runs" / "base" / "tokenizer"
    for path in base.iterdir():
        (template.parent / path.name).write_bytes(path.read_bytes())
    _, err = meshwright(folder, "train", *resume, "task.num_steps=4", expect=2)
    assert "its chat_template differs from that of the checkpoint of step 3" in err


def test_a_checkpoint_with_an_altered_tokenizer_is_refused(folder):
    from trainer.checkpoint.checkpointer import Checkpointer

    file = folder / "runs" / "base" / "checkpoints" / "2" / "tokenizer" / "metadata"
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"', b' "', 1))
    _, err = meshwright(folder, "generate", "run=base", "step=2", "prompt=x", expect=2)
    assert "tokenizer" in err
    file.write_bytes(before)
    assert Checkpointer(file.parents[2], read_only=True).read_tokenizer(2)
