"""Fake cluster commands: scripts that log their calls and print predefined answers."""

from pathlib import Path


def program(folder: Path, name: str, answers: dict[str, str] | None = None) -> Path:
    """Creates a program in `folder`. Returns the file that logs its calls.

    `answers`: shell lines by a substring of the call. Standard input is saved to FILE.input, with null bytes as
    newlines.
    """
    calls = folder / f"{name}.calls"
    cases = "".join(f"  *'{part}'*)\n{lines}\n  ;;\n" for part, lines in (answers or {}).items())
    keep = f"[ -t 0 ] || tr '\\0' '\\n' >> {calls}.input"
    (folder / name).write_text(f'#!/bin/bash\necho "$*" >> {calls}\n{keep}\ncase "$*" in\n{cases}esac\n')
    (folder / name).chmod(0o755)
    return calls


def files_with(folder: Path, text: str, but: tuple[Path, ...] = ()) -> list[Path]:
    """Returns the files below a folder that contain a text."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path not in but]
    return [path for path in paths if text.encode() in path.read_bytes()]
