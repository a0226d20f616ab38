"""Loss spikes: dropped updates, their limits, and the policies."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from configs.ranges import check_ranges
from tests.trainer import toy
from tests.trainer.test_step import new_state, step_with
from trainer.reliability.loss_spikes import (
    NO_LIMITS,
    LossSpikeConfig,
    LossSpikeDetector,
    Rollback,
    SpikePolicy,
    TooManyRollbacks,
)

CONFIG = LossSpikeConfig(policy=SpikePolicy.skip, num_std=6.0, window=8, max_rollbacks=3)


def metrics(loss, dropped=0.0):
    return {"loss": loss, "grad_norm": 1.0, "dropped": dropped}


def watch_of(config=CONFIG, *, before=None):
    messages = []
    return LossSpikeDetector(config, say=messages.append, before=lambda step: before), messages


def losses(count, seed=0):
    return (2 + 0.1 * np.random.default_rng(seed).standard_normal(count)).tolist()


@pytest.mark.parametrize("limits", [[np.inf, 1e-6], [1e-6, np.inf]], ids=["gradient", "loss"])
def test_update_above_a_limit_changes_only_the_step(limits):
    state, batch = new_state(), toy.batch(8)
    after, logged = step_with()(state, {}, batch, np.float32(limits))
    assert logged["dropped"] == 1 and after.step == state.step + 1
    for new, old in zip(
        jax.tree.leaves((after.params, after.opt_state)), jax.tree.leaves((state.params, state.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(new, old)


def test_unreached_limits_change_no_bit():
    with_limits, logged = step_with()(new_state(), {}, toy.batch(8), NO_LIMITS)
    without, _ = step_with()(new_state(), {}, toy.batch(8))
    assert logged["dropped"] == 0
    for a, b in zip(jax.tree.leaves(with_limits.params), jax.tree.leaves(without.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_non_finite_updates_are_dropped_under_any_limits():
    state = new_state()
    corrupted = replace(state, params=state.params | {"head": state.params["head"] * np.nan})
    after, logged = step_with()(corrupted, {}, toy.batch(8), NO_LIMITS)
    assert logged["dropped"] == 1
    np.testing.assert_array_equal(after.params["embedding"], state.params["embedding"])


def test_limits_are_mean_plus_std_of_the_window_without_the_update_in_flight():
    watch, _ = watch_of()
    values = losses(20)
    for step, loss in enumerate(values, 1):
        watch.observe(step, metrics(loss))
    known = np.asarray(values[19 - 8 : 19])  # the last of 20 was in flight when update 21 was dispatched
    np.testing.assert_allclose(watch.limits(21)[0], known.mean() + 6 * known.std(), rtol=1e-6)


def test_no_spikes_before_half_of_the_window_is_known():
    watch, messages = watch_of()
    for step, loss in enumerate([2.0, 2.0, 2.0, 1e6], 1):
        assert (watch.limits(step) == np.inf).all()
        watch.observe(step, metrics(loss))
    assert not messages


def test_resumed_run_has_the_limits_of_the_uninterrupted_run():
    values, saved_at = losses(30), 17
    uninterrupted, _ = watch_of()
    limits, saved = {}, None

    def step(watch, number):
        guarded = watch.guard(lambda state, frozen, batch, limits: (limits, metrics(values[number - 1])), number - 1)
        found, logged = guarded(None, {}, None)
        return found, logged

    in_flight = None
    for number in range(1, 31):  # one loop iteration: hooks, step, then the values of the previous step
        if number - 1 == saved_at:
            saved = uninterrupted.get_state(saved_at)
        limits[number], logged = step(uninterrupted, number)
        if in_flight is not None:
            uninterrupted.observe(number - 1, in_flight)
        in_flight = logged
    resumed, _ = watch_of()
    resumed.set_state(saved)
    in_flight = None
    for number in range(saved_at + 1, 31):
        found, logged = step(resumed, number)
        np.testing.assert_array_equal(found, limits[number])
        if in_flight is not None:
            resumed.observe(number - 1, in_flight)
        in_flight = logged


def test_dropped_update_is_logged_and_does_not_raise_the_limits():
    watch, messages = watch_of()
    for step, loss in enumerate(losses(20), 1):
        watch.observe(step, metrics(loss))
    before = watch.limits(30)
    watch.observe(21, metrics(9.0, dropped=1.0))
    np.testing.assert_array_equal(watch.limits(30), before)
    assert messages[0].startswith("step 21: update dropped: loss 9 above 2.")


def test_spike_is_only_logged_under_warn():
    watch, messages = watch_of(replace(CONFIG, policy=SpikePolicy.warn))
    guarded = watch.guard(lambda state, frozen, batch, limits: (limits, metrics(2.0)), 20)
    for step, loss in enumerate(losses(20), 1):
        watch.observe(step, metrics(loss))
    assert (guarded(None, {}, None)[0] == np.inf).all()
    watch.observe(21, metrics(9.0))
    assert "spike: loss 9 above" in messages[0] and "loss_spikes.policy=skip" in messages[0]


def test_run_stops_after_too_many_consecutive_dropped_updates():
    watch, _ = watch_of()
    for step in (1, 2):
        watch.observe(step, metrics(np.nan, dropped=1.0))
    watch.observe(3, metrics(2.0))  # an applied update resets the count
    for step in (4, 5):
        watch.observe(step, metrics(np.nan, dropped=1.0))
    with pytest.raises(TooManyRollbacks, match=r"loss_spikes.max_rollbacks=3.*step 6.*loss nan"):
        watch.observe(6, metrics(np.nan, dropped=1.0))


def test_rollback_needs_a_checkpoint_before_the_spike():
    config = replace(CONFIG, policy=SpikePolicy.rollback)
    watch, _ = watch_of(config, before=4)
    with pytest.raises(Rollback) as found:
        watch.observe(7, metrics(np.inf, dropped=1.0))
    assert (found.value.step, found.value.to) == (7, 4)
    without, messages = watch_of(config)
    without.observe(7, metrics(np.inf, dropped=1.0))
    assert "update dropped" in messages[0]


@pytest.mark.parametrize("wrong", [{"num_std": 0.0}, {"window": 1}, {"max_rollbacks": 0}])
def test_invalid_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"loss_spikes.{next(iter(wrong))}="):
        check_ranges(replace(CONFIG, **wrong), "loss_spikes")
