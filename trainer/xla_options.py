"""XLA compiler options by platform, with the measured effect of each.

Measured on train steps of GPT-2 124M, context 256, batch 4, on two cores, interleaved (`python benchmarks/step.py`).
"""

# XLA passes on CPUs. This one hoists conversions out of the loop over layers, so all bf16 arrays are copied to f32
# first. Disabling it makes bf16 7 to 17 % faster.
CODE_MOTION = "while-loop-invariant-code-motion"
# This one removes optimization barriers before fusion, which defeats them. Disabling it makes f32 5 % and bf16 3 %
# faster. On one device only: with several, the order of collectives could change.
BARRIERS = "cse_barrier_expander"


def compiler_options(platform: str, num_devices: int) -> dict[str, bool | str]:
    """Returns `compiler_options` for `jax.jit` on `num_devices` devices of this platform."""
    if platform != "cpu":
        return {}
    return {
        # Sequential matmuls use caches better than concurrent ones: f32 up to 3 % faster, 10 % less memory.
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
        "xla_disable_hlo_passes": ",".join([CODE_MOTION, BARRIERS] if num_devices == 1 else [CODE_MOTION]),
    }
