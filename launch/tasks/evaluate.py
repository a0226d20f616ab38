"""`meshwright evaluate run=NAME`: how well a run predicts held-out text, its own or that of other sources."""

import dataclasses
import json

from configs.schema import EvaluateConfig, Format, RunConfig
from launch.assemble import build_evaluation, is_chief, load_corpora
from launch.saved_run import open_run, say


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints loss, perplexity, bits per byte and accuracy for each source and for all together."""
    task = config.task
    assert isinstance(task, EvaluateConfig)
    saved = open_run(config, overrides)
    data = dataclasses.replace(
        saved.config.data,
        eval_batches=task.batches or saved.config.data.eval_batches,
        batch_size=saved.core.batch_size,
    )
    merged = dataclasses.replace(saved.config, data=data)
    quiet = config.format is Format.json
    corpora = load_corpora(merged, saved.folder, (lambda text: None) if quiet else say)
    if not corpora.heldout:
        raise ValueError("data: no source holds out text; set data.sources.NAME.heldout_fraction above 0")
    found = build_evaluation(merged, corpora, saved.core)(saved.params())
    if not is_chief():
        return 0
    if quiet:
        print(json.dumps({"run": saved.folder.name, "step": saved.step, **found}, indent=2))
    else:
        print(f"run {saved.folder.name!r} at step {saved.step}")
        _print_table(found, [*corpora.heldout, ""])
    return 0


def _print_table(found: dict[str, float], sources: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens")
    table = Table(box=None, header_style="bold")
    table.add_column("source")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for source in sources:
        prefix = f"eval/{source}/" if source else "eval/"
        values = [found.get(prefix + column) for column in columns]
        cells = [
            "" if v is None else f"{v:,.0f}" if c == "tokens" else f"{v:.4f}"
            for c, v in zip(columns, values, strict=False)
        ]
        table.add_row(source or "all", *cells)
    Console().print(table)
