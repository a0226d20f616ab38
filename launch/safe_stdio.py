"""What becomes of a process whose output finds no place.

A full disk must not end a run: a log on it loses lines, and the run continues. A closed pipe (`| head`, a pager that
was quit) ends the process quietly, rather than letting it continue unseen. Work is not lost: a process that handles
SIGTERM gets one, so a training run saves a checkpoint first, and a server finishes its answers.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from launch import exit_codes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of errors of a disk that takes nothing now


class OutputClosed(Exception):
    """Nobody reads the output any more. It is no BrokenPipeError, which Rich would turn into exit code 1."""


class SafeStream:
    """A stream that drops what the disk behind it does not take, and ends the process when its pipe is closed."""

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
        """Raises: OutputClosed where nothing handles SIGTERM."""
        if callable(signal.getsignal(signal.SIGTERM)):
            self.closed_pipe = True  # later output is dropped until the handler has ended the process
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise OutputClosed from error


def guarded(action: Callable[[], int]) -> int:
    """The exit code of `action`, whose output goes through `Output`; OUTPUT_CLOSED where its pipe was closed.

    What is still buffered is written here: at the interpreter's own exit a closed pipe would be reported as an error.
    """
    before = sys.stdout, sys.stderr
    streams = [SafeStream(stream) for stream in before]
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
        sys.stdout, sys.stderr = before
    if code == exit_codes.OUTPUT_CLOSED or any(stream.closed_pipe for stream in streams):
        code = exit_codes.OUTPUT_CLOSED
        for stream in before:
            _drop(stream)
    return code


def _drop(stream: Any) -> None:
    """Lets what is buffered for a closed pipe go nowhere."""
    try:
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
