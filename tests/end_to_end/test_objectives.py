"""Other objectives of pretraining from the command line: each learns, goes on, and is the same on a mesh."""

import json

import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright

STEPS = 8
RUN = [*TINY, "model.vocab_size=288", "data.sources.synthetic.num_documents=200", f"task.num_steps={STEPS}"]
MESH = ["fake_devices=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "task.num_steps=3"]
SHOWN = {  # in the text of the next example
    "mlm": "<|mask|>⟦",
    "ul2": "⟦<extra_id_0>",
    "multi_token": None,
    "fim": "⟦",
    "prefix_lm": "⟦",
    "span_corruption": "⟦<extra_id_0>",
    "masked_diffusion": "<|mask|>⟦",
}
WHOLE = ("mlm", "ul2", "multi_token")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("objectives")


def trained(home, phase: str) -> None:
    """Makes the run of that name, unless it is there."""
    if not (home / "runs" / phase).exists():
        meshwright(home, "train", f"phase={phase}", f"run={phase}", *RUN, *([] if phase in WHOLE else MESH[-1:]))


@pytest.mark.parametrize("phase", SHOWN)
def test_it_shows_what_the_model_sees_and_is_evaluated_alike_afterwards(home, phase):
    trained(home, phase)
    shown, taken = SHOWN[phase], losses(home, phase)
    assert shown is None or shown in inspect(home, phase)["next_example"]
    if phase in WHOLE:
        found = json.loads(meshwright(home, "evaluate", f"run={phase}", "format=json")[0])
        for key in ("eval/loss", "eval/accuracy"):
            assert found[key] == pytest.approx(evaluation(home, phase)[key], rel=1e-5), key
        assert taken[STEPS] < taken[1]


def evaluation(home, run: str) -> dict[str, float]:
    return json.loads((home / "runs" / run / "summary.json").read_text())["evaluation"]


@pytest.mark.parametrize("phase", WHOLE)
def test_a_run_that_stops_goes_on_bit_for_bit(home, phase):
    trained(home, phase)
    for until in (3, STEPS):
        meshwright(home, "train", f"phase={phase}", f"run={phase}_stopped", *RUN, f"task.num_steps={until}")
    assert losses(home, f"{phase}_stopped") == losses(home, phase)
    assert evaluation(home, f"{phase}_stopped") == evaluation(home, phase)


@pytest.mark.parametrize("phase", WHOLE)
def test_a_mesh_changes_nothing(home, phase):
    trained(home, phase)
    meshwright(home, "train", f"phase={phase}", f"run={phase}_mesh", *RUN, *MESH)
    for step, loss in losses(home, f"{phase}_mesh").items():
        assert loss == pytest.approx(losses(home, phase)[step], rel=1e-5), step


@pytest.mark.parametrize("phase", ["ul2", "multi_token", "masked_diffusion"])
def test_it_writes(home, phase):
    trained(home, phase)
    asked = ["prompt=the cat ", "task.max_new_tokens=4", "task.temperature=0"]
    assert meshwright(home, "generate", f"run={phase}", *asked)[0].startswith("the cat ")


def test_modules_for_further_tokens_are_left_out_of_exports(home):
    trained(home, "multi_token")
    out, _ = meshwright(home, "convert", "from=multi_token", "to=hf:exported")
    assert "its 1 multi-token prediction modules are not exported" in out and "logits equal" in out


def test_a_model_gets_new_modules_and_a_prefix_when_it_is_begun_from(home):
    trained(home, "fim")
    kept = [a for a in RUN if not a.startswith(("model", "tokenizer", "task.num_steps"))]
    for phase in ("multi_token", "prefix_lm"):
        begun = [*kept, f"phase={phase}", "init_from=fim", "task.num_steps=2"]
        out, _ = meshwright(home, "train", f"run={phase}_next", *begun)
        assert "starts with the weights of fim, step 3" in out
    _, err = meshwright(home, "train", "run=wrong", *kept, "phase=ul2", "init_from=fim", expect=2)
    assert "needs the special tokens [R], [X], [S] and" in err


MISTAKES = {
    "an encoder does not predict": (["model.attention.mask=bidirectional"], "a bidirectional model sees; set"),
    "another transform": (["phase=mlm", "transform=diffusion"], "trains on tokens masked by transform=mlm"),
    "a causal model": (["phase=mlm", "model.attention.mask=causal"], "set model.attention.mask=bidirectional"),
    "no modules": (
        ["objective=multi_token"],
        "model.mtp_num_layers=0: objective=multi_token needs multi-token prediction modules",
    ),
    "modules for nothing": (["model.mtp_num_layers=1"], "does not train MTP modules; use objective=multi_token"),
    "conversations": (
        ["transform=fim", "data.format=chat", "data.packing=best_fit"],
        "only supports data.format=text",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(home, case):
    changes, said = MISTAKES[case]
    _, err = meshwright(home, "train", "run=wrong", *RUN, *changes, expect=2)
    assert said in err


def test_what_an_encoder_cannot_is_refused(home):
    trained(home, "mlm")
    _, err = meshwright(home, "generate", "run=mlm", "prompt=a", expect=2)
    assert "model.attention.mask=bidirectional: an encoder" in err
    _, err = meshwright(home, "convert", "from=mlm", "to=hf:encoder", expect=2)
    assert "model.attention.mask=bidirectional: transformers runs these classes as causal models" in err
