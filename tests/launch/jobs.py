"""Jobs built from command-line overrides, for tests of launchers."""

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
    """Returns a job of run `a` with paths that do not depend on this machine."""
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
    """Compares `text` with `recorded/NAME`. After an intended change, set MESHWRIGHT_RECORD=1 and review the diff."""
    file = RECORDED / name
    if os.environ.get("MESHWRIGHT_RECORD"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"{file} differs; if intended, record it with MESHWRIGHT_RECORD=1 and review"
