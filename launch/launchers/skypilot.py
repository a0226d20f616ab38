"""SkyPilot launcher: one cluster per run on any cloud, with one process per node.

`sky` reads the values of secrets from the environment of this shell. An idle cluster is deleted after
`launcher.autostop` minutes; run folders persist in `launcher.bucket`.
"""

import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from configs.launchers import SkypilotConfig
from launch.distributed import FIRST_PORT
from launch.launchers.job import Job, Recipe, check_output, public_name, restart_loop, run_command
from launch.launchers.launcher import Launcher

FILE = "task.yaml"
HOME = "~/meshwright"  # working directory of the processes on a node


def cluster(job: Job[SkypilotConfig]) -> str:
    return job.launcher.cluster or public_name(job.run)


def launch(job: Job[SkypilotConfig]) -> list[str]:
    names = [word for entry in job.launcher.env if "=" not in entry for word in ("--secret", entry)]
    flags = ["--idle-minutes-to-autostop", str(job.launcher.autostop), "--down", "--detach-run"]
    return ["sky", "launch", "--yes", "--cluster", cluster(job), *flags, *names, str(job.folder / FILE)]


def task_yaml(job: Job[SkypilotConfig]) -> str:
    return yaml.dump(task(job), Dumper=_Blocks, sort_keys=False, width=120)


class _Blocks(yaml.SafeDumper):
    """Writes multi-line strings as literal block scalars."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _block)


def task(job: Job[SkypilotConfig]) -> dict[str, Any]:
    launcher = job.launcher
    resources = {
        "infra": launcher.infra,
        "accelerators": launcher.accelerators,
        "cpus": launcher.cpus,
        "memory": launcher.memory,
        "use_spot": launcher.spot or None,
        "image_id": launcher.image,
    }
    found: dict[str, Any] = {
        "name": public_name(job.run, job.number),
        "workdir": str(job.code),
        "num_nodes": launcher.num_nodes,
        "resources": {key: value for key, value in resources.items() if value is not None},
        "envs": {name: value for name, value in job.environment().items() if name != "PYTHONPATH"},
        "secrets": {entry: None for entry in launcher.env if "=" not in entry},
        "setup": launcher.setup or install(launcher),
        "run": _run(job),
    }
    if launcher.bucket:
        found["file_mounts"] = {f"{HOME}/runs": {"source": launcher.bucket, "mode": "MOUNT"}}
    return {key: value for key, value in found.items() if value != {}}


def install(launcher: SkypilotConfig) -> str:
    kind = launcher.accelerators
    extra = "" if kind is None else "[tpu]" if kind.startswith("tpu") else "[cuda12]"
    return f"{launcher.python} -m pip install -q -e '.{extra}'"


def _run(job: Job[SkypilotConfig]) -> str:
    """Returns the script that runs on each node, in the code folder."""
    launcher = job.launcher
    distributed = {
        "JAX_COORDINATOR_ADDRESS": f'"$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{FIRST_PORT}"',
        "JAX_NUM_PROCESSES": '"$SKYPILOT_NUM_NODES"',
        "JAX_PROCESS_ID": '"$SKYPILOT_NODE_RANK"',
    }
    lines = [
        'export PYTHONPATH="$PWD"',
        *(f"export {name}={value}" for name, value in distributed.items()),
        f'job={HOME}/jobs/{public_name(job.run, job.number)}; mkdir -p "$job"; cd {HOME}',
        *restart_loop(shlex.join(job.command(launcher.python)), launcher.max_restarts),
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


class SkypilotLauncher(Launcher[SkypilotConfig]):
    """Launches one cluster per run."""

    shares_disk = False

    def recipe(self, jobs: Sequence[Job[SkypilotConfig]]) -> Recipe:
        """Returns a task file and a launch command per job, each file in the folder of its job."""
        files = {FILE if job is jobs[0] else str(job.folder / FILE): task_yaml(job) for job in jobs}
        return Recipe(files, [launch(job) for job in jobs])

    def submit(self, jobs: Sequence[Job[SkypilotConfig]], recipe: Recipe) -> int:
        """Raises ValueError if sky fails."""
        for job, command in zip(jobs, recipe.commands, strict=True):
            check_output(command)
            job = job.update_handle(cluster=cluster(job))
            print(f"run {job.run!r}: job {job.number} runs on the cluster {cluster(job)}", flush=True)
        return self.logs(jobs[0], follow=True) if jobs[0].launcher.follow and len(jobs) == 1 else 0

    def status(self, job: Job[SkypilotConfig]) -> str:
        return f"cluster {cluster(job)}:\n{check_output(['sky', 'queue', cluster(job)])}"

    def logs(self, job: Job[SkypilotConfig], *, follow: bool) -> int:
        """Prints the log of the cluster's latest task. Ctrl-C leaves the task running.

        Returns the exit code of `sky logs`: 0 if the task succeeded.
        """
        try:
            return run_command(
                ["sky", "logs", *([] if follow else ["--no-follow"]), cluster(job)], shown=True
            ).returncode
        except KeyboardInterrupt:
            return 0

    def stop(self, job: Job[SkypilotConfig]) -> str:
        name, minutes = cluster(job), job.launcher.autostop
        check_output(["sky", "cancel", "--yes", "--all", name])
        return f"cancelled; the cluster is deleted after {minutes} minutes; to delete it now: sky down {name}"
