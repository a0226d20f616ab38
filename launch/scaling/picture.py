"""The coordinate check and a scaling law as pictures."""

from pathlib import Path
from typing import Any

from trainer.coordinates import LOGITS


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
