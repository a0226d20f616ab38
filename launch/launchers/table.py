"""The launchers by their names, and handing jobs over to them."""

import os
import shutil
import sys
from collections.abc import Sequence

from configs.launchers import K8sConfig, LocalConfig
from configs.schema import RunConfig
from launch import distributed
from launch.launchers import k8s, local, ray_cluster, skypilot, slurm, tpu_vm
from launch.launchers.job import (
    MARK,
    Job,
    Launcher,
    cli_flags,
    freeze,
    job_of,
    jobs_folder,
    next_folder,
    secrets,
    take_folder,
)

LAUNCHERS: dict[str, Launcher] = {
    "local": local,
    "slurm": slurm,
    "k8s": k8s,
    "ray": ray_cluster,
    "tpu_vm": tpu_vm,
    "skypilot": skypilot,
}

FAR = ("k8s", "tpu_vm", "skypilot")  # whose processes see nothing of this machine's disk
# Tasks that only look, and those whose runs are what is launched.
HERE = ("plan", "sweep", "scaling_ladder", "inspect", "runs", "status", "logs", "stop")


def launches(config: RunConfig) -> bool:
    """Whether the command line asks for a job, rather than for its task in this process."""
    launcher = config.launcher
    if MARK in os.environ or config.task.kind in HERE:
        return False
    if isinstance(launcher, LocalConfig):
        supervised = launcher.num_processes > 1 or launcher.max_restarts or not launcher.follow or launcher.dry_run
        return bool(supervised) and not distributed.is_multi_process()
    return bool(launcher.kind)


def launch(asked: Sequence[tuple[RunConfig, list[str]]]) -> int:
    """Submits a job, or the jobs of a sweep, or prints what would be run. Returns the exit code.

    Raises: ValueError where they do not go together, or a variable of `launcher.env` is not set.
    """
    configs = [config for config, _ in asked]
    launcher, names = configs[0].launcher, [config.run for config in configs]
    if any(config.launcher != launcher for config in configs):
        raise ValueError(f"launcher={launcher.kind}: the jobs of a sweep differ in launcher keys; sweep over others")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"run={twice}: several jobs of the sweep have this name; give each its own, from what differs: "
            "'run=lr_${optimizer.learning_rate}'"
        )
    folders = [flag for flag in cli_flags(sys.argv[1:]) if flag.startswith(("--config-", "-cd", "-cp"))]
    if folders and launcher.kind in FAR:
        raise ValueError(
            f"{folders[0]}: is of this machine, and launcher={launcher.kind} has no disk in common with it"
        )
    module = LAUNCHERS[launcher.kind]
    if launcher.dry_run:
        jobs = [job_of(*one, next_folder(jobs_folder(one[0].output_dir, one[0].run))) for one in asked]
        print(module.recipe(jobs).shown(jobs[0].folder))
        return 0
    if not isinstance(launcher, K8sConfig):  # whose secrets stand in the cluster
        secrets(launcher, os.environ)  # before anything is written
    jobs: list[Job] = []
    for config, overrides in asked:
        job = job_of(config, overrides, take_folder(jobs_folder(config.output_dir, config.run)))
        freeze(job, config)
        jobs.append(job)
    recipe = module.recipe(jobs)
    recipe.write(jobs[0].folder)
    try:
        return module.submit(jobs, recipe)
    except ValueError:
        for job in jobs:
            if not Job.load(job.folder).handle:  # it never became one
                shutil.rmtree(job.folder)
        raise
