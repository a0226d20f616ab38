"""Jobs as a command line would make them, for tests of launchers."""

import os
from pathlib import Path

from hydra import compose, initialize_config_module

from configs.schema import RunConfig, register, to_typed
from launch.launchers.job import Job
from launch.overrides import quoted


def composed(*overrides: str) -> RunConfig:
    register()
    with initialize_config_module(config_module="configs", version_base="1.3"):
        return to_typed(compose("root", overrides=[quoted(o) for o in overrides]))


def job(*overrides: str, folder: str | Path = "/home/me/runs/a/jobs/1") -> Job:
    """A job of the run `a` that knows no name of this machine."""
    config = composed("run=a", *overrides)
    return Job(
        folder=Path(folder),
        run="a",
        task="train",
        arguments=[quoted(o) for o in overrides],
        launcher=config.launcher,
        python="/home/me/env/bin/python",
        workdir="/home/me",
    )


RECORDED = Path(__file__).parent / "recorded"


def same_as_recorded(name: str, text: str) -> None:
    """Compares with `recorded/NAME`. A meant change is recorded with MESHWRIGHT_RECORD=1 and read before it is kept."""
    file = RECORDED / name
    if os.environ.get("MESHWRIGHT_RECORD"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"{file} differs; look at the difference, then record it with MESHWRIGHT_RECORD=1"
