"""Programs of clusters that are not there: scripts that note how they are called and answer as told."""

from pathlib import Path


def program(folder: Path, name: str, answers: dict[str, str] | None = None) -> Path:
    """Puts a program into `folder` and returns the file of its calls.

    `answers`: lines of sh by a part of the call. What it is given as input is kept in FILE.input, null bytes as lines.
    """
    calls = folder / f"{name}.calls"
    cases = "".join(f"  *'{part}'*)\n{lines}\n  ;;\n" for part, lines in (answers or {}).items())
    keep = f"[ -t 0 ] || tr '\\0' '\\n' >> {calls}.input"
    (folder / name).write_text(f'#!/bin/bash\necho "$*" >> {calls}\n{keep}\ncase "$*" in\n{cases}esac\n')
    (folder / name).chmod(0o755)
    return calls


def files_with(folder: Path, text: str, but: tuple[Path, ...] = ()) -> list[Path]:
    """Files below a folder in which a text stands."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path not in but]
    return [path for path in paths if text.encode() in path.read_bytes()]
