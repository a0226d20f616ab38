"""Plots: loss curves, plans, coordinate checks, scaling laws and sweeps."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.sweeps import Mode, SweepSearchConfig
from launch.reports import short_number
from launch.scaling.law import Law, Point
from launch.scaling.rungs import Recommendation, Size, recommend
from launch.sweeps.progress_display import short
from launch.sweeps.space import Range, Space
from launch.sweeps.study import DONE, FAILED, PRUNED, Trial, best_of, better, ranked
from trainer.activation_stats import LOGITS
from trainer.mesh import describe_mesh
from trainer.tracker import START, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from launch.planning.estimate import Plan

BLUE, TEAL, PURPLE, RED = "#4c78a8", "#72b7b2", "#b279a2", "#e45756"
ORANGE, GREEN, BROWN, GREY = "#f2a541", "#54a24b", "#9d755d", "#bab0ac"


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """Yields a figure of `width` x `height` hundred pixels, written atomically to `path` on exit."""
    # The Figure class, not pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    partial_file = path.with_name(path.name + ".tmp")
    figure.savefig(partial_file, format="png")
    partial_file.replace(path)


def _plain(axes: "Axes", *sides: str, grid: bool = True) -> None:
    """Hides the frame on these sides (default: top and right) and adds a light grid."""
    for side in sides or ("top", "right"):
        axes.spines[side].set_visible(False)
    if grid:
        axes.grid(alpha=0.25, linewidth=0.7)


def _heading(axes: "Axes", text: str, size: int = 11, **more: Any) -> None:
    axes.set_title(text, loc="left", fontsize=size, **more)


# Loss curves

Row = dict[str, Any]  # of metrics.jsonl


def draw_loss(metrics_jsonl: Path, png_path: Path, *, title: str | None = None) -> bool:
    """Plots training and validation loss over steps, 1200 x 700 pixels; bits per byte on the right axis if known.

    Dotted vertical lines mark resumptions after a stop.

    Returns: whether there was anything to draw.
    """
    rows = read_rows(metrics_jsonl)
    steps, losses = _series(rows, "train/loss")
    names = sorted({name for row in rows for name in row if name.startswith("eval/") and name.endswith("/loss")})
    sources = [name for name in names if name.count("/") > 1] or names
    if not len(steps) and not sources:
        return False
    with _figure(png_path, 12, 7) as figure:
        axes = figure.add_subplot()
        if len(steps):
            axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1.0, label="training, per step")
            axes.plot(steps, smoothed(losses), color=BLUE, linewidth=2.2, label="training, smoothed")
        colours = (RED, ORANGE, GREEN, PURPLE, TEAL, BROWN)
        for index, name in enumerate(sources):
            at, values = _series(rows, name)
            source = name.removeprefix("eval/").removesuffix("/loss") if name.count("/") > 1 else ""
            label = f"validation {source}".rstrip()
            axes.plot(at, values, "o-", color=colours[index % len(colours)], markersize=5, linewidth=1.2, label=label)
        for index, step in enumerate(sorted({row["step"] for row in rows if START in row})):
            label = None if index else "resumed"
            axes.axvline(step, color="#888888", linewidth=0.9, linestyle=(0, (2, 3)), zorder=0, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        _heading(axes, title or metrics_jsonl.resolve().parent.name, 14, pad=12)
        _plain(axes, "top")
        axes.set_xlim(left=0)
        axes.set_ylim(*_limits(rows, sources, losses))
        _add_bits_per_byte(axes, rows)
        axes.legend(frameon=False, loc="upper right")
    return True


def smoothed(values: np.ndarray) -> np.ndarray:
    """Returns a centered moving average over about 1/40 of the curve."""
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
    """Returns y-limits that show the complete curve, clipped if a spike would flatten the rest."""
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
    """Adds a second axis, scaled by the median ratio of bits per byte to nats per token."""
    for loss, bits in (("train/nll", "train/bits_per_byte"), ("eval/loss", "eval/bits_per_byte")):
        ratios = [row[bits] / row[loss] for row in rows if row.get(loss) and row.get(bits)]
        if ratios:
            factor = float(np.median(ratios))
            forward, inverse = partial(np.multiply, factor), partial(np.multiply, 1 / factor)
            label = "bits per byte, at the mean bytes per token"
            axes.secondary_yaxis("right", functions=(forward, inverse)).set_ylabel(label)
            return


# Plans

COLOURS = {
    "parameters": BLUE, "optimizer": TEAL, "frozen": "#9ecae9", "gradients": "#f58518", "activations": RED,
    "logits": PURPLE, "temporary": GREY, "batch": GREEN,
}  # fmt: skip
AXIS_COLOURS = {"tensor": RED, "context": GREEN, "expert": PURPLE, "fsdp": BLUE, "data": ORANGE}


def draw_plan(plan: "Plan", path: Path, title: str) -> None:
    """Plots memory per device, step time and the mesh, 1200 x 800 pixels."""
    with _figure(path, 12, 8) as figure:
        memory, time, mesh = figure.subplots(3, 1, height_ratios=[1, 1, 2])
        _memory(memory, plan)
        _time(time, plan)
        _mesh(mesh, plan)
        figure.suptitle(title, fontsize=14)


def _bar(axes: "Axes", parts: dict[str, float], colours: dict[str, str], unit: str, total: float) -> None:
    left = 0.0
    for name, size in parts.items():
        if size <= 0:
            continue
        label = f"{name}, {size:.3g} {unit}"
        axes.barh(0, size, left=left, height=0.6, color=colours.get(name, GREY), label=label)
        if size > 0.06 * total:
            axes.text(left + size / 2, 0, f"{name}\n{size:.3g}", ha="center", va="center", fontsize=9, color="white")
        left += size
    axes.set_yticks([])
    axes.set_ylim(-0.5, 0.5)
    _plain(axes, "top", "right", "left", grid=False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.05))


def _memory(axes: "Axes", plan: "Plan") -> None:
    parts = {name: size / 1e9 for name, size in plan.memory._asdict().items()}
    total, room = plan.memory.total / 1e9, plan.capacity / 1e9
    _bar(axes, parts, COLOURS, "GB", max(total, room))
    axes.axvline(room, color="black", linewidth=1.5, linestyle="--")
    verdict = f"fits, {room - total:.3g} GB free" if plan.fits else f"exceeds by {total - room:.3g} GB"
    _heading(axes, f"memory per device: {total:.3g} of {room:.3g} GB, {verdict}")
    axes.set_xlim(0, max(total, room) * 1.02)
    axes.set_xlabel("GB")


def _time(axes: "Axes", plan: "Plan") -> None:
    parts = {
        "compute": min(plan.compute_seconds, plan.device_seconds),
        "memory-bound": max(0.0, plan.device_seconds - plan.compute_seconds),
        "exposed communication": plan.exposed_seconds,
    }
    colours = dict(zip(parts, (BLUE, ORANGE, RED), strict=True))
    _bar(axes, parts, colours, "s", plan.step_seconds)
    hidden = plan.network_seconds - plan.exposed_seconds
    text = f"step time: {plan.step_seconds:.3g} s, MFU {plan.mfu:.1%}; overlapped communication: {hidden:.3g} s"
    _heading(axes, text)
    axes.set_xlabel("seconds")


def _mesh(axes: "Axes", plan: "Plan") -> None:
    """Draws devices as squares: the innermost axis horizontally, shaded by the position on the next axis."""
    used = [(axis, size) for axis, size in plan.mesh.items() if size > 1] or [("data", 1)]
    n = plan.target.num_devices
    columns = used[-1][1]
    while columns < 64 and columns * 2 <= n and n % (columns * 2) == 0 and n / columns > 8:
        columns *= 2
    rows = -(-n // columns)
    shown = min(rows, 24)
    index = np.arange(n)[: shown * columns]
    inner = used[-1][1]
    next_axis = used[-2] if len(used) > 1 else None
    group = (index // inner) % next_axis[1] if next_axis else np.zeros_like(index)
    base = np.array([int(AXIS_COLOURS.get(used[-1][0], BLUE)[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    shade = 0.35 + 0.65 * (group % 8) / 8
    image = np.ones((shown * columns, 3))
    image[: len(index)] = 1 - shade[:, None] * (1 - base)
    axes.imshow(image.reshape(shown, columns, 3), aspect="auto", interpolation="nearest")
    for x in range(0, columns + 1, inner):
        axes.axvline(x - 0.5, color="white", linewidth=2)
    for y in range(shown + 1):
        axes.axhline(y - 0.5, color="white", linewidth=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    more = f"; first {shown * columns:,} of {n:,} devices shown" if shown < rows else ""
    text = f"mesh: {describe_mesh(dict(used))}. White lines separate groups along {used[-1][0]}"
    text += f"; shades: positions along {next_axis[0]}" if next_axis else ""
    _heading(axes, text + more)


# Scaling


def draw_coordinates(
    widths: list[int],
    found: dict[str, list[list[dict[str, float]]]],
    slopes: dict[str, dict[str, float]],
    path: Path,
    title: str,
) -> None:
    """Plots a row per parametrization, a column per model part and a line per step."""
    with _figure(path, 12, 7.5) as figure:
        parts = shown_parts(list(next(iter(found.values()))[0][-1]))
        panels = figure.subplots(len(found), len(parts), sharex=True, sharey="col", squeeze=False)
        for row, (name, moved) in zip(panels, found.items(), strict=True):
            num_steps = len(moved[0])
            for axes, part in zip(row, parts, strict=True):
                for step in range(num_steps):
                    values = [steps[step][part] for steps in moved]
                    shade = _shade(step, num_steps)
                    axes.plot(widths, values, "o-", color=shade, markersize=4, linewidth=1.6, label=f"step {step + 1}")
                _heading(axes, f"{part}: slope {slopes[name][part]:+.2f}", 10)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.set_xticks(widths, [str(width) for width in widths])
                axes.minorticks_off()
                _plain(axes)
            row[0].set_ylabel(f"{name}\nmean |change from step 0|")
        for axes in panels[-1]:
            axes.set_xlabel("width (embed_dim)")
        panels[0][-1].legend(frameon=False, fontsize=8)
        figure.suptitle(f"muP coordinate check, change of activations: {title}", fontsize=13)


def shown_parts(parts: list[str]) -> list[str]:
    """Returns the first, middle and last layer, and the logits."""
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
    """Plots losses over compute with the fitted law, and the recommended size for each budget."""
    with _figure(path, 13, 6) as figure:
        losses, choice = figure.subplots(1, 2)
        least = min(p.flops for p in points)
        budgets = np.geomspace(least, best.flops * 3, 60)
        along = [recommend(law, others, family, float(budget), ratio) for budget in budgets]
        names = sorted({p.parameters for p in points})
        for index, size in enumerate(names):
            ours = sorted((p for p in points if p.parameters == size), key=lambda p: p.flops)
            shade = _shade(len(names) - 1 - index, len(names))
            label = f"{short_number(size)} parameters"
            losses.plot([p.flops for p in ours], [p.loss for p in ours], "o", color=shade, label=label)
            if not law.is_compute_law:
                flops = np.geomspace(ours[0].flops / 2, ours[-1].flops * 4, 50)
                fitted = law.loss(size, flops * ours[0].tokens / ours[0].flops)
                losses.plot(flops, fitted, color=shade, linewidth=1.2, alpha=0.8)
        line: dict[str, Any] = {"color": "black", "linewidth": 1.8}
        losses.plot(budgets, [each.loss for each in along], **line, label="fitted law at the compute-optimal size")
        _band(losses, budgets, [each.loss_spread for each in along])
        losses.plot([best.flops], [best.loss], "*", color=RED, markersize=15, label=f"budget: loss {best.loss:.3f}")
        losses.set_yscale("log")
        losses.yaxis.set_major_formatter("{x:.3g}")
        losses.yaxis.set_minor_formatter("{x:.3g}")
        losses.set_ylabel("validation loss (nats per token)")
        _heading(losses, f"{len(points)} runs")
        choice.plot(budgets, [each.parameters for each in along], **line, label="recommended size")
        _band(choice, budgets, [each.parameters_spread for each in along])
        choice.plot([p.flops for p in points], [p.parameters for p in points], "o", color=BLUE, label="runs")
        marked = f"budget: {short_number(best.parameters)} parameters on {short_number(best.tokens)} tokens"
        choice.plot([best.flops], [best.parameters], "*", color=RED, markersize=15, label=marked)
        choice.set_yscale("log")
        choice.set_ylabel("parameters, excluding embeddings and head")
        _heading(choice, "compute-optimal size")
        for axes in (losses, choice):
            axes.set_xscale("log")
            axes.set_xlabel("training FLOPs")
            _plain(axes)
            axes.legend(frameon=False, fontsize=9)
        figure.suptitle(f"scaling law: {title}; shaded: leave-one-out refits", fontsize=13)


def _band(axes: Any, x: np.ndarray, spreads: list[tuple[float, float] | None]) -> None:
    if all(pair is not None for pair in spreads):
        low, high = zip(*(pair for pair in spreads if pair is not None), strict=True)
        axes.fill_between(x, low, high, color="black", alpha=0.12, linewidth=0)


def _shade(index: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * (1 - index / max(count - 1, 1)))


# Sweeps

COLUMNS = 3
PRUNED_COLOUR, BEST = "#8c8c8c", "#e4572e"


def draw_sweep(trials: Sequence[Trial], space: Space, search: SweepSearchConfig, path: Path, *, title: str) -> bool:
    """Plots values by trial, curves over steps and a slice per key; 1400 pixels wide, 400 per row of panels.

    Returns: whether there was anything to draw.
    """
    trials = [trial for trial in trials if trial.ended]
    if not any(trial.latest is not None for trial in trials):
        return False
    curves = any(len(trial.reports) > 1 for trial in trials)
    count = 1 + curves + len(space)
    rows = math.ceil(count / COLUMNS)
    with _figure(path, 14, 0.6 + 4 * rows) as figure:
        drawing = _Sweep(trials, search)
        panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for panel in panels[count:]:
            panel.set_axis_off()
        drawing.by_trial(panels[0])
        if curves:
            drawing.curves(panels[1])
        for panel, (key, part) in zip(panels[1 + curves :], space.items(), strict=False):
            drawing.slice(panel, key, part)
            panel.set_xlabel(short(key, list(space)))
        for panel in panels[:count]:
            if not (curves and panel is panels[1]):
                panel.set_ylim(*drawing.limits)
            panel.set_ylabel(search.metric)
            _plain(panel)
        figure.colorbar(drawing.colours, ax=panels[:count], label=search.metric, aspect=40, shrink=0.9)
        figure.legend(handles=_legend(trials), loc="outside lower center", ncols=5, frameon=False)
        figure.suptitle(_title(title, trials, search), fontsize=13, x=0.01, ha="left")
    return True


class _Sweep:
    """Draws trials on shared limits that resolve the good ones; far worse values are drawn at the edge."""

    def __init__(self, trials: Sequence[Trial], search: SweepSearchConfig):
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        self.trials, self.search = trials, search
        values = np.array([better(search, t.latest) for t in trials if t.latest is not None])
        done = np.array([better(search, t.value) for t in trials if t.value is not None])
        best, usual = float(values.min()), float(np.quantile(values, 0.75))
        worst = min(float(values.max()), usual + (usual - best)) if usual > best else float(values.max())
        margin = 0.08 * (worst - best) or 0.05 * abs(best) or 0.5
        good, bad = better(search, float(min(done, default=best))), better(search, min(max(done, default=worst), worst))
        coloured = (min(good, bad), max(good, bad)) if good != bad else (good - margin, good + margin)
        self.colours = ScalarMappable(Normalize(*coloured), "viridis" if search.mode is Mode.min else "viridis_r")
        ends = (better(search, best - margin), better(search, worst + 2 * margin))
        self.limits = (min(ends), max(ends))
        self.edge = better(search, worst + 1.4 * margin)  # position of values beyond the limits, or missing

    def at(self, value: float | None) -> tuple[float, bool]:
        """Returns the position of a value, and whether it is at the edge."""
        if value is None or not self.limits[0] <= value <= self.limits[1]:
            return self.edge, True
        return value, False

    def points(self, axes: "Axes", placed: Sequence[tuple[float, Trial]]) -> None:
        """Draws each trial: completed ones colored by value, the others as markers."""
        best = best_of([trial for _, trial in placed], self.search)
        for x, trial in placed:
            y, beyond = self.at(trial.latest)
            if trial.state == FAILED:
                axes.plot(x, self.edge, "x", color=RED, markersize=8, markeredgewidth=2)
            elif trial.state == PRUNED:
                axes.plot(x, y, "v", color="none", markeredgecolor=PRUNED_COLOUR, markersize=7)
            else:
                marker = ("^" if self.search.mode is Mode.min else "v") if beyond else "o"
                axes.plot(x, y, marker, color=self.colours.to_rgba(trial.value), markersize=8, markeredgecolor="white")
            if best is not None and trial.number == best.number:
                axes.plot(x, y, "o", color="none", markeredgecolor=BEST, markersize=15, markeredgewidth=2)

    def by_trial(self, axes: "Axes") -> None:
        done = [trial for trial in self.trials if trial.state == DONE]
        so_far = [ranked(done[: i + 1], self.search)[0].value for i in range(len(done))]
        if done:
            at = [trial.number for trial in done]
            axes.step([*at, self.trials[-1].number], [*so_far, so_far[-1]], where="post", color=BLUE, linewidth=1.5)
        self.points(axes, [(trial.number, trial) for trial in self.trials])
        axes.set_xlabel("trial")
        _integer_ticks(axes)

    def curves(self, axes: "Axes") -> None:
        values = [value for trial in self.trials for value in trial.reports.values()]
        # High initial values would flatten the rest.
        good, bad = (0.0, 0.97) if self.search.mode is Mode.min else (0.03, 1.0)
        low, high = np.quantile(values, good), np.quantile(values, bad)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or None)
        for trial in reversed(ranked(self.trials, self.search)):  # best on top
            steps = sorted(trial.reports)
            values = [trial.reports[step] for step in steps]
            if trial.state == DONE:
                axes.plot(steps, values, color=self.colours.to_rgba(trial.value), linewidth=1.6)
            elif steps:
                colour, marker = (PRUNED_COLOUR, "v") if trial.state == PRUNED else (RED, "x")
                axes.plot(steps, values, color=colour, linewidth=1.0, alpha=0.8)
                axes.plot(steps[-1], values[-1], marker, color=colour, markersize=6)
        axes.set_xlabel("step of the trial")

    def slice(self, axes: "Axes", key: str, part: Any) -> None:
        placed: list[tuple[float, Trial]] = []
        if isinstance(part, Range):
            placed = [(float(trial.params[key]), trial) for trial in self.trials]
            if part.log:
                axes.set_xscale("log")
            elif part.is_integer:
                _integer_ticks(axes)
        else:
            seen: dict[str, int] = {}
            for trial in self.trials:  # offset horizontally, so that none hides another
                value = trial.params[key]
                seen[value] = seen.get(value, -1) + 1
                placed.append((part.values.index(value) + 0.09 * ((seen[value] + 2) % 5 - 2), trial))
            names = [value if len(value) <= 14 else f"{value[:12]}…" for value in part.values]
            axes.set_xticks(range(len(part.values)), names)
            axes.set_xlim(-0.5, len(part.values) - 0.5)
        self.points(axes, placed)


def _integer_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(trials: Sequence[Trial]) -> list[Any]:
    from matplotlib.lines import Line2D

    looks = {
        DONE: ("best", {"marker": "o", "markeredgecolor": BEST, "markeredgewidth": 2, "markersize": 12}),
        PRUNED: ("pruned, at its last value", {"marker": "v", "markeredgecolor": PRUNED_COLOUR}),
        FAILED: ("failed", {"marker": "x", "markeredgecolor": RED, "markeredgewidth": 2}),
    }
    kinds = [Line2D([], [], color=BLUE, label="best so far")]
    for state, (label, look) in looks.items():
        if any(trial.state == state for trial in trials):
            kinds.append(Line2D([], [], linestyle="none", color="none", label=label, **look))
    return kinds


def _title(title: str, trials: Sequence[Trial], search: SweepSearchConfig) -> str:
    best = best_of(trials, search)
    heading = f"{title}: {len(trials)} trials"
    if best is None:
        return heading
    values = ", ".join(f"{short(key, list(best.params))}={value}" for key, value in best.params.items())
    return textwrap.fill(f"{heading}; best {best.run}, {search.metric} {best.value:.4g} with {values}", 140)
