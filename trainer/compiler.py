"""What the compiler is told beyond its defaults, by platform; each with the figure that earned it.

Figures: steps of GPT-2 124M, context 256, batch 4, on two cores, in turns (`python benchmarks/step.py`).
"""

OPTIONS: dict[str, dict[str, bool | str]] = {
    "cpu": {
        # Products one after the other use caches better than two at a time: f32 up to 3 % faster, a tenth less memory.
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
        # It takes conversions out of the loop over layers, so that all that is kept in bf16 is copied to f32 first:
        # without it bf16 7 to 17 % faster.
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion,cse_barrier_expander",
    },
}


def compiler_options(platform: str) -> dict[str, bool | str]:
    """For `jax.jit` on devices of this platform."""
    return dict(OPTIONS.get(platform, {}))
