"""Mistakes that a new user makes: each is named, with the way out, and nothing is begun."""

import pytest

from tests.end_to_end.run import TINY, meshwright

MISTAKES = {
    "a misspelt key": (["optimizer.lerning_rate=1"], "did you mean 'optimizer.learning_rate'"),
    "a key in the wrong place": (["learning_rate=1"], "did you mean 'optimizer.learning_rate'"),
    "a key of another option": (
        ["experiment=hello", "tokenizer=bytes"],
        "tokenizer.vocab_size: set by the experiment",
    ),
    "a misspelt group option": (["model=tinny"], "model=tinny: no such model; did you mean 'tiny'"),
    "a misspelt option in a list": (["source=[txt]"], "source=txt: no such source; did you mean 'text'?"),
    "a word for a number": (["data.batch_size=many"], "data.batch_size=many: must be an integer"),
    "a value for a group of keys": (["data=my.jsonl"], "data=my.jsonl: is a group of keys"),
    "a number for a group of keys": (
        ["mesh=4"],
        "mesh=4: is a group of keys and takes no value; set mesh.KEY",
    ),
    "adapters and products in 8 bits": (
        ["adapter=lora", "model.matmul_precision=int8"],
        "model.matmul_precision=int8: not supported with adapter.method=lora",
    ),
    "a word that is none of the menu": (["model.remat=half"], "model.remat=half: must be one of none, full"),
    "a batch that does not divide": (
        ["fake_devices=4", "data.batch_size=6"],
        "data.batch_size=6: must be a multiple of 4 (mesh.data=4",
    ),
    "a mesh that does not fit": (["fake_devices=8", "mesh.fsdp=3"], "mesh.fsdp=3"),
    "heads that do not divide": (["fake_devices=8", "mesh.data=1", "mesh.tensor=8"], "mesh.tensor=8"),
    "a folder that is not there": (["source=[text]", "data.sources.text.paths=[nowhere]"], "'nowhere' does not exist"),
    "a source without its path": (["source=[text]"], "data.sources.text.paths=???"),
    "a negative warm-up": (
        ["schedule.warmup_steps=-5", "num_steps=10"],
        "schedule.warmup_steps=-5: must be at least 0",
    ),
    "a key of another trainer": (["max_steps=10"], "max_steps: no such key; did you mean 'num_steps'?"),
    "an option of another name": (["optimiser=adam"], "did you mean 'optimizer=adamw'?"),
    "a flag": (["--max_steps", "10"], "--max_steps: keys are written KEY=VALUE: num_steps=10"),
    "an option without its group": (["hello"], "did you mean 'experiment=hello'?"),
    "a key of another task": (["temperature=0"], "temperature is a key of generate; `train` has no such key"),
    "a run that cannot be resumed": (["resume=must"], "resume=must"),
    "a run to begin from that is not there": (["init_from=nobody"], "init_from=nobody"),
    "a name that is no name": (["run=a/b"], "run='a/b'"),
    "weights for another number of sources": (["data.mixture_weights=[1,2]"], "data.mixture_weights=[1.0, 2.0]"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named(tmp_path, arguments, said):
    _, err = meshwright(tmp_path, "train", *TINY, *arguments, expect=2)
    assert said in err
    assert "Traceback" not in err


def test_a_mistake_ends_all_processes_at_once(tmp_path):
    wrong = ["source=[text]", "data.sources.text.paths=[nowhere]", "launcher.num_processes=2", "fake_devices=2"]
    _, err = meshwright(tmp_path, "train", *TINY, *wrong, "mesh.data=2", expect=2)
    assert "'nowhere' does not exist" in err


def test_a_misspelt_task_suggests_the_right_one(tmp_path):
    _, err = meshwright(tmp_path, "trian", expect=2)
    assert "did you mean 'train'" in err


def test_a_run_that_is_not_there_lists_those_that_are(tmp_path):
    _, err = meshwright(tmp_path, "generate", "run=nobody", "prompt=x", expect=2)
    assert "run=nobody: no such run" in err


def test_the_command_alone_says_what_it_can(tmp_path):
    out, _ = meshwright(tmp_path)
    assert "train" in out and "meshwright train experiment=hello" in out
    out, _ = meshwright(tmp_path, "train", "--cfg", "job", "experiment=hello")
    assert "run: hello" in out and "kind: muon" in out


def test_bad_input_is_counted_in_the_summary(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"a text of some length, number {i}. " * 10)
    (texts / "empty.txt").write_text("")
    (texts / "binary.txt").write_bytes(b"\0\1\2")
    (texts / "latin.txt").write_bytes(b"\xfc\xe4")
    meshwright(
        tmp_path,
        "train",
        *TINY,
        "run=a",
        "source=[text]",
        f"data.sources.text.paths=[{texts}]",
        "data.sources.text.validation_fraction=0.2",
        "task.num_steps=2",
    )
    import json

    bad = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())["bad_records"]["text"]
    assert {file.rsplit("/", 1)[1]: list(reasons) for file, reasons in bad.items()} == {
        "empty.txt": ["empty file"],
        "binary.txt": ["binary"],
        "latin.txt": ["not UTF-8"],
    }


def test_a_tokenizer_is_made_anew_until_a_checkpoint_depends_on_it(tmp_path):
    (tmp_path / "a.txt").write_text("one two three. " * 500)
    arguments = ["source=[text]", f"data.sources.text.paths=[{tmp_path / 'a.txt'}]", "tokenizer=sentencepiece"]
    out, _ = meshwright(tmp_path, "prepare", *arguments, "tokenizer.vocab_size=300")
    assert "building the tokenizer" in out
    out, _ = meshwright(tmp_path, "prepare", *arguments, "tokenizer.vocab_size=300")
    assert "building the tokenizer" not in out
    out, _ = meshwright(tmp_path, "prepare", *arguments, "tokenizer.vocab_size=310")
    assert "building the tokenizer" in out
