"""Multi-process initialization of JAX: explicit settings first, then detection of the cluster.

`settings` is a pure function of the environment, so every cluster can be tested without one. JAX itself ignores
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, which launchers and Helm charts set; and under SLURM it assigns one GPU per
task regardless of the job's request. This module corrects both.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launch.heartbeats import Peers

SILENCE = 30  # heartbeat timeout in seconds: an unresponsive process then ends the job
FIRST_PORT, LAST_PORT = 61440, 65535  # range of coordinator ports derived from a job id


@dataclass(frozen=True)
class ProcessSettings:
    """Arguments of `jax.distributed.initialize`. If all but `source` are None, JAX detects them."""

    source: str  # origin of the settings
    coordinator: str | None = None  # host:port of process 0
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None  # None: all visible devices


def is_multi_process(env: Mapping[str, str] | None = None) -> bool:
    """Returns whether this process is part of a multi-process job."""
    return settings(os.environ if env is None else env) is not None


def settings(env: Mapping[str, str]) -> ProcessSettings | None:
    """Returns the process settings found in `env`; None for a single process.

    Raises: ValueError if explicit settings are incomplete or contradictory.
    """
    for detect in (_explicit, _slurm, _open_mpi, _tpu_pod, _kubernetes):
        found = detect(env)
        if found is not None:
            return None if found.num_processes == 1 else found
    return None


def _explicit(env: Mapping[str, str]) -> ProcessSettings | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if env.get(name)]
    if not given or given == ["JAX_COORDINATOR_ADDRESS"]:  # only the address: the cluster provides the rest
        return None
    if len(given) < 3:
        missing = [name for name in names if name not in given]
        raise ValueError(f"{given[0]}={env[given[0]]}: {', '.join(missing)} must also be set")
    count, index = (_integer(env, name) for name in names[1:])
    if not 0 <= index < count:
        raise ValueError(f"JAX_PROCESS_ID={index}: must be between 0 and JAX_NUM_PROCESSES - 1 = {count - 1}")
    address = env["JAX_COORDINATOR_ADDRESS"]
    if ":" not in address:
        address = f"{address}:{env.get('JAX_COORDINATOR_PORT', '1234')}"
    ids = [int(i) for i in env["JAX_LOCAL_DEVICE_IDS"].split(",")] if env.get("JAX_LOCAL_DEVICE_IDS") else None
    return ProcessSettings("explicit settings", address, count, index, ids)


def _slurm(env: Mapping[str, str]) -> ProcessSettings | None:
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(env.get(name) for name in needed):
        return None  # not inside srun
    host = first_host(env["SLURM_STEP_NODELIST"])
    address = env.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{_port(env['SLURM_JOB_ID'])}"
    return ProcessSettings(
        "SLURM", address, _integer(env, "SLURM_NTASKS"), _integer(env, "SLURM_PROCID"), _slurm_devices(env)
    )


def _slurm_devices(env: Mapping[str, str]) -> list[int] | None:
    """Returns the local device ids of this task: its share of the GPUs if all tasks of a node see all of them."""
    visible = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "") or env.get("SLURM_NTASKS_PER_NODE", "") or "1")
    count = int(tasks.group()) if tasks else 1
    if len(visible) <= 1 or count <= 1 or len(visible) % count:
        return None  # already bound by cgroups, or one task per node: use all
    share = len(visible) // count
    first = _integer(env, "SLURM_LOCALID") * share
    return list(range(first, first + share))


def _open_mpi(env: Mapping[str, str]) -> ProcessSettings | None:
    if not env.get("OMPI_COMM_WORLD_SIZE") or not env.get("OMPI_COMM_WORLD_RANK"):
        return None
    size, rank = _integer(env, "OMPI_COMM_WORLD_SIZE"), _integer(env, "OMPI_COMM_WORLD_RANK")
    address = env.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911": a job number shared by all ranks, and the launcher's host.
        match = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,:\]]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
        if match is None and size > 1:
            raise ValueError(
                f"OMPI_COMM_WORLD_SIZE={size}: this Open MPI does not export its launcher's host; "
                "set JAX_COORDINATOR_ADDRESS=HOST:PORT of rank 0"
            )
        address = f"{match.group(2)}:{_port(match.group(1))}" if match else None
    return ProcessSettings("Open MPI", address, size, rank)


def _tpu_pod(env: Mapping[str, str]) -> ProcessSettings | None:
    hosts = [h for h in (env.get("TPU_WORKER_HOSTNAMES") or "").split(",") if h]
    slices = env.get("MEGASCALE_NUM_SLICES", "1")
    if (len(hosts) < 2 and slices == "1") or env.get("JAX_PLATFORMS") == "cpu":
        return None
    return ProcessSettings("TPU pod")  # libtpu knows its topology: no arguments needed


def _kubernetes(env: Mapping[str, str]) -> ProcessSettings | None:
    if not env.get("KUBERNETES_SERVICE_HOST") or not env.get("JOB_COMPLETION_INDEX"):
        return None
    return ProcessSettings("Kubernetes")  # an Indexed Job; JAX queries the API server for the number of pods


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ValueError(f"{name}={env[name]!r}: must be an integer") from None


def _port(job: str) -> int:
    return FIRST_PORT + int(re.sub(r"\D", "", job) or 0) % (LAST_PORT - FIRST_PORT + 1)


peers: Peers | None = None  # None for a single process

IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
THREADS = 8  # per fake device


def raise_fake_device_timeout(count: int) -> None:
    """Configures XLA for `count` fake devices in this process, to avoid deadlocks. Call it before JAX starts.

    A collective of XLA's CPU backend blocks its thread until all its devices have joined. By default, independent
    collectives start in any order, different on each device, with one thread per device: devices then deadlock.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if IN_ORDER not in flags:
        os.environ["XLA_FLAGS"] = f"{IN_ORDER} {flags}".rstrip()
    os.environ.setdefault("PJRT_NPROC", str(max(THREADS * count, os.cpu_count() or 1)))


def first_host(nodelist: str) -> str:
    """Returns the first host of a SLURM node list: `a03` for `a[03-05,9],b`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodelist)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodelist!r}: contains no host name")
    return match.group(1) + (match.group(2) or "")


def start(devices: int | None) -> None:
    """Sets up fake devices, the compilation cache and multi-process JAX. Call it before any other use of JAX.

    Raises: ValueError if `devices` contradicts the environment or the number of processes.
    """
    found = settings(os.environ)
    import jax

    if devices is not None:
        share, rest = divmod(devices, (found.num_processes or 1) if found else 1)
        if rest or not share:
            count = found.num_processes if found else 1
            raise ValueError(f"fake_devices={devices}: must be a multiple of the {count} processes")
        own = os.environ.get("JAX_NUM_CPU_DEVICES")
        if own and int(own) != share:
            raise ValueError(f"fake_devices={devices}: contradicts JAX_NUM_CPU_DEVICES={own}; unset one of them")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", share)
    several = devices or found or "JAX_NUM_CPU_DEVICES" in os.environ
    if several and jax.config.values["jax_platforms"] == "cpu":
        raise_fake_device_timeout(max(jax.config.values["jax_num_cpu_devices"], 1))
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "meshwright", "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    if found is None:
        return
    timeout = {"heartbeat_timeout_seconds": SILENCE}
    if found.coordinator is None:
        jax.distributed.initialize(**timeout)
    else:
        arguments = found.coordinator, found.num_processes, found.process_id, found.local_device_ids
        jax.distributed.initialize(*arguments, **timeout, **_bind(found.coordinator))
    watch_peers()


def watch_peers() -> None:
    """Starts the heartbeats between processes."""
    global peers
    from jax._src.distributed import global_state  # no public API for the store and the address

    assert global_state.client is not None and global_state.process_id is not None
    peers = Peers(
        global_state.client, global_state.process_id, global_state.num_processes, global_state.coordinator_address
    )
    peers.start()


def _bind(coordinator: str) -> dict[str, str]:
    # By default process 0 listens on every interface, which a coordinator on loopback does not need.
    host = coordinator.rsplit(":", 1)[0]
    return {"coordinator_bind_address": coordinator} if host in ("127.0.0.1", "localhost") else {}


# Substrings of runtime errors that report a lost peer.
GONE = ("Gloo", "NCCL", "closed by peer", "reset by peer", "Socket closed", "oordination service", "heartbeat")


def exit_if_peer_lost(error: BaseException) -> None:
    """Exits with code 75 if `error` reports a lost peer, since any collective with that peer would hang.

    Prints which peer was lost once it is known, after at most `launch.heartbeats.NAMING_TIMEOUT` seconds.
    """
    import sys

    jax = sys.modules.get("jax")
    if jax is None or peers is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return
    message = str(error).splitlines()[0]
    if any(word in message for word in GONE):
        peers.exit_lost(message)


def stop() -> None:
    """Shuts down multi-process JAX together with the other processes."""
    global peers
    import jax

    if jax.distributed.is_initialized():
        if peers is not None:
            peers.stop()
            peers = None
        jax.distributed.shutdown()


def exit_now(code: int) -> None:
    """Exits at once if other processes exist, since a joint shutdown would wait for those still running."""
    import sys

    if peers is not None:
        peers.go(code)
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():  # before peers were started, or after they stopped
        os._exit(code)
