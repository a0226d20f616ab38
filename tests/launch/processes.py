"""Finds processes on this machine, for tests that kill them."""

import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """Returns the child processes, oldest first."""
    try:
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(pid: int) -> list[int]:
    return [below for child in children(pid) for below in [child, *descendants(child)]]


def holding(path: Path) -> list[int]:
    """Returns the processes that have a file open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(path) in [os.readlink(link) for link in (process / "fd").iterdir()]:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def environment_of(pid: int) -> dict[str, str]:
    """Returns the initial environment of a process; empty if it has ended."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def called_in(folder: Path, word: str) -> list[int]:
    """Returns the processes with this working directory whose command contains `word`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder and word.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found
