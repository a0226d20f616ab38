"""Names and derived values of logged training metrics.

`perf/tokens_per_second` counts all positions of the global batch, padding included. `perf/mfu` is model FLOPs
utilization: the FLOP/s of forward and backward pass (counted in `models/flops.py`, without recomputation under remat)
over the dense bf16 peak of all devices. CPUs have no published peak: a large matmul in the dtype of the run is timed at
start-up instead.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

LN2 = math.log(2.0)

# Dense bf16 peak in TFLOP/s per JAX device, by a substring of `device_kind`. Source: vendors' data sheets.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.4,
    "H100 80GB HBM3": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100": 125.0,  # fp16; no bf16 support
    "TPU7x": 1153.5,  # half a chip
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v4": 275.0,
    "TPU v3": 61.5,  # half a chip
    "TPU v2": 22.5,  # half a chip
}


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of all devices of the run."""

    flops_per_second: float  # 0: unknown; MFU is not reported
    description: str  # one line for the log


def published_peak(device_kind: str) -> float | None:
    """Returns the dense bf16 FLOP/s of one device; None if unknown. The longest matching name wins."""
    names = [name for name in PEAK_TFLOPS if name.lower() in device_kind.lower()]
    return PEAK_TFLOPS[max(names, key=len)] * 1e12 if names else None


def measure_matmul(dtype: str = "float32", size: int = 1024, seconds: float = 0.1) -> float:
    """Measures FLOP/s of a `size`^3 matmul with f32 accumulation on one local device, best of many runs."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak(dtype: str = "bfloat16") -> Peak:
    """Returns the peak of all devices of the run. `dtype`: of its matmuls, used on CPUs only."""
    device = jax.devices()[0]
    known = published_peak(device.device_kind)
    if known is not None:
        text = f"MFU: relative to {known / 1e12:,.1f} TFLOP/s dense bf16 per {device.device_kind}"
        return Peak(known * jax.device_count(), text)
    if device.platform == "cpu":
        measured = measure_matmul(dtype)  # fake devices and local processes share the cores: one peak for all
        return Peak(measured, f"MFU: relative to {measured / 1e9:,.0f} GFLOP/s, a {dtype} matmul timed on this machine")
    return Peak(0.0, f"MFU: not reported, peak FLOP/s of {device.device_kind} unknown")


def bits_per_byte(nll: float, bytes_per_token: float) -> float:
    """Converts `nll` in nats per token to bits per byte; NaN if no bytes were counted."""
    return nll / LN2 / bytes_per_token if bytes_per_token > 0 else math.nan


def perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def memory() -> dict[str, float]:
    """Returns the peak memory of the fullest local device, or the resident set of this process if unavailable."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return {"perf/device_memory_bytes": float(max(peaks))}
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return {}
    return {"perf/process_memory_bytes": float(pages * 4096)}


# Timing keys of the loop and the names under which they are logged.
_TIMES = {
    "step": "step_time",
    "dispatch": "dispatch_time",
    "device_wait": "device_time",
    "hooks": "hook_time",
}


class TrainMetrics:
    """Names the metrics of a training step and adds derived ones.

    Token counts are a function of the step, so a run resumed after a kill counts no token twice.
    """

    def __init__(self, *, tokens_per_step: int, flops_per_token: float, peak: Peak):
        """`tokens_per_step`: positions of the global batch. `flops_per_token`: forward and backward pass."""
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak = peak
        self._start_step, self._start_tokens = 0, 0

    def tokens(self, step: int) -> int:
        """Returns the number of positions trained on up to `step`."""
        return self._start_tokens + (step - self._start_step) * self.tokens_per_step

    def get_state(self, step: int) -> dict[str, Any]:
        return {"step": step, "tokens": self.tokens(step)}

    def set_state(self, saved: Mapping[str, Any]) -> None:
        self._start_step, self._start_tokens = int(saved["step"]), int(saved["tokens"])

    def __call__(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> dict[str, float]:
        """Returns all metrics to log. `metrics`: means returned by the train step. `timing`: seconds by category.

        Throughput is computed from `timing["step"]`, the time from one step to the next.
        """
        named = {f"train/{name}": float(value) for name, value in metrics.items() if name not in ("tokens", "bytes")}
        if "tokens" in metrics:
            named["train/target_tokens"] = float(metrics["tokens"])
        if "nll" in metrics:
            named["train/perplexity"] = perplexity(metrics["nll"])
            if "bytes" in metrics:
                named["train/bits_per_byte"] = bits_per_byte(metrics["nll"], metrics["bytes"])
        named["train/tokens"] = float(self.tokens(step))
        named |= {f"perf/{_TIMES.get(name, name)}": float(seconds) for name, seconds in timing.items()}
        if timing.get("step", 0.0) > 0:
            rate = self.tokens_per_step / timing["step"]
            named["perf/tokens_per_second"] = rate
            if self.peak.flops_per_second > 0:
                named["perf/mfu"] = rate * self.flops_per_token / self.peak.flops_per_second
        return named | memory()
