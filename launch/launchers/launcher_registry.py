"""Launcher registry and job submission."""

import os
import shutil
import sys
from collections.abc import Sequence

from configs.launchers import LocalConfig
from configs.schema import RunConfig
from launch import distributed
from launch.launchers.job import MARK, Job, cli_flags, freeze, jobs_folder, make_job, next_folder, secrets, take_folder
from launch.launchers.k8s import K8sLauncher
from launch.launchers.launcher import Launcher
from launch.launchers.local import LocalLauncher
from launch.launchers.ray_cluster import RayLauncher
from launch.launchers.skypilot import SkypilotLauncher
from launch.launchers.slurm import SlurmLauncher
from launch.launchers.tpu_vm import TpuVmLauncher

LAUNCHERS: dict[str, Launcher] = {
    "local": LocalLauncher(),
    "slurm": SlurmLauncher(),
    "k8s": K8sLauncher(),
    "ray": RayLauncher(),
    "tpu_vm": TpuVmLauncher(),
    "skypilot": SkypilotLauncher(),
}

# Tasks that always run in this process: read-only tasks, and tasks that launch runs themselves.
IN_PROCESS_TASKS = ("plan", "sweep", "scaling_ladder", "inspect", "runs", "status", "logs", "stop")


def launches(config: RunConfig) -> bool:
    """Returns whether the config requests a job instead of running the task in this process."""
    launcher = config.launcher
    if MARK in os.environ or config.task.kind in IN_PROCESS_TASKS:
        return False
    if isinstance(launcher, LocalConfig):
        supervised = launcher.num_processes > 1 or launcher.max_restarts or not launcher.follow or launcher.dry_run
        return bool(supervised) and not distributed.is_multi_process()
    return bool(launcher.kind)


def launch(requests: Sequence[tuple[RunConfig, list[str]]]) -> int:
    """Submits a job or the jobs of a sweep, or prints the recipe for a dry run. Returns the exit code.

    `requests` holds the config and the overrides of each job.

    Raises: ValueError if the jobs are incompatible or a variable of `launcher.env` is not set.
    """
    configs = [config for config, _ in requests]
    launcher, names = configs[0].launcher, [config.run for config in configs]
    if any(config.launcher != launcher for config in configs):
        raise ValueError(
            f"launcher={launcher.kind}: launcher keys must be the same for all jobs of a sweep; sweep over other keys"
        )
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"run={duplicate}: several jobs of the sweep have this name; make it depend on a swept key: "
            "'run=lr_${optimizer.learning_rate}'"
        )
    backend = LAUNCHERS[launcher.kind]
    folders = [flag for flag in cli_flags(sys.argv[1:]) if flag.startswith(("--config-", "-cd", "-cp"))]
    if folders and not backend.shares_disk:
        raise ValueError(
            f"{folders[0]}: refers to a folder of this machine, which launcher={launcher.kind} cannot read; move the "
            "settings to the command line"
        )
    if launcher.dry_run:
        jobs = [make_job(*one, next_folder(jobs_folder(one[0].output_dir, one[0].run))) for one in requests]
        print(backend.recipe(jobs).render(jobs[0].folder))
        return 0
    if backend.local_secrets:
        secrets(launcher, os.environ)  # fails before anything is written
    jobs: list[Job] = []
    for config, overrides in requests:
        job = make_job(config, overrides, take_folder(jobs_folder(config.output_dir, config.run)))
        freeze(job, config)
        jobs.append(job)
    recipe = backend.recipe(jobs)
    recipe.write(jobs[0].folder)
    try:
        return backend.submit(jobs, recipe)
    except ValueError:
        for job in jobs:
            if not Job.load(job.folder).handle:  # never submitted
                shutil.rmtree(job.folder)
        raise
