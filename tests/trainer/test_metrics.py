"""Derived metrics against hand-computed values, and goodput accounting."""

import json
import math

import jax
import pytest

from trainer.metrics import Peak, TrainMetrics, bits_per_byte, measure_matmul, memory, peak, published_peak
from trainer.reliability.goodput import CATEGORIES, GoodputRecorder, duration


class Clock:
    def __init__(self, now: float = 100.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def train_metrics() -> TrainMetrics:
    return TrainMetrics(tokens_per_step=512, flops_per_token=1e6, peak=Peak(1e10, "for the test"))


def test_metrics_have_their_logged_names():
    metrics = {"loss": 2.5, "nll": 2.0, "accuracy": 0.4, "bytes": 4.0, "tokens": 500.0, "grad_norm": 1.5}
    timing = {"step": 0.25, "dispatch": 0.001, "device_wait": 0.2, "data_wait": 0.01, "hooks": 0.0}
    named = train_metrics()(3, metrics, timing)
    assert named["train/loss"] == 2.5 and named["train/accuracy"] == 0.4 and named["train/grad_norm"] == 1.5
    assert named["train/bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 4.0)
    assert named["train/perplexity"] == pytest.approx(math.exp(2.0))
    assert named["train/tokens"] == 3 * 512 and named["train/target_tokens"] == 500
    assert named["perf/tokens_per_second"] == 2048
    assert named["perf/mfu"] == pytest.approx(2048 * 1e6 / 1e10)
    times = ("perf/step_time", "perf/dispatch_time", "perf/device_time", "perf/data_wait")
    assert [named[key] for key in times] == [0.25, 0.001, 0.2, 0.01]


def test_diverged_loss_does_not_break_the_metrics():
    named = train_metrics()(1, {"loss": math.inf, "nll": 1e5, "bytes": 0.0}, {"step": 0.0})
    assert named["train/perplexity"] == math.inf and math.isnan(named["train/bits_per_byte"])
    assert "perf/mfu" not in named


def test_token_count_continues_after_a_resume_with_another_batch_size():
    before = train_metrics()
    saved = json.loads(json.dumps(before.get_state(10)))
    after = TrainMetrics(tokens_per_step=1024, flops_per_token=1.0, peak=Peak(0.0, ""))
    after.set_state(saved)
    assert after.tokens(10) == 5120 and after.tokens(12) == 5120 + 2048


def test_longest_device_name_wins_and_unknown_devices_have_no_peak():
    assert published_peak("NVIDIA H100 PCIe") == 756e12
    assert published_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert published_peak("NVIDIA L40S") == 362e12 and published_peak("NVIDIA L4") == 121e12
    assert published_peak("TPU v5 lite") == 197e12 and published_peak("TPU v5p") == 459e12
    assert published_peak("cpu") is None


def test_cpu_peak_is_measured_and_described():
    measured = measure_matmul(size=128, seconds=0.01)
    assert 1e8 < measured < 1e15
    found = peak("float32")
    assert found.flops_per_second > 1e9 and "matmul" in found.description


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)


def test_memory_is_reported():
    found = memory()
    assert found and all(value > 1e6 for value in found.values()) and jax.local_devices()


def test_every_second_belongs_to_the_innermost_phase():
    clock = Clock()
    ledger = GoodputRecorder(clock=clock)
    clock.now += 1  # other
    with ledger.phase("step"):
        clock.now += 10
        with ledger.phase("checkpoint"):
            clock.now += 3
        clock.now += 2
    with pytest.raises(RuntimeError), ledger.phase("compile"):
        clock.now += 4
        raise RuntimeError
    ledger.reassign("step", "data_wait", 5.0)
    summary = ledger.summary()
    seconds = summary["seconds"]
    assert (seconds["other"], seconds["step"], seconds["checkpoint"]) == (1, 7, 3)
    assert (seconds["compile"], seconds["data_wait"]) == (4, 5)
    assert summary["total"] == sum(seconds.values()) == clock.now - 100
    assert summary["goodput"] == pytest.approx(7 / 20)


def test_reassign_moves_at_most_the_recorded_time():
    clock = Clock()
    ledger = GoodputRecorder(clock=clock)
    with ledger.phase("step"):
        clock.now += 2
    ledger.reassign("step", "data_wait", 3.0)
    assert ledger.summary()["seconds"]["step"] == 0 and ledger.summary()["seconds"]["data_wait"] == 2


def test_killed_start_is_carried_over_and_work_after_its_checkpoint_is_lost(tmp_path):
    path = tmp_path / "goodput.json"
    clock = Clock()
    first = GoodputRecorder(path, clock=clock)
    first.resume(0)
    with first.phase("step"):
        for step in range(0, 101):
            first.at_step(step)
            clock.now += 0.2
        first.write()  # killed right after
    second = GoodputRecorder(path, clock=clock)
    second.resume(75)
    with second.phase("step"):
        clock.now += 5.0
        second.at_step(100)
    second.write()
    summary = second.summary()
    assert summary["starts"] == 2
    assert summary["seconds"]["lost"] == pytest.approx(20.2 * 0.25)
    assert summary["seconds"]["step"] == pytest.approx(20.2 * 0.75 + 5.0)
    assert summary["total"] == pytest.approx(25.2)
    third = GoodputRecorder(path, clock=clock)  # nothing is lost twice
    third.resume(100)
    assert third.summary()["seconds"]["lost"] == pytest.approx(20.2 * 0.25)
    text = third.table()
    assert "3 starts" in text and "training" in text and "lost to kills" in text


def test_corrupt_goodput_file_does_not_stop_a_run(tmp_path):
    (tmp_path / "goodput.json").write_text('{"starts": [')
    ledger = GoodputRecorder(tmp_path / "goodput.json")
    ledger.write()
    assert ledger.summary()["starts"] == 1
    assert set(ledger.summary()["seconds"]) == {*CATEGORIES, "lost"}


def test_duration_formats():
    assert [duration(s) for s in (0.84, 42, 59.7, 185, 7620)] == [
        "0.8 s",
        "42 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
