"""`meshwright coord_check`: muP coordinate check of activations across model widths."""

from dataclasses import replace
from pathlib import Path

import jax

from configs.schema import RunConfig
from configs.tasks import CoordCheckConfig
from launch.attention_kernel import build_checked_core
from launch.build import build_source, model_config
from launch.corpora import Corpora, load_corpora
from launch.multihost import log
from launch.planning.search import resolve_auto_mesh
from launch.plotting import draw_coordinates, shown_parts
from launch.reports import make_table, open_console, write_report
from launch.run_folder import RunFolder
from models.config import ModelConfig
from models.mup import scale_to_width
from trainer.activation_stats import activation_changes, slope
from trainer.schedule import ConstantConfig

Moved = list[list[dict[str, float]]]  # activation change by width, step and layer


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints the slopes and writes them with a plot to `task.output`.

    Exit code 1: activation changes depend on the width even with `model.mup_base_width`.
    """
    task = config.task
    assert isinstance(task, CoordCheckConfig)
    _check(config, task)
    folder = Path(task.output or Path(config.output_dir) / "coord_check")
    corpora = load_corpora(config, RunFolder(folder / config.run), log)
    model = model_config(config, corpora.tokenizer)
    widths, base = sorted(task.widths), model.mup_base_width or min(task.widths)
    models = {
        width: scale_to_width(model, width) for width in widths
    }  # validates all widths before the first is trained
    found = {
        name: [_changes(config, corpora, replace(models[width], mup_base_width=base_width)) for width in widths]
        for name, base_width in ((f"base_width={base}", base), ("standard", None))
    }
    slopes = {
        name: {part: slope(widths, [steps[-1][part] for steps in moved]) for part in moved[0][-1]}
        for name, moved in found.items()
    }
    report = {
        "widths": widths,
        "base_width": base,
        "optimizer": config.optimizer.kind,
        "learning_rate": config.optimizer.learning_rate,
        "tolerance": task.tolerance,
        "slopes": slopes,
        "moved": found,
    }
    title = f"{config.run}: {config.optimizer.kind}, learning rate {config.optimizer.learning_rate:g}"
    transfers = max(abs(value) for value in next(iter(slopes.values())).values()) <= task.tolerance

    def show() -> None:
        _print(widths, found, slopes)
        verdict = "learning rates transfer" if transfers else f"one is beyond {task.tolerance:g}: rates do NOT transfer"
        print(f"with model.mup_base_width={base}: slopes should be near 0; {verdict}")

    draw = lambda path: draw_coordinates(widths, found, slopes, path, title)
    write_report(config, folder, config.run, report, draw, show)
    return 0 if transfers else 1


def _check(config: RunConfig, task: CoordCheckConfig) -> None:
    if len(set(task.widths)) < 2:
        raise ValueError(f"task.widths={task.widths}: a slope needs at least two distinct widths, such as [64,128,256]")
    if task.num_steps < 1:
        raise ValueError(f"task.num_steps={task.num_steps}: must be at least 1")
    objective = config.objective
    if objective.frozen_needs.models or config.adapter.active or config.init_from is not None:
        raise ValueError(
            "coord_check: measures the first steps from random initialization; remove init_from, adapters, and "
            f"objectives with a reference or teacher model (objective={objective.kind}, init_from={config.init_from})"
        )
    if jax.process_count() > 1:
        raise ValueError("coord_check: runs in one process; remove launcher.num_processes")


def _changes(config: RunConfig, corpora: Corpora, model: ModelConfig) -> list[dict[str, float]]:
    """Returns activation changes of the first steps at the peak learning rate."""
    task = config.task
    assert isinstance(task, CoordCheckConfig)
    config = replace(config, model=model, schedule=ConstantConfig(warmup_steps=0))
    core = build_checked_core(resolve_auto_mesh(config, model, log), corpora.tokenizer)
    source = build_source(config, corpora, core)
    try:
        state = core.init_state()
        batches = [source.next_batch(state) for _ in range(task.num_steps)]
        return activation_changes(core.apply, core.train_step, state, batches, batches[0], model.num_layers)
    finally:
        source.close()


def _print(widths: list[int], found: dict[str, Moved], slopes: dict[str, dict[str, float]]) -> None:
    console = open_console()
    for name, moved in found.items():
        of_widths = (f"width {width}" for width in widths)
        table = make_table(f"{name}: change after {len(moved[0])} steps", *of_widths, "slope")
        for part in shown_parts(list(moved[0][-1])):
            table.add_row(part, *(f"{steps[-1][part]:.4g}" for steps in moved), f"{slopes[name][part]:+.2f}")
        console.print(table)
