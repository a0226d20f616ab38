"""Learning rate schedules: warmup, shapes and their errors."""

import math

import numpy as np
import pytest
from omegaconf import OmegaConf

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
def test_a_warmup_longer_than_the_run_is_refused(cls: type[ScheduleConfig]) -> None:
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps=11: .*task\.num_steps=10.*nearest valid: 10"):
        cls(warmup_steps=11).build(1.0, 10)


def test_a_decay_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.decay_steps=9: .*nearest valid: 8"):
        WsdConfig(warmup_steps=2, decay_steps=9).build(1.0, 10)
    with pytest.raises(ValueError, match=r"schedule\.decay_fraction=0\.9: .*nearest valid: 0\.8"):
        WsdConfig(warmup_steps=2, decay_fraction=0.9).build(1.0, 10)
    with pytest.raises(ValueError, match=r"schedule\.final_fraction=2"):
        CosineConfig(warmup_steps=2, min_lr_ratio=2).build(1.0, 10)


@pytest.mark.parametrize("cls", ALL)
def test_configs_are_structured(cls: type[ScheduleConfig]) -> None:
    assert OmegaConf.to_object(OmegaConf.structured(cls)) == cls()
