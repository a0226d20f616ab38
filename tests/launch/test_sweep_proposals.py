"""Sweep proposals, pruning and plots."""

import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from configs.ranges import check_ranges
from configs.schema import register
from configs.sweeps import Method, Mode, Pruning, SweepSearchConfig
from launch.plotting import draw_sweep
from launch.sweeps.space import (
    Range,
    Space,
    Values,
    corner_points,
    format_value,
    grid,
    is_sweep_override,
    read_space,
    split_varying_keys,
)
from launch.sweeps.study import DONE, FAILED, PRUNED, Study, Trial, best_of, grid_points, ranked

RATE, LAYERS = "optimizer.learning_rate", "model.num_layers"
WIDE: dict = {RATE: Range(1e-5, 1.0, True, False), LAYERS: Range(1, 8, False, True), "seed": Values(("1", "2", "3"))}


def study(folder: Path | None, **settings) -> Study:
    search = SweepSearchConfig(**{"parameters": {"a": "b"}, "method": Method.random, "trials": 8} | settings)
    return Study(folder, "s", search, WIDE, num_steps=100)


def bowl(trial: Trial) -> float:
    return (math.log10(float(trial.params[RATE])) + 2) ** 2 + 0.1 * abs(int(trial.params[LAYERS]) - 4)


def carried_out(one: Study, most: int = 1000) -> list[dict[str, str]]:
    """Runs the study with a quadratic objective. Returns the proposed parameters."""
    found = []
    while len(found) < most and (trial := one.next()) is not None:
        found.append(trial.params)
        one.tell(trial, DONE, value=bowl(trial))
    return found


@pytest.mark.parametrize("method", [Method.random, Method.tpe])
def test_a_sweep_that_was_cut_off_proposes_what_an_unbroken_one_does(tmp_path, method):
    unbroken = carried_out(study(None, method=method, trials=12))
    first = carried_out(study(tmp_path, method=method, trials=12), most=5)
    rest = carried_out(study(tmp_path, method=method, trials=12))
    assert len(unbroken) == 12 and first + rest == unbroken
    assert carried_out(study(None, method=method, trials=12, seed=7)) != unbroken


def test_more_trials_leave_the_first_ones_as_they_were(tmp_path):
    assert carried_out(study(None, trials=9))[:4] == carried_out(study(None, trials=4))


def test_proposals_lie_in_the_space_and_fill_it():
    found = carried_out(study(None, trials=200))
    rates = [float(params[RATE]) for params in found]
    assert all(1e-5 <= rate <= 1 for rate in rates)
    assert 60 < sum(rate < 10**-2.5 for rate in rates) < 140  # half of a logarithmic range
    assert {params[LAYERS] for params in found} == {str(n) for n in range(1, 9)}
    assert {params["seed"] for params in found} == {"1", "2", "3"}


def test_bayes_finds_more_than_chance():
    for seed in range(2):
        best = {}
        for method in (Method.tpe, Method.random):
            one = study(None, method=method, trials=40, seed=seed)
            carried_out(one)
            found = [trial.value for trial in one.trials()[20:]]
            best[method] = sum(found) / len(found)
        assert best[Method.tpe] < 0.5 * best[Method.random]


def test_what_was_tried_is_not_tried_again():
    search = SweepSearchConfig(method=Method.random, trials=50)
    one = Study(None, "s", search, {"a": Values(("1", "2")), "b": Values(("x", "y", "z"))}, num_steps=10)
    found = []
    while (trial := one.next()) is not None:
        found.append(tuple(trial.params.values()))
        one.tell(trial, FAILED)
    assert sorted(found) == [("1", "x"), ("1", "y"), ("1", "z"), ("2", "x"), ("2", "y"), ("2", "z")]
    assert len(one.trials()) == 6


def test_a_grid_is_every_combination_in_order(tmp_path):
    space = {"a": Values(("1", "2")), "b": Values(("x", "y"))}
    wanted = [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "2", "b": "x"}, {"a": "2", "b": "y"}]
    assert list(grid(space)) == wanted
    search, found = SweepSearchConfig(), []
    for _ in range(2):  # the second iteration resumes the study
        one = Study(tmp_path, "g", search, space, num_steps=10)
        while len(found) < 3 and (trial := one.next()) is not None:
            found.append(trial.params)
            one.tell(trial, DONE, value=1.0)
    one = Study(tmp_path, "g", search, space, num_steps=10)
    last = one.next()
    assert last is not None and [*found, last.params] == wanted and one.next() is None


def test_kinds_hold_each_value_and_both_ends():
    found = list(corner_points({"a": Values(("1", "2", "3")), "b": Range(0.1, 10, True, False)}))
    assert {values["a"] for values in found} == {"1", "2", "3"} and {values["b"] for values in found} == {"0.1", "10"}
    assert len(found) == 4


def test_a_number_has_four_figures_and_stays_in_its_range():
    assert format_value(Range(1e-4, 1.0, True, False), 0.000316227766) == "0.0003162"
    assert format_value(Range(0.123456, 1.0, False, False), 0.123457) == "0.1235"
    assert format_value(Range(0.0, 0.99999, False, False), 0.99998) == "0.99998"  # else 1
    assert format_value(Range(1, 8, False, True), 3.0) == "3"


@pytest.mark.parametrize(
    ("override", "several"),
    {
        f"{RATE}=log:1e-4..1e-2": True,
        "model.num_layers=2..8": True,
        "model.num_layers=2,4": True,
        "optimizer=adamw,muon": True,
        "data.mix=[1,2],[3,4]": True,
        "source=[text,jsonl]": False,
        "data.sources.text.paths=[../a..b]": False,
        "data.sources.text.path=a..b": False,
        "task.sample_prompt=one, two": False,
        "~experiment": False,
    }.items(),
)
def test_sweep_overrides_are_recognized(override, several):
    assert is_sweep_override(override) is several
    assert (override in split_varying_keys([override])) is not several


@pytest.fixture(scope="module")
def plain():
    """Returns a composed config of a run."""
    register()
    with initialize_config_module(config_module="configs", version_base="1.3"):
        return compose("root", overrides=["model=tiny"])


NO_SPACES = {
    f"{RATE}=1e-2..1e-4": "the lower end of a range must be less than the upper end",
    f"{RATE}=log:0..1": "a logarithmic range must start above 0",
    f"{RATE}=1e-4..big": "'big' is not a number",
    f"{RATE}=interval(0,1)": f"write a range as {RATE}=LOW..HIGH",
    f"{LAYERS}=1.5..4": "this key is an integer; both ends of the range must be integers",
    "optimizer=1..2": "this key is not numeric; list its values",
    "model.tied_embeddings=0..1": "this key is not numeric; list its values",
    "seed=3": "seed=3: a single value; to sweep it, give values, seed=2,4,8, or a range",
    "run=a,b": "run=a,b: must be the same in all trials",
    "launcher=local,slurm": "launcher=local,slurm: must be the same in all trials",
    "launcher.max_restarts=1..3": "launcher.max_restarts=1..3: must be the same in all trials",
    "task.sweep.trials=1,2": "task.sweep.trials=1,2: must be the same in all trials",
}


@pytest.mark.parametrize(("given", "said"), NO_SPACES.items())
def test_what_is_no_space_is_refused_by_name(plain, given, said):
    key, _, text = given.partition("=")
    with pytest.raises(ValueError) as refused:
        read_space({key: text}, plain)
    assert str(refused.value).startswith(key) and said in str(refused.value)


def test_a_key_tells_whether_its_range_is_of_whole_numbers(plain):
    found = read_space({RATE: "0..1", LAYERS: "1..8", "optimizer": "adamw,muon", "data.batch_size": "log:8..64"}, plain)
    assert found[RATE] == Range(0.0, 1.0, False, False) and found[LAYERS] == Range(1.0, 8.0, False, True)
    assert found["optimizer"] == Values(("adamw", "muon"))
    assert found["data.batch_size"] == Range(8.0, 64.0, True, True)


def test_a_grid_is_taken_whole_and_has_no_ranges():
    seeds: Space = {"seed": Values(("1", "2", "3"))}
    with pytest.raises(ValueError, match=r"sweep.trials=2: the grid has 3 points; remove sweep.trials to run all"):
        grid_points(SweepSearchConfig(trials=2), seeds)
    ranged: Space = {RATE: Range(1e-4, 1e-2, True, False)}
    with pytest.raises(ValueError, match=f"a grid needs a list of values, such as {RATE}=0.0001,0.001,0.01"):
        grid_points(SweepSearchConfig(method=Method.grid), ranged)
    assert grid_points(SweepSearchConfig(), ranged) == [] and len(grid_points(SweepSearchConfig(), seeds)) == 3


def test_numbers_that_have_no_sense_are_refused():
    for key in ("trials", "max_concurrent_trials"):
        with pytest.raises(ValueError, match=f"sweep.{key}=0: must be at least 1"):
            check_ranges(SweepSearchConfig(parameters={"seed": "1,2"}, **{key: 0}), "sweep")


def test_a_goal_of_max_turns_the_order_round():
    states = [(DONE, 2.0), (PRUNED, None), (DONE, 3.0), (FAILED, None), (DONE, 1.0)]
    found = [Trial(i, f"a-{i:03d}", state, {}, value, {5: 9.0}) for i, (state, value) in enumerate(states)]
    for goal, order in ((Mode.max, [2, 0, 4, 1, 3]), (Mode.min, [4, 0, 2, 1, 3])):
        search = SweepSearchConfig(mode=goal)
        assert [trial.number for trial in ranked(found, search)] == order
        best = best_of(found, search)
        assert best is not None and best.number == order[0]


@pytest.mark.parametrize("pruning", [Pruning.median, Pruning.hyperband])
def test_pruning_ends_what_is_worse_after_the_steps_that_all_get(tmp_path, pruning):
    one, steps = study(tmp_path, trials=20, pruning=pruning, warmup_steps=9), []
    while (trial := one.next()) is not None:
        # A second Study object, as after a restart, with nothing in memory.
        again = study(tmp_path, trials=20, pruning=pruning, warmup_steps=9)
        step, ended = 0, False
        while step < 81 and not ended:
            step += 3
            ended = again.report(trial, {step: bowl(trial) + 1 / step})
        one.tell(trial, PRUNED if ended else DONE, value=None if ended else bowl(trial))
        steps.append((bowl(trial), step))
    assert min(step for _, step in steps) >= 9
    cut = [value for value, step in steps if step < 81]
    assert len(cut) >= 5 and sum(step for _, step in steps) < 0.7 * 20 * 81
    assert sum(value > sorted(steps)[6][0] for value in cut) > 0.7 * len(cut)  # mostly of the worse two thirds
    assert min(steps)[1] == 81  # the best one is there to the end


def test_the_picture_shows_what_there_is(tmp_path):
    search, picture = SweepSearchConfig(), tmp_path / "sweep.png"
    one = study(tmp_path, trials=9)
    assert not draw_sweep(one.trials(), WIDE, search, picture, title="nothing")
    for i in range(9):
        trial = one.next()
        assert trial is not None
        one.report(trial, {10: bowl(trial) + 1, 20: bowl(trial)})
        state = (DONE, PRUNED, FAILED)[i % 3]
        one.tell(trial, state, value=bowl(trial) if state == DONE else None, message="lost" if state == FAILED else "")
    assert draw_sweep(one.trials(), WIDE, search, picture, title="some")
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[:2] == (860, 1400) and pixels[..., :3].std() > 0.05
