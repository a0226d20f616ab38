"""A run on a Ray cluster: an actor on each host, which starts the host's process and dies with it.

The driver is the supervisor: an actor that is lost makes all begin again. Run folders, and with them the code, lie on a
disk that all hosts share. Ray is imported only here, and only when a job is carried out.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from configs.launchers import RayConfig
from launch.launchers import supervisor
from launch.launchers.following import Tail, show_log
from launch.launchers.job import Job, Recipe, assignments, joined, secrets
from launch.launchers.local import process_log
from launch.launchers.supervisor import Ended

LOST = -9  # the code of a process whose actor is gone
START_SECONDS = 600.0  # until the cluster has room for all actors
ANSWER_SECONDS = 60.0  # of an actor; one that is silent for longer is lost
PAUSE = 0.5

status, stop = supervisor.status, supervisor.stop


def recipe(jobs: Sequence[Job]) -> Recipe:
    """The driver's command, which asks for the actors, and the command of each actor."""
    commands = []
    for job in jobs:
        launcher = of(job)
        driver = [job.python, "-P", "-m", "launch.launchers.supervisor", str(job.folder)]
        commands.append(["env", *assignments(job.environment()), *driver])
        for index in range(launcher.hosts):
            variables = {**job.environment(), **joined(launcher.hosts, index, "HOST:PORT")}
            commands.append(["env", *assignments(variables), *job.command()])
    return Recipe(commands=commands)


def of(job: Job) -> RayConfig:
    assert isinstance(job.launcher, RayConfig)
    return job.launcher


def submit(jobs: Sequence[Job], recipe: Recipe) -> int:
    """Raises: ValueError where Ray is not installed."""
    imported()
    return supervisor.submit_each(jobs, carry_out)


def imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("launcher=ray: needs Ray; install it with: pip install -e '.[ray]'") from error
    return ray


def carry_out(job: Job) -> int:
    """Joins the cluster, or starts one here, and supervises the actors. Returns the exit code."""
    ray, launcher = imported(), of(job)
    here = launcher.address == "local"
    room = (
        {"num_cpus": max(1, round(launcher.hosts * launcher.cpus_per_host)), "include_dashboard": False} if here else {}
    )
    ray.init(address=launcher.address, log_to_driver=False, logging_level="error", **room)
    tail = Tail(job.log)
    try:
        code = supervisor.supervise(
            lambda count: attempt(job, count, tail),
            count=launcher.hosts,
            max_restarts=launcher.max_restarts,
            elastic=launcher.elastic,
            saved_step=supervisor.saved_step_of(job),
            say=supervisor.say,
        )
    finally:
        ray.shutdown()
    job.noted(code=code)
    return code


def attempt(job: Job, count: int, tail: Tail) -> Ended:
    """Makes `count` actors, starts their processes and follows them to the end of the last."""
    ray = imported()
    group = _group(job, count)
    actors = [_actor(job, group, index) for index in range(count)]
    try:
        host = ray.get(actors[0].where.remote(of(job).port), timeout=START_SECONDS)
        variables = {**secrets(job.launcher, os.environ), **job.environment()}
        started = []
        for index, actor in enumerate(actors):
            log = job.log if index == 0 else process_log(job, index)
            own = {**variables, **joined(count, index, host)}
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
    ray = imported()
    try:
        return ray.get(method.remote(), timeout=ANSWER_SECONDS)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return LOST


def _group(job: Job, count: int) -> Any:
    """Room for all actors at once, on a host for each; None on this machine alone."""
    launcher = of(job)
    if launcher.address == "local":
        return None
    ray = imported()
    from ray.util.placement_group import placement_group

    bundle = {"CPU": launcher.cpus_per_host, "GPU": launcher.gpus_per_host, **launcher.resources}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    group = placement_group([bundle] * count, strategy="STRICT_SPREAD" if launcher.spread else "PACK")
    ray.get(group.ready(), timeout=START_SECONDS)
    return group


def _actor(job: Job, group: Any, index: int) -> Any:
    launcher, ray = of(job), imported()
    asked: dict[str, Any] = {
        "num_cpus": launcher.cpus_per_host,
        "num_gpus": launcher.gpus_per_host,
        "resources": launcher.resources or None,
        "max_restarts": 0,  # one alone cannot come back: all begin again
    }
    if group is not None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        asked["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return ray.remote(_host_class()).options(**asked).remote()


def _host_class() -> type:
    """A class inside a function goes to the hosts by itself: they need not find this module."""

    class Host:
        def __init__(self) -> None:
            self.child: Any = None

        def where(self, port: int) -> str:
            """HOST:PORT for a coordinator here. `port` 0: a free one."""
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


def logs(job: Job, *, follow: bool) -> int:
    return show_log(job.log, follow=follow, ended=lambda: not supervisor.alive(job))
