"""Starting the real command line in tests, in a process of its own, as a user would."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

TINY = [
    "model=tiny",
    "model.vocab_size=264",  # 257 bytes and their end, rounded up so that a mesh can cut it
    "model.dtype=float32",
    "tokenizer=bytes",
    "data.batch_size=8",
    "data.seq_len=32",
    "task.sample_tokens=0",
    "schedule=constant",
    "schedule.warmup_steps=2",
]


def environment(**extra: str) -> dict[str, str]:
    # The fake devices of conftest are for tests in its own process; here `fake_devices=` says how many there are.
    settled = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "PJRT_NPROC")
    kept = {key: value for key, value in os.environ.items() if key not in settled}
    return kept | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120"} | extra


def start(folder: Path, *arguments: str, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=folder,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def meshwright(folder: Path, *arguments: str, expect: int = 0, **extra: str) -> tuple[str, str]:
    """Runs the command to its end and returns what it printed: (stdout, stderr)."""
    process = start(folder, *arguments, **extra)
    out, err = process.communicate(timeout=600)
    assert process.returncode == expect, f"exit {process.returncode}, not {expect}\n{out}\n{err}"
    return out, err


def metrics(folder: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, run: str) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in metrics(folder, run) if "train/loss" in row}


def inspect(folder: Path, run: str, *arguments: str) -> dict[str, Any]:
    out, _ = meshwright(folder, "inspect", f"run={run}", "format=json", *arguments)
    return json.loads(out)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 240) -> bool:
    """Whether `condition()` comes true in time; it must while `process` runs, where one is given."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not condition():
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    return condition()
