"""Faults of several kinds, by a seed, against two processes; the long version is the benchmark itself."""

import subprocess
import sys

from tests.end_to_end.run import ROOT, environment


def test_a_run_under_faults_ends_as_the_unbroken_one():
    command = ["benchmarks/chaos.py", "--faults", "3", "--processes", "2", "--seed", "900", "--plain"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 faults" in done.stdout and "the end is that of the unbroken run" in done.stdout
