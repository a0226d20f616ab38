"""Learning rate transfer: the best learning rate at several widths, with and without muP.

    python benchmarks/transfer.py [--widths 64,128,256] [--rates 1e-3,2e-3,4e-3,8e-3,1.6e-2] [--steps 300]
                                  [--output transfer.png] [hydra overrides]

Trains models like `model=tiny` on the bytes of Python's standard library with the same batches and linear decay; the
loss is the mean over the last tenth of the steps. One compiled program per width trains at all rates.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from composed import composed

from configs.schema import RunConfig
from launch.build import build_core, build_source, model_config
from launch.corpora import Corpora, load_corpora
from launch.run_folder import run_folder
from models.config import ModelConfig
from models.mup import scale_to_width
from models.transformer import init_params, make_apply, param_axes
from trainer.reliability.loss_spikes import NO_LIMITS
from trainer.schedule import LinearConfig
from trainer.state import make_state
from trainer.step import make_train_step

COMMON = [
    "source=[python_stdlib]", "tokenizer=bytes", "model=tiny", "model.dtype=float32", "data.seq_len=64",
    "data.batch_size=8", "data.packing=best_fit", "model.init_std=0.06",  # the best of 0.02, 0.06, 0.15 at width 64
]  # fmt: skip
SHARE = 10  # of the steps, the last 1/10 are the loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,128,256", help="the first is the one that rates are tuned at")
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3,8e-3,1.6e-2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", default="transfer.png")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    widths = [int(width) for width in options.widths.split(",")]
    rates = [float(rate) for rate in options.rates.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        config = composed([*COMMON, *options.overrides, f"output_dir={folder}"])
        corpora = load_corpora(config, run_folder(config), print)
        model = model_config(config, corpora.tokenizer)
        source = build_source(config, corpora, build_core(replace(config, model=model), corpora.tokenizer))
        batches = [jax.device_get(source.next_batch(None)) for _ in range(options.steps)]
        source.close()
    found = {}
    for name, base in ((f"mup_base_width={widths[0]}", widths[0]), ("standard", None)):
        for width in widths:
            wide = replace(scale_to_width(model, width), mup_base_width=base)
            found[name, width] = losses(config, corpora, wide, rates, batches)
            print(f"{name}, width {width}: {' '.join(f'{loss:.3f}' for loss in found[name, width])}", flush=True)
    print(table(widths, rates, found))
    draw(widths, rates, found, Path(options.output), f"{config.optimizer.kind}, {options.steps} steps")


def losses(config: RunConfig, corpora: Corpora, model: ModelConfig, rates: list[float], batches: list) -> list[float]:
    """At each rate."""
    apply, axes, steps = make_apply(model), param_axes(model), len(batches)
    objective = config.objective.build(None)
    shape = LinearConfig(warmup_steps=steps // 10).build(1.0, steps)
    rows = jax.tree.map(lambda *each: jnp.asarray(np.stack(each)), *batches)

    def train(rate: jax.Array) -> jax.Array:
        chain = config.optimizer.build(lambda step: rate * shape(step), axes, model if model.mup_base_width else None)
        step = make_train_step(objective, apply, chain)

        def body(state, batch):
            state, metrics = step(state, {}, batch, NO_LIMITS)
            return state, metrics["loss"]

        state = make_state(partial(init_params, model), chain, jax.random.key(config.seed))
        return jax.lax.scan(body, state, rows)[1][-max(1, steps // SHARE) :].mean()

    return jax.jit(partial(jax.lax.map, train))(jnp.asarray(rates)).tolist()


def table(widths: list[int], rates: list[float], found: dict) -> str:
    lines = [
        f"| | width |{''.join(f' {rate:g} |' for rate in rates)} best |",
        "|---|---:|" + "---:|" * (len(rates) + 1),
    ]
    for (name, width), values in found.items():
        best = int(np.nanargmin(values))
        cells = [f"**{v:.3f}**" if i == best else f"{v:.3f}" for i, v in enumerate(values)]
        lines.append(f"| {name} | {width} | {' | '.join(cells)} | {rates[best]:g} |")
    return "\n".join(lines)


def draw(widths: list[int], rates: list[float], found: dict, path: Path, title: str) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for name, _ in found))
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        for index, width in enumerate(widths):
            values, shade = found[name, width], colormaps["viridis"](0.85 * (1 - index / max(len(widths) - 1, 1)))
            best = int(np.nanargmin(values))
            axes.plot(rates, values, "o-", color=shade, markersize=4, label=f"width {width}")
            axes.plot(rates[best], values[best], "o", color=shade, markersize=11, markerfacecolor="none")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate; a ring: the best")
        axes.set_title(name, loc="left", fontsize=11)
        axes.grid(alpha=0.25, linewidth=0.7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("training loss at the end (nats per token)")
    least, most = (f([v for values in found.values() for v in values if np.isfinite(v)]) for f in (min, max))
    figure.axes[0].set_ylim(least - 0.05, min(most + 0.05, least + 2))
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"learning rates across widths: {title}", fontsize=13)
    figure.savefig(path)


if __name__ == "__main__":
    main()
