"""A sweep as a picture: values by trial, curves over steps, and a slice along each key that varies."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.sweeps import Mode, SweepSearchConfig
from launch.sweeps.progress_display import short
from launch.sweeps.space import Range, Space
from launch.sweeps.study import DONE, FAILED, PRUNED, Trial, best_of, better, ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
PRUNED_COLOUR, FAILED_COLOUR, LINE, BEST = "#8c8c8c", "#e45756", "#4c78a8", "#e4572e"


def draw_sweep(trials: Sequence[Trial], space: Space, search: SweepSearchConfig, path: Path, *, title: str) -> bool:
    """1400 pixels wide, 400 for each row of panels. Returns: whether there was anything to draw."""
    trials = [trial for trial in trials if trial.ended]
    if not any(trial.latest is not None for trial in trials):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    scale = _Scale(trials, search)
    colours = ScalarMappable(Normalize(*scale.coloured), "viridis" if search.mode is Mode.min else "viridis_r")
    curves = any(len(trial.reports) > 1 for trial in trials)
    count = 1 + curves + len(space)
    rows = math.ceil(count / COLUMNS)
    figure = Figure(figsize=(14, 0.6 + 4 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    _by_trial(panels[0], trials, search, scale, colours)
    if curves:
        _curves(panels[1], trials, search, scale, colours)
    for panel, (key, part) in zip(panels[1 + curves :], space.items(), strict=False):
        _slice(panel, trials, key, part, search, scale, colours)
        panel.set_xlabel(short(key, list(space)))
    for panel in panels[:count]:
        if not (curves and panel is panels[1]):
            panel.set_ylim(*scale.limits)
        panel.set_ylabel(search.metric)
        panel.grid(alpha=0.25, linewidth=0.7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.colorbar(colours, ax=panels[:count], label=search.metric, aspect=40, shrink=0.9)
    figure.legend(handles=_legend(trials), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(_title(title, trials, search), fontsize=13, x=0.01, ha="left")
    half = path.with_name(path.name + ".tmp")
    figure.savefig(half, format="png")
    half.replace(path)
    return True


class _Scale:
    """Limits in which the good trials can be told apart: what is far worse stands at the edge."""

    def __init__(self, trials: Sequence[Trial], search: SweepSearchConfig):
        values = np.array([better(search, t.latest) for t in trials if t.latest is not None])
        done = np.array([better(search, t.value) for t in trials if t.value is not None])
        best, usual = float(values.min()), float(np.quantile(values, 0.75))
        worst = min(float(values.max()), usual + (usual - best)) if usual > best else float(values.max())
        margin = 0.08 * (worst - best) or 0.05 * abs(best) or 0.5
        good, bad = better(search, float(min(done, default=best))), better(search, min(max(done, default=worst), worst))
        self.coloured = (min(good, bad), max(good, bad)) if good != bad else (good - margin, good + margin)
        ends = (better(search, best - margin), better(search, worst + 2 * margin))
        self.limits = (min(ends), max(ends))
        self.edge = better(search, worst + 1.4 * margin)  # of what is worse, or has no value

    def at(self, value: float | None) -> tuple[float, bool]:
        """Where a value is drawn, and whether that is the edge."""
        if value is None or not self.limits[0] <= value <= self.limits[1]:
            return self.edge, True
        return value, False


def _points(
    axes: "Axes", placed: Sequence[tuple[float, Trial]], search: SweepSearchConfig, scale: _Scale, colours: Any
) -> None:
    """Each trial at its place: what is done in the colour of its value, the others marked."""
    best = best_of([trial for _, trial in placed], search)
    for x, trial in placed:
        y, beyond = scale.at(trial.latest)
        if trial.state == FAILED:
            axes.plot(x, scale.edge, "x", color=FAILED_COLOUR, markersize=8, markeredgewidth=2)
        elif trial.state == PRUNED:
            axes.plot(x, y, "v", color="none", markeredgecolor=PRUNED_COLOUR, markersize=7)
        else:
            marker = ("^" if search.mode is Mode.min else "v") if beyond else "o"
            axes.plot(x, y, marker, color=colours.to_rgba(trial.value), markersize=8, markeredgecolor="white")
        if best is not None and trial.number == best.number:
            axes.plot(x, y, "o", color="none", markeredgecolor=BEST, markersize=15, markeredgewidth=2)


def _by_trial(axes: "Axes", trials: Sequence[Trial], search: SweepSearchConfig, scale: _Scale, colours: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    done = [trial for trial in trials if trial.state == DONE]
    so_far = [ranked(done[: i + 1], search)[0].value for i in range(len(done))]
    if done:
        at = [trial.number for trial in done]
        axes.step([*at, trials[-1].number], [*so_far, so_far[-1]], where="post", color=LINE, linewidth=1.5)
    _points(axes, [(trial.number, trial) for trial in trials], search, scale, colours)
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _curves(axes: "Axes", trials: Sequence[Trial], search: SweepSearchConfig, scale: _Scale, colours: Any) -> None:
    values = [value for trial in trials for value in trial.reports.values()]
    good, bad = (0.0, 0.97) if search.mode is Mode.min else (0.03, 1.0)  # a start from far off would flatten the rest
    low, high = np.quantile(values, good), np.quantile(values, bad)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or None)
    for trial in reversed(ranked(trials, search)):  # the best one on top
        steps = sorted(trial.reports)
        values = [trial.reports[step] for step in steps]
        if trial.state == DONE:
            axes.plot(steps, values, color=colours.to_rgba(trial.value), linewidth=1.6)
        elif steps:
            colour = PRUNED_COLOUR if trial.state == PRUNED else FAILED_COLOUR
            axes.plot(steps, values, color=colour, linewidth=1.0, alpha=0.8)
            axes.plot(steps[-1], values[-1], "v" if trial.state == PRUNED else "x", color=colour, markersize=6)
    axes.set_xlabel("step of the trial")


def _slice(
    axes: "Axes", trials: Sequence[Trial], key: str, part: Any, search: SweepSearchConfig, scale: _Scale, colours: Any
) -> None:
    from matplotlib.ticker import MaxNLocator

    placed: list[tuple[float, Trial]] = []
    if isinstance(part, Range):
        placed = [(float(trial.params[key]), trial) for trial in trials]
        if part.log:
            axes.set_xscale("log")
        elif part.whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        seen: dict[str, int] = {}
        for trial in trials:  # side by side, so that none hides another
            value = trial.params[key]
            seen[value] = seen.get(value, -1) + 1
            placed.append((part.values.index(value) + 0.09 * ((seen[value] + 2) % 5 - 2), trial))
        axes.set_xticks(range(len(part.values)), [_shortened(value) for value in part.values])
        axes.set_xlim(-0.5, len(part.values) - 0.5)
    _points(axes, placed, search, scale, colours)


def _shortened(value: str) -> str:
    return value if len(value) <= 14 else f"{value[:12]}…"


def _legend(trials: Sequence[Trial]) -> list[Any]:
    from matplotlib.lines import Line2D

    looks = {
        DONE: ("best", {"marker": "o", "markeredgecolor": BEST, "markeredgewidth": 2, "markersize": 12}),
        PRUNED: ("pruned, at its last value", {"marker": "v", "markeredgecolor": PRUNED_COLOUR}),
        FAILED: ("failed", {"marker": "x", "markeredgecolor": FAILED_COLOUR, "markeredgewidth": 2}),
    }
    kinds = [Line2D([], [], color=LINE, label="best so far")]
    for state, (label, look) in looks.items():
        if any(trial.state == state for trial in trials):
            kinds.append(Line2D([], [], linestyle="none", color="none", label=label, **look))
    return kinds


def _title(title: str, trials: Sequence[Trial], search: SweepSearchConfig) -> str:
    best = best_of(trials, search)
    said = f"{title}: {len(trials)} trials"
    if best is None:
        return said
    values = ", ".join(f"{short(key, list(best.params))}={value}" for key, value in best.params.items())
    return textwrap.fill(f"{said}; best {best.run}, {search.metric} {best.value:.4g} with {values}", 140)
