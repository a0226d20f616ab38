"""A plan as a picture: memory of a device, time of a step, the mesh."""

from pathlib import Path

import numpy as np

from launch.planning.estimate import Plan
from trainer.mesh import describe_mesh

COLOURS = {
    "parameters": "#4c78a8", "optimizer": "#72b7b2", "frozen": "#9ecae9", "gradients": "#f58518",
    "activations": "#e45756", "logits": "#b279a2", "temporary": "#bab0ac", "batch": "#54a24b",
}  # fmt: skip
AXIS_COLOURS = {"tensor": "#e45756", "context": "#54a24b", "expert": "#b279a2", "fsdp": "#4c78a8", "data": "#f2a541"}


def draw_plan(plan: Plan, path: Path, title: str) -> None:
    """1200 x 800 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    memory, time, mesh = figure.subplots(3, 1, height_ratios=[1, 1, 2])
    _memory(memory, plan)
    _time(time, plan)
    _mesh(mesh, plan)
    figure.suptitle(title, fontsize=14)
    half = path.with_name(path.name + ".tmp")
    figure.savefig(half, format="png")
    half.replace(path)


def _bar(axes, parts: dict[str, float], colours: dict[str, str], unit: str, total: float) -> None:  # type: ignore[no-untyped-def]
    left = 0.0
    for name, size in parts.items():
        if size <= 0:
            continue
        label = f"{name}, {size:.3g} {unit}"
        axes.barh(0, size, left=left, height=0.6, color=colours.get(name, "#bab0ac"), label=label)
        if size > 0.06 * total:
            axes.text(left + size / 2, 0, f"{name}\n{size:.3g}", ha="center", va="center", fontsize=9, color="white")
        left += size
    axes.set_yticks([])
    axes.set_ylim(-0.5, 0.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.05))


def _memory(axes, plan: Plan) -> None:  # type: ignore[no-untyped-def]
    parts = {name: size / 1e9 for name, size in plan.memory._asdict().items()}
    total, room = plan.memory.total / 1e9, plan.capacity / 1e9
    _bar(axes, parts, COLOURS, "GB", max(total, room))
    axes.axvline(room, color="black", linewidth=1.5, linestyle="--")
    said = f"fits, {room - total:.3g} GB to spare" if plan.fits else f"does not fit, by {total - room:.3g} GB"
    axes.set_title(f"memory of a device: {total:.3g} of {room:.3g} GB, {said}", loc="left", fontsize=11)
    axes.set_xlim(0, max(total, room) * 1.02)
    axes.set_xlabel("GB")


def _time(axes, plan: Plan) -> None:  # type: ignore[no-untyped-def]
    parts = {
        "products": min(plan.compute_seconds, plan.device_seconds),
        "waiting for memory": max(0.0, plan.device_seconds - plan.compute_seconds),
        "waiting for the network": plan.exposed_seconds,
    }
    colours = dict(zip(parts, ("#4c78a8", "#f2a541", "#e45756"), strict=True))
    _bar(axes, parts, colours, "s", plan.step_seconds)
    hidden = plan.network_seconds - plan.exposed_seconds
    axes.set_title(
        f"time of a step: {plan.step_seconds:.3g} s, MFU {plan.mfu:.1%}; network beside it: {hidden:.3g} s",
        loc="left", fontsize=11,
    )  # fmt: skip
    axes.set_xlabel("seconds")


def _mesh(axes, plan: Plan) -> None:  # type: ignore[no-untyped-def]
    """Devices as squares: the nearest axis along the width, groups of it framed by the next ones."""
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
    base = np.array([int(AXIS_COLOURS.get(used[-1][0], "#4c78a8")[i : i + 2], 16) / 255 for i in (1, 3, 5)])
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
    more = f"; the first {shown * columns:,} of {n:,} are drawn" if shown < rows else ""
    text = f"mesh: {describe_mesh(dict(used))}. Between white lines: one group along {used[-1][0]}"
    text += f"; shades: places along {next_axis[0]}" if next_axis else ""
    axes.set_title(text + more, loc="left", fontsize=11)
