"""Showing a file that grows."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

PAUSE = 0.5  # seconds


class Tail:
    """What has come to a file since the last look; a file that is not there yet is empty."""

    def __init__(self, path: Path):
        self._path, self._at = path, 0

    def show(self) -> None:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                text = file.read()
        except FileNotFoundError:
            return
        self._at += len(text)
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


def show_log(path: Path, *, follow: bool, ended: Callable[[], bool]) -> int:
    """Prints the file and, with `follow`, what comes until `ended()` or Ctrl-C."""
    tail = Tail(path)
    try:
        while True:
            last = not follow or ended()  # asked before the look: what came until the end is shown
            tail.show()
            if last:
                return 0
            time.sleep(PAUSE)
    except KeyboardInterrupt:
        return 0
