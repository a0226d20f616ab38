"""Scaling of step and compilation time with layers, width, context, experts and devices.

    python benchmarks/growth.py [--axes layers,width,context,experts,devices] [--rounds 5] [--results FOLDER]

Doubles one size of a small Llama-like model repeatedly. Slopes are log-log fits: 1 means twice the time for twice the
size. The slope of the step time is listed with that of its FLOPs (`models.flops`), the expected value. Devices share
the same cores, and one batch is sharded over `mesh.fsdp`: the expected slope is 0, and the excess is sharding overhead.
Compilation runs without a cache.
"""

import argparse
import os
import statistics
import time
from contextlib import ExitStack

import numpy as np
import turns
from composed import built
from turns import Contestant

MODEL = (
    "model.num_layers=4", "model.embed_dim=256", "model.attention.num_heads=4", "model.attention.num_kv_heads=4",
    "model.attention.head_dim=64", "model.mlp.intermediate_dim=768", "model.vocab_size=4096", "model.max_seq_len=16384",
    "data.seq_len=256", "data.batch_size=8", "schedule=constant", "schedule.warmup_steps=0",
)  # fmt: skip
TOKENS = 4096  # of a batch whose rows grow


def layers(n: int) -> list[str]:
    return [f"model.num_layers={n}"]


def width(n: int) -> list[str]:
    heads = n // 64
    return [f"model.embed_dim={n}", f"model.attention.num_heads={heads}", f"model.attention.num_kv_heads={heads}",
            f"model.mlp.intermediate_dim={3 * n}"]  # fmt: skip


def context(n: int) -> list[str]:
    return [f"data.seq_len={n}", f"data.batch_size={TOKENS // n}", "model.remat=save_attn_out"]


def experts(n: int) -> list[str]:
    return [f"model.moe.num_experts={n}", "model.moe.experts_per_token=2", "model.moe.intermediate_dim=384"]


def devices(n: int) -> list[str]:
    return [f"mesh.fsdp={n}"]


AXES = {
    layers: (2, 4, 8, 16, 32),
    width: (128, 256, 512, 1024),
    context: (256, 512, 1024, 2048, 4096),
    experts: (4, 8, 16, 32, 64),
    devices: (1, 2, 4, 8),
}


def step(overrides: list[str], num_devices: int):
    """Its turn gives (FLOPs, seconds of compilation)."""
    # Before JAX is there: a seat's process is its own.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
    from models.flops import flops_per_token
    from trainer.reliability.loss_spikes import NO_LIMITS

    core, batch = built([*MODEL, *overrides])
    holds = [core.init_state()]
    start = time.perf_counter()
    compiled = core.train_step.lower(holds[0], {}, batch, NO_LIMITS).compile()
    seconds = time.perf_counter() - start
    rows, length = batch.tokens.shape
    flops = flops_per_token(core.model, length) * rows * length

    def turn():
        holds[0], metrics = compiled(holds[0], {}, batch, NO_LIMITS)
        float(metrics["loss"])
        return flops, seconds

    return turn


def slope(sizes, values) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measured(axis, rounds: int) -> dict:
    sizes = AXES[axis]
    with ExitStack() as stack:
        seats = {}
        for n in sizes:
            args = {"overrides": axis(n), "num_devices": n if axis is devices else 1}
            seats[str(n)] = turns.seat(stack, Contestant(step, args))
        turns.take_turns(seats, 1)
        seconds, results = turns.take_turns(seats, rounds)
    flops, compiled = zip(*(results[str(n)][0] for n in sizes), strict=True)
    middle = [statistics.median(seconds[str(n)]) for n in sizes]
    return {
        "axis": axis.__name__, "sizes": sizes, "seconds": seconds, "middle": middle, "flops": flops,
        "compilation": compiled, "slope": slope(sizes, middle), "slope of flops": slope(sizes, flops),
        "last slope": slope(sizes[-2:], middle[-2:]), "last slope of flops": slope(sizes[-2:], flops[-2:]),
        "slope of compilation": slope(sizes, compiled),
    }  # fmt: skip


def draw(path, results: list[dict]) -> None:
    """A panel for each axis: the step's time, what its FLOPs say of it, and compilation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.4 * len(results), 3.2), squeeze=False, layout="constrained")
    for axis, r in zip(axes[0], results, strict=True):
        x = np.arange(len(r["sizes"]))
        by_flops = np.array(r["flops"]) * r["middle"][-1] / r["flops"][-1]
        axis.plot(x, r["middle"], "o-", color="C0", label="step")
        axis.plot(x, by_flops, "--", color="0.5", label="as its FLOPs")
        axis.plot(x, r["compilation"], "s-", color="C1", label="compilation")
        axis.set_xticks(x, [str(n) for n in r["sizes"]])
        axis.set_yscale("log")
        axis.set_xlabel(r["axis"])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle("How a step and its compilation grow", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(axis.__name__ for axis in AXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", default="benchmarks/results")
    options = parser.parse_args()
    chosen = [axis for axis in AXES if axis.__name__ in options.axes.split(",")]
    results = [measured(axis, options.rounds) for axis in chosen]
    found = {"machine": turns.machine(), "results": results}
    path = turns.keep(options.results, "growth", found)
    draw(path.with_suffix(".png"), results)
    lines = [
        turns.in_words(found["machine"]),
        "",
        "| | sizes | seconds a step | slope | of its FLOPs | last two: slope | of FLOPs | compilation, s | slope |",
        "|---|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for r in results:
        sizes = ", ".join(map(str, r["sizes"]))
        times, compiled = (", ".join(f"{s:.3g}" for s in r[key]) for key in ("middle", "compilation"))
        slopes = (r[key] for key in ("slope", "slope of flops", "last slope", "last slope of flops"))
        cells = sizes, times, *(f"{value:.2f}" for value in slopes), compiled, f"{r['slope of compilation']:.2f}"
        lines.append(f"| {r['axis']} | {' | '.join(cells)} |")
    print("\n" + "\n".join([*lines, "", f"{path} and {path.with_suffix('.png').name}"]))


if __name__ == "__main__":
    main()
