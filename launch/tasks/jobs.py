"""`meshwright status`, `logs` and `stop`: act on the newest job of a run."""

from configs.schema import RunConfig
from configs.tasks import LogsConfig
from launch.launchers.job import Job, newest_job
from launch.launchers.launcher_registry import LAUNCHERS
from launch.run_folder import run_folder
from launch.tasks.runs import last_values


def status(config: RunConfig, overrides: list[str]) -> int:
    job = find_job(config)
    step = last_values(run_folder(config).metrics).get("step")
    at = "" if step is None else f"; step {step:,}"
    print(f"run {job.run!r}, job {job.number} ({job.launcher.kind}): {LAUNCHERS[job.launcher.kind].status(job)}{at}")
    return 0


def logs(config: RunConfig, overrides: list[str]) -> int:
    assert isinstance(config.task, LogsConfig)
    job = find_job(config)
    return LAUNCHERS[job.launcher.kind].logs(job, follow=config.task.follow)


def stop(config: RunConfig, overrides: list[str]) -> int:
    job = find_job(config)
    print(f"run {job.run!r}, job {job.number} ({job.launcher.kind}): {LAUNCHERS[job.launcher.kind].stop(job)}")
    return 0


def find_job(config: RunConfig) -> Job:
    """Returns the newest job of the run. Raises: ValueError if it has none."""
    job = newest_job(config.output_dir, config.run)
    if job is None:
        raise ValueError(
            f"run={config.run}: has no job in {config.output_dir}; jobs exist only for runs started by a launcher"
        )
    return job
