"""How the processes of a run start: one dataclass for each place. What carries them out is `launch/launchers/`."""

import enum
import re
from dataclasses import dataclass, field
from typing import ClassVar

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.I)


@dataclass
class LauncherConfig:
    """What all launchers share. Exit code 75 and a process that was killed are restarted; 1 and 2 are not."""

    least: ClassVar[dict[str, int]] = {}  # of the keys below, the smallest values

    kind: str = ""
    dry_run: bool = False  # Print what would be run; run nothing and write nothing
    follow: bool = True  # Follow the log of the job; Ctrl-C leaves a cluster's job running
    max_restarts: int = 3  # Restarts at most, each from the newest checkpoint
    # Environment variables of the processes: NAME passes on this shell's value and is written nowhere, for
    # secrets; NAME=VALUE is written into scripts
    env: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Raises: ValueError naming key, value (never that of a secret), reason and fix."""
        for entry in self.env:
            name, given, _ = entry.partition("=")
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"launcher.env=[{name}]: is no name of an environment variable; give NAME or NAME=VALUE"
                )
            if given and SECRET.search(name):
                raise ValueError(
                    f"launcher.env=[{name}=...]: looks like a secret, and values are written into scripts; set "
                    f"{name} in this shell and give the name alone: launcher.env=[{name}]"
                )
        for key, least in {"max_restarts": 0, **self.least}.items():
            if getattr(self, key) < least:
                raise ValueError(f"launcher.{key}={getattr(self, key)}: must be at least {least}")


@dataclass
class LocalConfig(LauncherConfig):
    """Processes on this machine, joined over loopback."""

    least: ClassVar[dict[str, int]] = {"num_processes": 1}

    kind: str = "local"
    max_restarts: int = 0  # Restarts at most, each from the newest checkpoint
    num_processes: int = 1  # Number of processes
    port: int = 0  # TCP port of the coordinator; 0: a free one
    elastic: bool = False  # Continue with half the processes after two restarts in a row without progress


class Runtime(enum.Enum):
    pyxis = "pyxis"  # srun --container-image, by NVIDIA's Pyxis and enroot
    apptainer = "apptainer"


@dataclass
class SlurmConfig(LauncherConfig):
    """A batch job; `-m` makes the jobs of a sweep one array. The run folder is on a disk that all nodes share."""

    least: ClassVar[dict[str, int]] = {
        "nodes": 1, "processes_per_node": 1, "grace": 1, "gpus_per_node": 0, "cpus_per_process": 0, "array_limit": 0,
    }  # fmt: skip

    kind: str = "slurm"
    nodes: int = 1  # Number of nodes
    processes_per_node: int = 1  # Processes per node, which share its GPUs equally
    gpus_per_node: int = 0  # GPUs per node
    cpus_per_process: int = 0  # CPUs per process; 0: the default of the cluster
    time: str | None = None  # Time limit as SLURM writes it: 4:00:00; null: that of the partition
    grace: int = 120  # Seconds before the time limit at which a checkpoint is saved and the job is requeued
    partition: str | None = None  # Partition to submit to; null: the default of the cluster
    account: str | None = None  # Account to charge; null: the user's default
    qos: str | None = None  # Quality of service; null: the user's default
    options: list[str] = field(default_factory=list)  # Further options of sbatch: [--exclusive, --mem=0]
    array_limit: int = 0  # Jobs of a sweep that run at once; 0: no limit
    # Container image of Pyxis (docker://..., FILE.sqsh) or Apptainer (FILE.sif); null: no container
    image: str | None = None
    runtime: Runtime = Runtime.pyxis  # Container runtime
    mounts: list[str] = field(default_factory=list)  # Further folders mounted in the container, HOST:CONTAINER
    python: str | None = None  # Python interpreter; null: this one, in a container python3


@dataclass
class K8sConfig(LauncherConfig):
    """A JobSet, queued by Kueue. Of `env`, names alone are keys of the Kubernetes secret `secret`."""

    least: ClassVar[dict[str, int]] = {"hosts": 1, "slices": 1, "grace": 1, "gpus_per_host": 0, "tpus_per_host": 0}

    kind: str = "k8s"
    namespace: str = "default"  # Namespace of the job
    # Container image with Python and Meshwright's dependencies; the code of this checkout is copied into it
    image: str = ""
    queue: str | None = None  # LocalQueue of Kueue; null: no queue
    priority: str | None = None  # WorkloadPriorityClass of Kueue; null: none
    hosts: int = 1  # Number of pods; with TPUs those of one slice
    slices: int = 1  # Number of TPU slices
    gpus_per_host: int = 0  # GPUs per pod
    tpu_accelerator: str | None = None  # TPU type as GKE names it: tpu-v5p-slice, tpu-v6e-slice; null: no TPUs
    tpu_topology: str | None = None  # Topology of a TPU slice: 2x2x4
    tpus_per_host: int = 0  # TPU chips per pod
    cpu: str | None = None  # CPUs per pod, as Kubernetes writes them: 8, 500m; null: no request
    memory: str | None = None  # Memory per pod: 64Gi; null: no request
    # PersistentVolumeClaim for the run folders; null: output_dir= must be a bucket, or they are lost
    volume: str | None = None
    secret: str | None = None  # Kubernetes secret with the variables that env only names
    service_account: str | None = None  # Service account of the pods; null: the default of the namespace
    host_network: bool = False  # Use the host's network, which several slices and InfiniBand may require
    node_selector: dict[str, str] = field(default_factory=dict)  # Labels of the nodes to run on
    grace: int = 120  # Seconds from SIGTERM to SIGKILL, enough for a checkpoint

    def validate(self) -> None:
        super().validate()
        if not self.image:
            raise ValueError("launcher.image='': k8s needs one; build launch/launchers/Dockerfile and push it")
        tpu = (self.tpu_accelerator, self.tpu_topology, self.tpus_per_host or None)
        if any(tpu) and not all(tpu):
            raise ValueError(
                f"launcher.tpu_accelerator={self.tpu_accelerator}: TPUs need launcher.tpu_accelerator, "
                "launcher.tpu_topology and launcher.tpus_per_host together"
            )
        if any(tpu) and self.gpus_per_host:
            raise ValueError(f"launcher.gpus_per_host={self.gpus_per_host}: a pod has TPUs or GPUs, not both")
        if self.slices > 1 and not any(tpu):
            raise ValueError(f"launcher.slices={self.slices}: is of TPUs; for others give launcher.hosts")
        for entry in self.env:
            if "=" not in entry and self.secret is None:
                raise ValueError(
                    f"launcher.env=[{entry}]: a name alone is in a Kubernetes secret; give launcher.secret=NAME, made "
                    f"with: kubectl create secret generic NAME --from-literal={entry}=..."
                )


@dataclass
class RayConfig(LauncherConfig):
    """An actor on each host of a Ray cluster. The run folder is on a disk that all hosts share."""

    least: ClassVar[dict[str, int]] = {"hosts": 1}

    kind: str = "ray"
    address: str = "auto"  # Address of the Ray cluster: auto, HOST:PORT; local starts one on this machine
    hosts: int = 1  # Number of actors, one process each
    cpus_per_host: float = 1.0  # CPUs per actor
    gpus_per_host: float = 0.0  # GPUs per actor
    resources: dict[str, float] = field(default_factory=dict)  # Further resources per actor: {TPU: 4}
    spread: bool = True  # Place each actor on its own host
    port: int = 0  # TCP port of the coordinator; 0: a free one
    elastic: bool = False  # Continue with half the hosts after two restarts in a row without progress


@dataclass
class TpuVmConfig(LauncherConfig):
    """A Cloud TPU slice as a queued resource, and every worker of it over ssh, through gcloud."""

    kind: str = "tpu_vm"
    name: str | None = None  # Name of the TPU, which is used if it exists; null: the name of the run
    accelerator: str = ""  # TPU type and size: v5p-32, v6e-64
    runtime: str = ""  # TPU software version: v2-alpha-tpuv5, v2-alpha-tpuv6e
    zone: str = ""  # Google Cloud zone
    project: str | None = None  # Google Cloud project; null: the default of gcloud
    spot: bool = False  # Use spot capacity: cheaper, and preempted at any time
    reserved: bool = False  # Use reserved capacity
    # Setup command on each worker, in the folder of the code
    setup: str = "python3 -m pip install -q --user -e '.[tpu]'"
    python: str = "python3"  # Python interpreter on the workers

    def validate(self) -> None:
        super().validate()
        for key in ("accelerator", "runtime", "zone"):
            if not getattr(self, key):
                raise ValueError(f"launcher.{key}='': tpu_vm needs it, for example {TPU_VM_EXAMPLE}")
        if self.spot and self.reserved:
            raise ValueError("launcher.spot=true: a reserved TPU is not taken away; leave one of the two out")


TPU_VM_EXAMPLE = "launcher.accelerator=v6e-16 launcher.runtime=v2-alpha-tpuv6e launcher.zone=us-east5-b"


@dataclass
class SkypilotConfig(LauncherConfig):
    """A SkyPilot task: any cloud, one cluster a run."""

    least: ClassVar[dict[str, int]] = {"num_nodes": 1, "autostop": 0}

    kind: str = "skypilot"
    cluster: str | None = None  # Name of the cluster; null: the name of the run
    infra: str | None = None  # Cloud and region: aws/us-east-1, gcp, k8s; null: the cheapest
    accelerators: str | None = None  # Accelerators per node: H100:8, tpu-v6e-8; null: CPUs only
    num_nodes: int = 1  # Number of nodes
    cpus: str | None = None  # CPUs per node: 8, 8+ for at least 8; null: SkyPilot's default
    memory: str | None = None  # Memory per node in GB: 64, 64+ for at least 64; null: SkyPilot's default
    spot: bool = False  # Use spot instances: cheaper, and preempted at any time
    image: str | None = None  # Image: docker:NAME, or one of the cloud; null: SkyPilot's default
    # Bucket for the run folders, s3://... or gs://..., so that they outlive the cluster; null: none
    bucket: str | None = None
    # Setup command on each node, in the folder of the code; null: install Meshwright for the accelerators
    setup: str | None = None
    python: str = "python3"  # Python interpreter on the nodes
    autostop: int = 10  # Idle minutes after which the cluster is deleted


LAUNCHERS: dict[str, type[LauncherConfig]] = {
    "local": LocalConfig,
    "slurm": SlurmConfig,
    "k8s": K8sConfig,
    "ray": RayConfig,
    "tpu_vm": TpuVmConfig,
    "skypilot": SkypilotConfig,
}
