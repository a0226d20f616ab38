"""The coordinate check and a scaling law as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.scaling.law import Law, Point
from launch.scaling.rungs import Recommendation, Size, recommend
from trainer.activation_stats import LOGITS


def draw_coordinates(
    widths: list[int],
    found: dict[str, list[list[dict[str, float]]]],
    slopes: dict[str, dict[str, float]],
    path: Path,
    title: str,
) -> None:
    """A row for each parametrisation, a column for each part of the model, a line for each step."""
    figure, save = _figure(path, (12, 7.5))
    parts = shown_parts(list(next(iter(found.values()))[0][-1]))
    panels = figure.subplots(len(found), len(parts), sharex=True, sharey="col", squeeze=False)
    for row, (name, moved) in zip(panels, found.items(), strict=True):
        num_steps = len(moved[0])
        for axes, part in zip(row, parts, strict=True):
            for step in range(num_steps):
                values = [steps[step][part] for steps in moved]
                shade = _shade(step, num_steps)
                axes.plot(widths, values, "o-", color=shade, markersize=4, linewidth=1.6, label=f"step {step + 1}")
            axes.set_title(f"{part}: slope {slopes[name][part]:+.2f}", fontsize=10, loc="left")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(widths, [str(width) for width in widths])
            axes.minorticks_off()
            _plain(axes)
        row[0].set_ylabel(f"{name}\nmean |change since the start|")
    for axes in panels[-1]:
        axes.set_xlabel("width (embed_dim)")
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"how far a step moves activations: {title}", fontsize=13)
    save()


def shown_parts(parts: list[str]) -> list[str]:
    """Of many layers the first, one in the middle and the last, and the logits."""
    layers = [part for part in parts if part != LOGITS]
    return [*dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]), LOGITS]


def draw_law(
    points: Sequence[Point],
    law: Law,
    others: Sequence[Law],
    family: Sequence[Size],
    best: Recommendation,
    ratio: float | None,
    path: Path,
    title: str,
) -> None:
    """Losses over compute with the law through them, and what it recommends for each budget."""
    figure, save = _figure(path, (13, 6))
    losses, choice = figure.subplots(1, 2)
    least = min(p.flops for p in points)
    budgets = np.geomspace(least, best.flops * 3, 60)
    along = [recommend(law, others, family, float(budget), ratio) for budget in budgets]
    names = sorted({p.parameters for p in points})
    for index, size in enumerate(names):
        ours = sorted((p for p in points if p.parameters == size), key=lambda p: p.flops)
        shade = _shade(len(names) - 1 - index, len(names))
        losses.plot(
            [p.flops for p in ours], [p.loss for p in ours], "o", color=shade, label=f"{_short(size)} parameters"
        )
        if not law.of_compute:
            flops = np.geomspace(ours[0].flops / 2, ours[-1].flops * 4, 50)
            fitted = law.loss(size, flops * ours[0].tokens / ours[0].flops)
            losses.plot(flops, fitted, color=shade, linewidth=1.2, alpha=0.8)
    losses.plot(budgets, [each.loss for each in along], color="black", linewidth=1.8, label="the law, at its best size")
    _band(losses, budgets, [each.loss_spread for each in along])
    losses.plot([best.flops], [best.loss], "*", color="#e45756", markersize=15, label=f"budget: loss {best.loss:.3f}")
    losses.set_yscale("log")
    losses.yaxis.set_major_formatter("{x:.3g}")
    losses.yaxis.set_minor_formatter("{x:.3g}")
    losses.set_ylabel("held-out loss (nats per token)")
    losses.set_title(f"{len(points)} runs", loc="left", fontsize=11)
    choice.plot(budgets, [each.parameters for each in along], color="black", linewidth=1.8, label="recommended size")
    _band(choice, budgets, [each.parameters_spread for each in along])
    choice.plot([p.flops for p in points], [p.parameters for p in points], "o", color="#4c78a8", label="runs")
    marked = f"budget: {_short(best.parameters)} parameters on {_short(best.tokens)} tokens"
    choice.plot([best.flops], [best.parameters], "*", color="#e45756", markersize=15, label=marked)
    choice.set_yscale("log")
    choice.set_ylabel("parameters without embeddings and head")
    choice.set_title("what to train", loc="left", fontsize=11)
    for axes in (losses, choice):
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs")
        _plain(axes)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"scaling law: {title}; shaded: with each run left out in turn", fontsize=13)
    save()


def _band(axes: Any, x: np.ndarray, spreads: list[tuple[float, float] | None]) -> None:
    if all(pair is not None for pair in spreads):
        low, high = zip(*(pair for pair in spreads if pair is not None), strict=True)
        axes.fill_between(x, low, high, color="black", alpha=0.12, linewidth=0)


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _figure(path: Path, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure, and what writes it at once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)

    def save() -> None:
        half = path.with_name(path.name + ".tmp")
        figure.savefig(half, format="png")
        half.replace(path)

    return figure, save


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _shade(index: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * (1 - index / max(count - 1, 1)))
