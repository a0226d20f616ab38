"""What can be said of the Dockerfile without Docker: it copies all packages, and knows the extras that there are."""

import re
import subprocess
import tomllib

import pytest

from launch.launchers.job import INSTALL_FILES, PACKAGES
from tests.end_to_end.run import ROOT

TEXT = (ROOT / "launch" / "launchers" / "Dockerfile").read_text()


def test_the_image_gets_every_package_and_what_installing_needs():
    copied = {word for line in re.findall(r"^COPY (.*)$", TEXT, re.M) for word in line.split()[:-1]}
    assert copied == {*PACKAGES, *INSTALL_FILES}


@pytest.mark.parametrize(
    ("device", "asked"),
    [
        ("cpu", ".[tokenizers,safetensors]"),
        ("cuda12", ".[cuda12,tokenizers,safetensors]"),
        ("tpu", ".[tpu,tokenizers,safetensors]"),
    ],
)
def test_each_device_installs_its_extras(device, asked):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(asked[2:-1].split(",")) <= set(extras)
    found = installed(device)
    assert found.stdout == f"-m pip install {asked}\n" and found.returncode == 0


def test_an_unknown_device_is_refused():
    found = installed("rocm")
    assert found.returncode == 2 and "DEVICE=rocm: must be cpu, cuda12, cuda13 or tpu" in found.stderr


def installed(device: str) -> subprocess.CompletedProcess:
    """Runs the image's first RUN with a `python3` that prints what it is told."""
    command = re.search(r"^RUN ((?:.*\\\n)*.*)", TEXT, re.M)
    assert command is not None
    extras = re.search(r"^ARG EXTRAS=(.*)$", TEXT, re.M)
    assert extras is not None
    script = 'python3() { echo "$@"; }\n' + command.group(1).replace("\\\n", " ")
    env = {"DEVICE": device, "EXTRAS": extras.group(1)}
    return subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True)
