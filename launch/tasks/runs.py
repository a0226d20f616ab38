"""`meshwright runs`: lists the runs in a folder."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from configs.schema import RunConfig
from configs.tasks import Format, RunsConfig
from launch.run_folder import RunFolder, folders
from trainer.tracker import START


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints a table of runs, newest last. An empty or missing folder is reported, not an error."""
    task = config.task
    assert isinstance(task, RunsConfig)
    rows = [describe(folder) for folder in folders(config.output_dir)]
    rows.sort(key=lambda row: row["updated"])
    if task.format is Format.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"no runs in {config.output_dir}; start with: meshwright train experiment=hello")
    else:
        _print_table(rows)
    return 0


def describe(folder: RunFolder) -> dict[str, Any]:
    """Returns name, step, losses, final state and last update of a run."""
    saved = yaml.safe_load(folder.config.read_text())
    latest = last_values(folder.metrics)
    summary = json.loads(folder.summary.read_text()) if folder.summary.exists() else {}
    newest = folder.metrics if folder.metrics.exists() else folder.config
    return {
        "run": folder.name,
        "step": latest.get("step", 0),
        "num_steps": saved["task"].get("num_steps"),
        "train_loss": latest.get("train/loss"),
        "eval_loss": latest.get("eval/loss"),
        "eval_bits_per_byte": latest.get("eval/bits_per_byte"),
        "tokens": latest.get("train/tokens"),
        "starts": int(latest.get(START, 1)),
        "ended": summary.get("ended", "running or killed"),
        "updated": newest.stat().st_mtime,
    }


def last_values(metrics: Path) -> dict[str, Any]:
    """Returns the last value of each metric in a `metrics.jsonl`; skips incomplete lines."""
    values: dict[str, Any] = {}
    if metrics.exists():
        for line in metrics.read_text().splitlines():
            try:
                values.update(json.loads(line))
            except json.JSONDecodeError:
                continue
    return values


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("run", "step", "train loss", "eval loss", "bits/byte", "starts", "ended", "last written"):
        table.add_column(name, justify="left" if name in ("run", "ended") else "right", no_wrap=True)

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    for row in rows:
        step = f"{row['step']:,}" + (f" / {row['num_steps']:,}" if row["num_steps"] else "")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["updated"]))
        numbers = [number(row[key]) for key in ("train_loss", "eval_loss", "eval_bits_per_byte")]
        table.add_row(row["run"], step, *numbers, str(row["starts"]), row["ended"], when)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
