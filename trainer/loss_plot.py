"""The loss curve as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.tracker import START, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]  # of metrics.jsonl


def draw_loss(metrics_jsonl: Path, png_path: Path, *, title: str | None = None) -> bool:
    """Draws training and held-out loss over steps, 1200x700 pixels; bits per byte on the right if known.

    A dotted line stands where the run went on after a stop.

    Returns: whether there was anything to draw.
    """
    rows = read_rows(metrics_jsonl)
    steps, losses = _series(rows, "train/loss")
    names = sorted({name for row in rows for name in row if name.startswith("eval/") and name.endswith("/loss")})
    sources = [name for name in names if name.count("/") > 1] or names
    if not len(steps) and not sources:
        return False

    # The Figure class itself, not pyplot: no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(steps):
        smooth = smoothed(losses)
        axes.plot(steps, losses, color="#4c78a8", alpha=0.25, linewidth=1.0, label="training, each step")
        axes.plot(steps, smooth, color="#4c78a8", linewidth=2.2, label="training, smoothed")
    colours = ("#e45756", "#f2a541", "#54a24b", "#b279a2", "#72b7b2", "#9d755d")
    for index, name in enumerate(sources):
        at, values = _series(rows, name)
        label = "held-out " + name.removeprefix("eval/").removesuffix("/loss") if name.count("/") > 1 else "held-out"
        axes.plot(at, values, "o-", color=colours[index % len(colours)], markersize=5, linewidth=1.2, label=label)
    for index, step in enumerate(sorted({row["step"] for row in rows if START in row})):
        label = None if index else "went on after a stop"
        axes.axvline(step, color="#888888", linewidth=0.9, linestyle=(0, (2, 3)), zorder=0, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title or metrics_jsonl.resolve().parent.name, fontsize=14, loc="left", pad=12)
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines["top"].set_visible(False)
    axes.set_xlim(left=0)
    low, high = _limits(rows, sources, losses)
    axes.set_ylim(low, high)
    _add_bits_per_byte(axes, rows)
    axes.legend(frameon=False, loc="upper right")
    half = png_path.with_name(png_path.name + ".tmp")
    figure.savefig(half, format="png")
    half.replace(png_path)
    return True


def smoothed(values: np.ndarray) -> np.ndarray:
    """A mean over about a 40th of the curve, around each point so that it does not lag behind a fall."""
    count = len(values)
    at = np.arange(count)
    before = np.minimum(at, max(1, count // 80))
    after = np.minimum(before, count - 1 - at)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[at + after + 1] - sums[at - before]) / (before + after + 1)


def _series(rows: list[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    steps = sorted(points)
    return np.array(steps, float), np.array([points[step] for step in steps], float)


def _limits(rows: list[Row], sources: list[str], losses: np.ndarray) -> tuple[float, float]:
    """Limits that show the whole curve, unless a spike in it would flatten the rest."""
    parts = [losses, *(_series(rows, name)[1] for name in sources)]
    values = np.concatenate([part for part in parts if len(part)])
    low, high = float(values.min()), float(values.max())
    usual = float(np.quantile(values, 0.99))
    start = float(losses[0]) if len(losses) else high
    if high > low + 3 * (usual - low):
        high = max(usual, start)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _add_bits_per_byte(axes: "Axes", rows: list[Row]) -> None:
    """A second scale, when one factor turns nats per token into bits per byte all along the curve."""
    for loss, bits in (("train/nll", "train/bits_per_byte"), ("eval/loss", "eval/bits_per_byte")):
        ratios = [row[bits] / row[loss] for row in rows if row.get(loss) and row.get(bits)]
        if ratios:
            _add_scale(axes, float(np.median(ratios)), "bits per byte, at the mean bytes per token")
            return


def _add_scale(axes: "Axes", factor: float, label: str) -> None:
    def there(y: Any) -> Any:
        return y * factor

    def back(y: Any) -> Any:
        return y / factor

    axes.secondary_yaxis("right", functions=(there, back)).set_ylabel(label)
