"""A log on a full disk ends no run."""

import errno
import io

import pytest

from launch.safe_stdio import SafeStream


class Full(io.StringIO):
    error = errno.ENOSPC

    def write(self, text):
        raise OSError(self.error, "no room")


def test_a_full_disk_costs_lines_and_nothing_else(capsys):
    print("lost", file=SafeStream(Full()))
    kept = io.StringIO()
    print("kept", file=SafeStream(kept), flush=True)
    assert kept.getvalue() == "kept\n" and not SafeStream(kept).isatty()


def test_other_errors_are_told():
    broken = Full()
    broken.error = errno.EPIPE
    with pytest.raises(OSError, match="no room"):
        print("x", file=SafeStream(broken))
