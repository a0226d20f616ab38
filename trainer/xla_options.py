"""What the compiler is told beyond its defaults, by platform; each with the figure that earned it.

Figures: steps of GPT-2 124M, context 256, batch 4, on two cores, in turns (`python benchmarks/step.py`).
"""

# Passes of XLA on CPUs. It takes conversions out of the loop over layers, so that all that is kept in bf16 is copied
# to f32 first: without it bf16 7 to 17 % faster.
CODE_MOTION = "while-loop-invariant-code-motion"
# It takes barriers away before XLA chooses what is computed together, so that they hold nothing apart: without it f32 5
# percent faster, bf16 3. For one device alone: where several talk, the order of collectives is not to be put at risk.
BARRIERS = "cse_barrier_expander"


def compiler_options(platform: str, num_devices: int) -> dict[str, bool | str]:
    """For `jax.jit` on so many devices of this platform."""
    if platform != "cpu":
        return {}
    return {
        # Products one after the other use caches better than two at a time: f32 up to 3 % faster, a tenth less memory.
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
        "xla_disable_hlo_passes": ",".join([CODE_MOTION, BARRIERS] if num_devices == 1 else [CODE_MOTION]),
    }
