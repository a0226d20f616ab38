"""Several processes of one run on this machine, joined over loopback: a cluster to try things on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from configs.schema import LocalConfig, RunConfig
from launch import exit_codes

GRACE_SECONDS = 10.0  # for the others, when one has died: they may wait for it in a collective for ever


def launch_local(config: RunConfig, overrides: list[str]) -> int:
    """Starts `launcher.num_processes` processes, follows them, and returns the worst of their exit codes.

    Process 0 has this terminal; the others write to `logs/process_K.log` in the run folder. When one dies, the rest,
    who would wait for it in a collective, are stopped.
    """
    launcher = config.launcher
    assert isinstance(launcher, LocalConfig)
    port = launcher.port or _free_port()
    logs = Path(config.runs) / config.run / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    children = []
    for index in range(launcher.num_processes):
        env = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(launcher.num_processes),
            "JAX_PROCESS_ID": str(index),
        }
        output = None if index == 0 else open(logs / f"process_{index}.log", "ab")  # noqa: SIM115
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", "launch.run", config.task.kind, *_flags(), *_without_task(overrides)],
                env=env | {"PYTHONPATH": os.pathsep.join(_import_path())},
                stdout=output,
                stderr=output,
            )
        )
        if output is not None:
            output.close()
    return _follow(children, logs)


def _without_task(overrides: list[str]) -> list[str]:
    return [o for o in overrides if not o.startswith("task=")]


def _flags() -> list[str]:
    """Hydra's own flags, such as `--config-dir DIR`, without the one that makes a sweep of it."""
    return [a for a in sys.argv[1:] if "=" not in a and not a.startswith("~") and a not in ("-m", "--multirun")]


def _import_path() -> list[str]:
    here = str(Path(__file__).resolve().parent.parent)
    return [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _follow(children: list[subprocess.Popen], logs: Path) -> int:
    """Waits for all; passes signals on; stops the rest when one has failed."""

    def pass_on(number: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)  # SIGTERM alone leads all processes to the same step

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stopped_at: float | None = None
        while any(child.poll() is None for child in children):
            failed = [i for i, child in enumerate(children) if child.poll() not in (None, 0)]
            if failed and stopped_at is None:
                code = children[failed[0]].returncode
                if code != exit_codes.PREEMPTED:
                    where = "" if failed[0] == 0 else f"; see {logs / f'process_{failed[0]}.log'}"
                    print(f"meshwright: process {failed[0]} ended with {code}{where}", file=sys.stderr)
                stopped_at = time.monotonic()
                if code not in (
                    exit_codes.PREEMPTED,
                    exit_codes.WRONG_INPUT,
                ):  # those leave by themselves, all together
                    pass_on(signal.SIGTERM, None)
            if stopped_at is not None and time.monotonic() - stopped_at > GRACE_SECONDS:
                for child in children:
                    child.kill()
            time.sleep(0.05)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            child.kill()
    codes = [child.wait() for child in children]
    worst = [code for code in codes if code]
    return (worst[0] if worst[0] > 0 else 128 - worst[0]) if worst else 0
