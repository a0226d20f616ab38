"""Report output shared by tasks: terminal tables, JSON and a plot."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import RunConfig
from configs.tasks import Format, ReportTaskConfig
from launch.run_folder import write_whole

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def open_console() -> "Console":
    """Returns a console on standard output, 120 columns wide if it is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def make_table(*names: str, left: tuple[int, ...] = (0,), no_wrap: bool = False) -> "Table":
    """Creates a table without borders. `left`: indices of left-aligned columns; the others are right-aligned."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index in left else "right", no_wrap=no_wrap)
    return table


def write_report(
    config: RunConfig,
    folder: Path,
    name: str,
    found: dict[str, Any],
    draw: Callable[[Path], None],
    show: Callable[[], None],
) -> None:
    """Writes NAME.json and NAME.png to `folder`, and prints the JSON (`task.format=json`) or calls `show`.

    `draw`: writes the plot to a path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    write_whole(folder / f"{name}.json", text + "\n")
    draw(folder / f"{name}.png")
    assert isinstance(config.task, ReportTaskConfig)
    if config.task.format is Format.json:
        print(text)
    else:
        show()
        print(f"written: {folder / name}.json and .png")


def short_number(number: float) -> str:
    """Formats a number with 3 digits and a unit: `842`, `12.3k`, `1.25B`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
