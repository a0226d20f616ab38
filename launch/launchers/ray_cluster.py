"""Ray launcher: one actor per host, which starts the host's process as a child that dies with the actor.

The driver supervises the actors; if one is lost, all are restarted. Run folders, which contain the code, must be on a
file system shared by all hosts. Ray is imported only here, when a job is run.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from configs.launchers import RayConfig
from launch.launchers import supervisor
from launch.launchers.job import Job, Recipe, assignments, distributed_env, secrets
from launch.launchers.launcher import LogTail
from launch.launchers.local import process_log
from launch.launchers.supervisor import AttemptResult, SupervisedLauncher, supervise_job

LOST = -9  # exit code assigned to a process whose actor is lost
START_SECONDS = 600.0  # timeout for scheduling all actors
ANSWER_SECONDS = 60.0  # timeout for calls to an actor, which then counts as lost
PAUSE = 0.5


class RayLauncher(SupervisedLauncher[RayConfig]):
    """Runs one actor per host, supervised by the driver."""

    def recipe(self, jobs: Sequence[Job[RayConfig]]) -> Recipe:
        """Returns the command of the driver, which creates the actors, and the command of each actor."""
        commands = []
        for job in jobs:
            commands.append(["env", *assignments(job.environment()), *supervisor.supervisor_command(job)])
            for index in range(job.launcher.hosts):
                variables = {**job.environment(), **distributed_env(job.launcher.hosts, index, "HOST:PORT")}
                commands.append(["env", *assignments(variables), *job.command()])
        return Recipe(commands=commands)

    def submit(self, jobs: Sequence[Job[RayConfig]], recipe: Recipe) -> int:
        """Raises ValueError if Ray is not installed."""
        import_ray()
        return super().submit(jobs, recipe)

    def run(self, job: Job[RayConfig]) -> int:
        """Connects to the cluster, or starts a local one, and supervises the actors."""
        ray, launcher = import_ray(), job.launcher
        cpus = max(1, round(launcher.hosts * launcher.cpus_per_host))
        options = {"num_cpus": cpus, "include_dashboard": False} if launcher.address == "local" else {}
        ray.init(address=launcher.address, log_to_driver=False, logging_level="error", **options)
        tail = LogTail(job.log)
        try:
            return supervise_job(job, lambda count: attempt(job, count, tail), launcher.hosts)
        finally:
            ray.shutdown()


def import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("launcher=ray: Ray is not installed; install it with: pip install -e '.[ray]'") from error
    return ray


def attempt(job: Job[RayConfig], count: int, tail: LogTail) -> AttemptResult:
    """Creates `count` actors, starts their processes and waits until all have ended."""
    ray = import_ray()
    group = _group(job, count)
    actors = [_actor(job, group, index) for index in range(count)]
    try:
        host = ray.get(actors[0].where.remote(job.launcher.port), timeout=START_SECONDS)
        variables = {**secrets(job.launcher, os.environ), **job.environment()}
        started = []
        for index, actor in enumerate(actors):
            log = job.log if index == 0 else process_log(job, index)
            own = {**variables, **distributed_env(count, index, host)}
            started.append(actor.start.remote(job.command(), own, job.workdir, str(log)))
        ray.get(started, timeout=START_SECONDS)
        ended: dict[int, int] = {}

        def codes() -> list[int | None]:
            if job.launcher.follow:
                tail.show()
            for index, actor in enumerate(actors):
                if index not in ended and (code := _answer(actor.code)) is not None:
                    ended[index] = code
            return [ended.get(index) for index in range(count)]

        def end_all() -> None:
            for index, actor in enumerate(actors):
                if index not in ended:
                    actor.end.remote()

        def kill_all() -> None:
            for actor in actors:
                ray.kill(actor)

        found = supervisor.watch(codes, end_all=end_all, kill_all=kill_all, pause=PAUSE)
    finally:
        for actor in actors:
            ray.kill(actor)
        if group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(group)
    if found.code == LOST:
        found = replace(found, why=f"the actor of process {found.process} was lost")
    return found


def _answer(method: Any) -> int | None:
    ray = import_ray()
    try:
        return ray.get(method.remote(), timeout=ANSWER_SECONDS)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return LOST


def _group(job: Job[RayConfig], count: int) -> Any:
    """Reserves resources for all actors, by default on separate hosts; None for a local cluster."""
    launcher = job.launcher
    if launcher.address == "local":
        return None
    ray = import_ray()
    from ray.util.placement_group import placement_group

    bundle = {"CPU": launcher.cpus_per_host, "GPU": launcher.gpus_per_host, **launcher.resources}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    group = placement_group([bundle] * count, strategy="STRICT_SPREAD" if launcher.spread else "PACK")
    ray.get(group.ready(), timeout=START_SECONDS)
    return group


def _actor(job: Job[RayConfig], group: Any, index: int) -> Any:
    launcher, ray = job.launcher, import_ray()
    options: dict[str, Any] = {
        "num_cpus": launcher.cpus_per_host,
        "num_gpus": launcher.gpus_per_host,
        "resources": launcher.resources or None,
        "max_restarts": 0,  # a single actor cannot rejoin: the supervisor restarts all of them
    }
    if group is not None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return ray.remote(_host_class()).options(**options).remote()


def _host_class() -> type:
    """Returns the actor class. Ray pickles a local class by value, so hosts need not import this module."""

    class Host:
        def __init__(self) -> None:
            self.child: Any = None

        def where(self, port: int) -> str:
            """Returns HOST:PORT for a coordinator on this host. `port` 0: any free port."""
            import socket

            import ray

            address = ray.util.get_node_ip_address()
            if not port:
                with socket.socket() as probe:
                    probe.bind((address, 0))
                    port = probe.getsockname()[1]
            return f"{address}:{port}"

        def start(self, command: list[str], variables: dict[str, str], workdir: str, log: str) -> None:
            import ctypes
            import os
            import signal
            import subprocess

            def die_with_the_actor() -> None:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

            with open(log, "ab") as output:
                self.child = subprocess.Popen(
                    command,
                    cwd=workdir,
                    env={**os.environ, **variables},
                    stdout=output,
                    stderr=output,
                    preexec_fn=die_with_the_actor,
                )

        def code(self) -> int | None:
            return self.child.poll()

        def end(self) -> None:
            if self.child.poll() is None:
                self.child.terminate()

    return Host
