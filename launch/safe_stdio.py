"""What a run prints must not end it: a log on a full disk loses lines, and the run goes on."""

import errno
from collections.abc import Callable
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of errors of a disk that takes nothing now


class SafeStream:
    """A stream that goes on without what the disk behind it does not take."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._ignore_full_disk(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._ignore_full_disk(self.stream.flush)

    def _ignore_full_disk(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in FULL:
                raise
