"""Learning rate schedules: warmup, shapes and their errors."""

import math

import numpy as np
import pytest
from omegaconf import OmegaConf

from configs.ranges import check_ranges
from trainer.schedule import (
    ConstantConfig,
    CosineConfig,
    Decay,
    InverseSqrtConfig,
    LinearConfig,
    ScheduleConfig,
    WsdConfig,
)

ALL = [CosineConfig, LinearConfig, ConstantConfig, WsdConfig, InverseSqrtConfig]


@pytest.mark.parametrize("cls", ALL)
def test_warmup_rises_from_above_zero_to_the_peak(cls: type[ScheduleConfig]) -> None:
    schedule = cls(warmup_steps=4).build(2.0, 100)
    np.testing.assert_allclose([schedule(s) for s in range(5)], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)


@pytest.mark.parametrize("cls", ALL)
def test_without_warmup_the_first_update_has_the_peak(cls: type[ScheduleConfig]) -> None:
    assert float(cls(warmup_steps=0).build(3.0, 10)(0)) == 3.0


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (CosineConfig(warmup_steps=20, min_lr_ratio=0.1), {20: 1.0, 60: 0.55, 100: 0.1, 500: 0.1}),
        (LinearConfig(warmup_steps=20), {20: 1.0, 40: 0.75, 100: 0.0, 500: 0.0}),
        (ConstantConfig(warmup_steps=20), {20: 1.0, 100: 1.0, 500: 1.0}),
        (WsdConfig(warmup_steps=20), {20: 1.0, 80: 1.0, 90: 0.5, 100: 0.0, 500: 0.0}),
        (WsdConfig(warmup_steps=20, decay_steps=40, min_lr_ratio=0.5), {60: 1.0, 80: 0.75, 100: 0.5}),
        (WsdConfig(warmup_steps=0, decay_steps=40, decay=Decay.cosine), {60: 1.0, 80: 0.5, 100: 0.0}),
        (WsdConfig(warmup_steps=0, decay_steps=100, decay=Decay.one_minus_sqrt), {0: 1.0, 25: 0.5, 100: 0.0}),
        (InverseSqrtConfig(warmup_steps=25), {25: 1.0, 100: 0.5, 400: 0.25}),
    ],
)
def test_schedule_values(config: ScheduleConfig, values: dict[int, float]) -> None:
    schedule = config.build(2.0, 100)
    for step, share in values.items():
        assert math.isclose(float(schedule(step)), 2.0 * share, abs_tol=1e-6), step


@pytest.mark.parametrize("cls", ALL)
def test_a_warmup_longer_than_the_run_is_shortened_to_it(cls: type[ScheduleConfig]) -> None:
    config, short = cls(warmup_steps=110), cls(warmup_steps=110).fitted(10)
    assert 0 < short.warmup_steps + short.num_decay(10) <= 10
    assert f"warm-up 110 to {short.warmup_steps} steps" in (config.shortened(10) or "")
    assert float(config.build(1.0, 10)(0)) == float(short.build(1.0, 10)(0)) > 0
    assert short.fitted(10) == short and short.shortened(10) is None


def test_a_warmup_and_a_decay_keep_their_proportion_when_they_are_shortened() -> None:
    given = (
        (WsdConfig(warmup_steps=10, decay_steps=90), 10, (1, 9)),
        (WsdConfig(warmup_steps=2, decay_fraction=0.9), 10, (1, 8)),
        (WsdConfig(warmup_steps=30, decay_fraction=0.5), 20, (15, 5)),
    )
    for config, num_steps, parts in given:
        short = config.fitted(num_steps)
        assert (short.warmup_steps, short.num_decay(num_steps)) == parts
    fits = WsdConfig(warmup_steps=2, decay_steps=8)
    assert fits.fitted(10) is fits and fits.shortened(10) is None


@pytest.mark.parametrize("cls", ALL)
def test_a_value_that_no_run_can_have_is_refused(cls: type[ScheduleConfig]) -> None:
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps=-1: .*nearest valid: 0"):
        check_ranges(cls(warmup_steps=-1), "schedule")
    with pytest.raises(ValueError, match=r"schedule\.decay_steps=-9: .*nearest valid: 0"):
        check_ranges(WsdConfig(warmup_steps=2, decay_steps=-9), "schedule")
    with pytest.raises(ValueError, match=r"schedule\.decay_fraction=1\.9: .*nearest valid: 1"):
        check_ranges(WsdConfig(warmup_steps=2, decay_fraction=1.9), "schedule")
    with pytest.raises(ValueError, match=r"schedule\.min_lr_ratio=2"):
        check_ranges(CosineConfig(warmup_steps=2, min_lr_ratio=2), "schedule")


@pytest.mark.parametrize("cls", ALL)
def test_configs_are_structured(cls: type[ScheduleConfig]) -> None:
    assert OmegaConf.to_object(OmegaConf.structured(cls)) == cls()
