"""Scaling laws: their fit beside published constants, what they recommend, and the ladder and the coordinate check from
the command line.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from configs.schema import register, to_typed
from launch.cli import run
from launch.plotting import draw_law
from launch.scaling.law import (
    CHINCHILLA,
    Law,
    Point,
    _value,
    compute_optimal,
    fit_law,
    leave_one_out_fits,
    read_law,
    spread,
)
from launch.scaling.rungs import counted_params, recommend, rungs, sizes, with_keys
from launch.tasks import scaling_ladder as ladder
from models.flops import flops_per_token

HOFFMANN = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)  # 2203.15556, equation 10
SIZES, RATIOS = (1e7, 3e7, 1e8, 3e8, 1e9), (5.0, 20.0, 80.0)
TINY = [
    "source=[synthetic]", "tokenizer=bytes", "model=tiny", "model.dtype=float32", "data.seq_len=32",
    "data.batch_size=8",
]  # fmt: skip


def points(law: Law, noise: float = 0.0, sizes=SIZES, ratios=RATIOS, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    pairs = [(n, ratio * n) for n in sizes for ratio in ratios]
    return [Point(n, d, 6 * n * d, float(law.loss(n, d) * np.exp(noise * rng.normal()))) for n, d in pairs]


def config_of(*overrides):
    register()
    with initialize_config_module(config_module="configs", version_base="1.3"):
        return to_typed(compose("root", overrides=["task=scaling_ladder", *TINY, *overrides]))


def test_the_published_constants_are_found_again_in_losses_that_they_gave():
    assert fit_law(points(HOFFMANN)) == pytest.approx(HOFFMANN, rel=1e-4)


def test_noise_moves_the_law_as_little_as_its_spread_says():
    noisy = points(HOFFMANN, noise=2e-3)
    law = fit_law(noisy)
    others = leave_one_out_fits(noisy, law)
    assert len(others) == len(noisy)
    assert pytest.approx(HOFFMANN.E, abs=0.05) == law.E
    assert (law.alpha, law.beta) == pytest.approx((HOFFMANN.alpha, HOFFMANN.beta), abs=0.03)
    optimum = lambda law: compute_optimal(1e22, law).parameters
    low, high = spread(others, optimum)
    assert low < optimum(law) < high and low / 1.5 < optimum(HOFFMANN) < high * 1.5


def test_one_wild_run_hardly_moves_the_law():
    wild = points(HOFFMANN)
    wild[7] = wild[7]._replace(loss=1.3 * wild[7].loss)
    law = fit_law(wild)
    assert (law.E, law.alpha, law.beta) == pytest.approx((HOFFMANN.E, HOFFMANN.alpha, HOFFMANN.beta), rel=0.02)


def test_the_gradient_of_the_fit_is_that_of_its_value():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 2)) + 10
    theta = np.array([[0.5, 6.0, 0.34, 5.0, 0.28]])
    _, gradient = _value(theta, x, y[:, 0] / 12)
    for i, eps in enumerate([1e-6] * 5):
        step = np.eye(5)[i][None] * eps
        high, low = (_value(theta + sign * step, x, y[:, 0] / 12)[0][0] for sign in (1, -1))
        assert gradient[0, i] == pytest.approx((high - low) / (2 * eps), rel=1e-4)


def test_one_ratio_of_tokens_gives_a_law_of_compute():
    true = Law(E=2.0, A=30.0, alpha=0.1)
    pairs = [(n, 20 * n) for n in np.geomspace(1e6, 1e9, 6)]
    found = fit_law([Point(n, d, 6 * n * d, float(true.loss(6 * n * d))) for n, d in pairs])
    assert found.is_compute_law and found == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (points(HOFFMANN, sizes=(1e7, 1e8), ratios=(5.0, 20.0)), "requires at least 6"),
        (points(HOFFMANN, sizes=(1e7, 1e8)), "at least three different numbers of parameters"),
        (points(HOFFMANN, ratios=(20.0,))[:3], "requires at least 4"),
    ],
)
def test_too_few_runs_are_refused(which, said):
    with pytest.raises(ValueError, match=said):
        fit_law(which)


def test_a_law_by_which_nothing_falls_recommends_nothing():
    with pytest.raises(ValueError, match="does not decrease with size and tokens"):
        recommend(HOFFMANN._replace(beta=-0.1), [], [], 1e20)


def test_a_recommendation_costs_the_budget_and_no_other_size_is_better():
    config = config_of("model.vocab_size=512", "task.aspect_ratio=32")
    budget = 1e16
    family = sizes(config, config.model, budget)
    best = recommend(CHINCHILLA, [CHINCHILLA._replace(alpha=0.36), HOFFMANN], family, budget)
    model = with_keys(config.model, best.keys)
    assert model.num_layers == round(model.embed_dim / 32)
    assert best.parameters == counted_params(model)
    assert best.tokens * flops_per_token(model, config.data.seq_len) == pytest.approx(budget)
    for size in family:
        assert CHINCHILLA.loss(size.parameters, budget / size.flops_per_token) >= best.loss
    assert best.parameters == pytest.approx(compute_optimal(budget).parameters, rel=0.35)  # 6 N D knows no attention
    low, high = best.parameters_spread
    assert low <= best.parameters <= high or low <= high


def test_rungs_keep_the_keys_of_the_command_and_their_own_come_last():
    config = config_of("task.widths=[64,32]", "task.tokens_per_param=[20,5]")
    found = rungs(config)
    assert [rung.run for rung in found] == ["default-w32-t5", "default-w32-t20", "default-w64-t5", "default-w64-t20"]
    assert found[0].keys == {
        "embed_dim": 32, "attention.num_heads": 2, "attention.num_kv_heads": 2, "mlp.intermediate_dim": 128,
    }  # fmt: skip
    assert found[0].tokens == found[0].num_steps * 8 * 32
    assert found[0].tokens == pytest.approx(5 * found[0].parameters, rel=0.01)
    given = [
        "task=scaling_ladder",
        "optimizer.learning_rate=1e-2",
        "task.compute_budget=1e20",
        "task.log_every=5",
        "run=x",
    ]
    made = ladder.arguments(config, given, found[0])
    assert made[:3] == ["optimizer.learning_rate=1e-2", "task.log_every=5", "task.sample_tokens=0"]
    assert made[-1] == "run=default-w32-t5" and f"task.num_steps={found[0].num_steps}" in made


@pytest.mark.parametrize(
    ("key", "said"),
    [("task.widths=[]", "at least one"), ("task.widths=[72]", "number of heads must be an integer"),
     ("init_from=x", "random initialization"),
     ("task.compute_budget=-1", "must be above 0")],
)  # fmt: skip
def test_a_ladder_that_cannot_be_is_refused(key, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["scaling_ladder", *TINY, key]) == 2
    assert said in capsys.readouterr().err


def test_finished_rungs_are_kept_and_make_a_law(tmp_path, monkeypatch, capsys):
    """Without training: a rung's child is played by one that writes the loss of a known law."""
    monkeypatch.chdir(tmp_path)
    started, all_rungs = [], {r.run: r for r in rungs(config_of("task.widths=[32,64,128]", "run=l"))}

    def child(command, **_):
        keys = dict(a.split("=", 1) for a in command[command.index("train") + 1 :])
        started.append(keys["run"])
        folder = tmp_path / "runs" / keys["run"]
        rung = all_rungs[keys["run"]]
        loss = float(HOFFMANN.loss(rung.parameters, rung.tokens))
        summary = {"ended": "done", "step": int(keys["task.num_steps"]), "evaluation": {"eval/loss": loss}}
        (folder / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(ladder.subprocess, "Popen", child)
    monkeypatch.setattr(ladder, "load_tokenizer", lambda folder: SimpleNamespace(vocab_size=512))
    command = [
        "scaling_ladder",
        *TINY,
        "task.widths=[32,64,128]",
        "run=l",
        "compute_budget=1e13",
        "task.aspect_ratio=null",
    ]
    assert run(command) == 0 and len(started) == 9
    report = json.loads((tmp_path / "runs/ladders/l.json").read_text())
    assert report["law"] == pytest.approx(HOFFMANN._asdict(), rel=1e-3)
    assert report["recommendation"]["flops"] == 1e13
    assert (tmp_path / "runs/ladders/l.png").stat().st_size > 10_000
    assert read_law(tmp_path / "runs/ladders/l.json") == pytest.approx(HOFFMANN, rel=1e-3)
    assert run(command) == 0 and len(started) == 9 and "(already trained)" in capsys.readouterr().out
    assert run([*command, "optimizer.learning_rate=0.5"]) == 2
    assert "optimizer.learning_rate=0.5" in capsys.readouterr().err
    law = "task.scaling_law=runs/ladders/l.json"
    plan = ["plan", "model=tiny", "model.vocab_size=512", "data.batch_size=8", "mesh.data=8", "format=json", law]
    assert run(plan) == 0
    found = json.loads(capsys.readouterr().out)
    optimum = compute_optimal(found["budget"]["flops"], HOFFMANN)
    assert found["compute_optimal"]["parameters"] == pytest.approx(optimum.parameters, rel=1e-2)
    assert found["compute_optimal"]["law"] == "runs/ladders/l.json"


def test_a_rung_that_fails_ends_the_ladder_with_its_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ladder.subprocess, "Popen", lambda *_, **__: SimpleNamespace(wait=lambda: 2))
    assert run(["scaling_ladder", *TINY, "task.widths=[32,64,128]"]) == 2
    assert "default-w32-t10: exited with code 2" in capsys.readouterr().err


def test_a_law_of_compute_is_drawn_too(tmp_path):
    config = config_of("model.vocab_size=512")
    family = sizes(config, config.model, 1e15)
    law = Law(E=2.0, A=30.0, alpha=0.1)
    best = recommend(law, [law], family, 1e15, 20.0)
    draw_law(points(HOFFMANN, ratios=(20.0,)), law, [law], family, best, 20.0, tmp_path / "law.png", "law")
    assert (tmp_path / "law.png").stat().st_size > 10_000
    assert best.tokens / best.parameters == pytest.approx(20, rel=0.25)


def test_coordinates_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["coord_check", *TINY, "task.widths=[32,64]", "model.num_layers=1", "task.num_steps=2", "run=c"]
    assert run([*command, "optimizer.learning_rate=1e-2"]) == 0
    report = json.loads((tmp_path / "runs/coord_check/c.json").read_text())
    assert set(report["slopes"]) == {"base_width=32", "standard"}
    assert report["moved"]["base_width=32"][0] == report["moved"]["standard"][0]  # at the base they are one
    assert report["slopes"]["standard"]["logits"] > report["slopes"]["base_width=32"]["logits"]
    assert (tmp_path / "runs/coord_check/c.png").stat().st_size > 10_000
    assert "slope" in capsys.readouterr().out
    assert run([*command, "task.widths=[32]"]) == 2 and "two distinct widths" in capsys.readouterr().err
