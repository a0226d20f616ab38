"""A log on a full disk ends no run, and a closed pipe ends a process quietly."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest

from launch import exit_codes
from launch.safe_stdio import OutputClosed, SafeStream, guarded
from tests.end_to_end.run import environment


class Full(io.StringIO):
    error = errno.ENOSPC

    def write(self, text):
        raise OSError(self.error, "no room")


def broken(error: int) -> Full:
    stream = Full()
    stream.error = error
    return stream


def test_a_full_disk_costs_lines_and_nothing_else(capsys):
    print("lost", file=SafeStream(Full()))
    kept = io.StringIO()
    print("kept", file=SafeStream(kept), flush=True)
    assert kept.getvalue() == "kept\n" and not SafeStream(kept).isatty()


def test_other_errors_are_told():
    with pytest.raises(OSError, match="no room"):
        print("x", file=SafeStream(broken(errno.EIO)))


def test_a_closed_pipe_ends_the_process_with_141(monkeypatch):
    with pytest.raises(OutputClosed):
        print("x", file=SafeStream(broken(errno.EPIPE)))
    monkeypatch.setattr(sys, "stdout", broken(errno.EPIPE))
    assert guarded(lambda: print("x") or 0) == exit_codes.OUTPUT_CLOSED
    assert not exit_codes.is_restartable(exit_codes.OUTPUT_CLOSED)


def test_who_handles_sigterm_is_asked_to_end_and_saves_first(monkeypatch):
    """As a training run does: it saves, leaves with 75, and the command with 141."""
    asked = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    monkeypatch.setattr(sys, "stdout", broken(errno.EPIPE))
    try:
        code = guarded(lambda: print("x") or print("dropped") or exit_codes.PREEMPTED)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [signal.SIGTERM] and code == exit_codes.OUTPUT_CLOSED


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help", "all"], ["train", "--cfg", "job"], ["runs"]])
def test_a_reader_that_leaves_sees_no_error(tmp_path, arguments):
    reader, writer = os.pipe()
    os.close(reader)  # as after `| head -1`
    command = [sys.executable, "-m", "launch.cli", *arguments]
    with os.fdopen(writer) as closed:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == exit_codes.OUTPUT_CLOSED and not done.stderr
