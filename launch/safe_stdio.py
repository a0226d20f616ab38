"""Standard output that survives full disks and handles closed pipes.

A full disk must not end a run: log lines are dropped, and the run continues. A closed pipe (`| head`, a pager that was
quit) ends the process quietly. Work is not lost: a process that handles SIGTERM receives one, so a training run saves a
checkpoint first, and a server completes its responses.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from launch import exit_codes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errno values of a disk that accepts no writes


class OutputClosed(Exception):
    """The reader closed the output pipe. Not a BrokenPipeError, which Rich would turn into exit code 1."""


class SafeStream:
    """A stream that drops output on a full disk, and ends the process when its pipe is closed."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.closed_pipe = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._ignore_full_disk(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._ignore_full_disk(self.stream.flush)

    def _ignore_full_disk(self, action: Callable[[], Any]) -> None:
        if self.closed_pipe:
            return
        try:
            action()
        except BrokenPipeError as error:
            self._close_pipe(error)
        except OSError as error:
            if error.errno not in FULL:
                raise

    def _close_pipe(self, error: BrokenPipeError) -> None:
        """Sends SIGTERM to this process. Raises: OutputClosed if SIGTERM has no handler."""
        if callable(signal.getsignal(signal.SIGTERM)):
            self.closed_pipe = True  # drop later output until the handler has ended the process
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise OutputClosed from error


def guarded(action: Callable[[], int]) -> int:
    """Runs `action` with `SafeStream` output and returns its exit code; OUTPUT_CLOSED if the pipe was closed.

    Flushes buffered output here: at interpreter exit, a closed pipe would be reported as an error.
    """
    originals = sys.stdout, sys.stderr
    streams = [SafeStream(stream) for stream in originals]
    sys.stdout, sys.stderr = streams
    try:
        try:
            code = action()
        finally:
            for stream in streams:
                stream.flush()
    except OutputClosed:
        code = exit_codes.OUTPUT_CLOSED
    finally:
        sys.stdout, sys.stderr = originals
    if code == exit_codes.OUTPUT_CLOSED or any(stream.closed_pipe for stream in streams):
        code = exit_codes.OUTPUT_CLOSED
        for stream in originals:
            _discard(stream)
    return code


def _discard(stream: Any) -> None:
    """Discards output buffered for a closed pipe."""
    try:
        stream.flush()
    except BrokenPipeError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
