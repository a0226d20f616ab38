"""Supervises the job in FOLDER in the background: `python -m launch.launchers FOLDER`."""

import sys
from pathlib import Path

from launch.launchers.job import Job
from launch.launchers.launcher_registry import LAUNCHERS
from launch.launchers.supervisor import SupervisedLauncher


def main() -> None:
    job = Job.load(Path(sys.argv[1]))
    launcher = LAUNCHERS[job.launcher.kind]
    assert isinstance(launcher, SupervisedLauncher)
    sys.exit(launcher.run(job))


if __name__ == "__main__":
    main()
