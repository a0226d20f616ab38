"""Launcher settings: where and how the processes of a run are started. Implemented in `launch/launchers/`."""

import enum
import re
from dataclasses import dataclass, field
from typing import ClassVar

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.I)


@dataclass
class LauncherConfig:
    """Settings common to all launchers. Preempted (exit code 75) and killed processes restart; codes 1 and 2 do not."""

    least: ClassVar[dict[str, int]] = {}  # minimum value of each key

    kind: str = ""
    dry_run: bool = False  # Print scripts and commands without running or writing anything
    follow: bool = True  # Follow the job's log; Ctrl-C leaves a cluster job running
    max_restarts: int = 3  # Maximum number of restarts, each from the latest checkpoint
    # Environment variables of the processes: NAME passes this shell's value and is never written to disk (for
    # secrets); NAME=VALUE is written into scripts
    env: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Raises ValueError with the key, value (never of a secret), reason and fix."""
        for entry in self.env:
            name, given, _ = entry.partition("=")
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"launcher.env=[{name}]: not a valid environment variable name; give NAME or NAME=VALUE"
                )
            if given and SECRET.search(name):
                raise ValueError(
                    f"launcher.env=[{name}=...]: looks like a secret, and values are written into scripts; export "
                    f"{name} in this shell and give only the name: launcher.env=[{name}]"
                )
        for key, least in {"max_restarts": 0, **self.least}.items():
            if getattr(self, key) < least:
                raise ValueError(f"launcher.{key}={getattr(self, key)}: must be at least {least}")


@dataclass
class LocalConfig(LauncherConfig):
    """One or more processes on this machine, connected over the loopback interface."""

    least: ClassVar[dict[str, int]] = {"num_processes": 1}

    kind: str = "local"
    max_restarts: int = 0  # Maximum number of restarts, each from the latest checkpoint
    num_processes: int = 1  # Number of processes
    port: int = 0  # TCP port of the coordinator; 0: any free port
    elastic: bool = False  # Halve the number of processes after two consecutive restarts without progress


class Runtime(enum.Enum):
    pyxis = "pyxis"  # srun --container-image (NVIDIA Pyxis and enroot)
    apptainer = "apptainer"


@dataclass
class SlurmConfig(LauncherConfig):
    """A SLURM batch job, or a job array for `-m`. Run folders must be on a file system shared by all nodes."""

    least: ClassVar[dict[str, int]] = {
        "nodes": 1, "processes_per_node": 1, "grace": 1, "gpus_per_node": 0, "cpus_per_process": 0, "array_limit": 0,
    }  # fmt: skip

    kind: str = "slurm"
    nodes: int = 1  # Number of nodes
    processes_per_node: int = 1  # Processes per node; the node's GPUs are split equally between them
    gpus_per_node: int = 0  # GPUs per node
    cpus_per_process: int = 0  # CPUs per process; 0: cluster default
    time: str | None = None  # Time limit in SLURM format, e.g. 4:00:00; null: partition default
    grace: int = 120  # Seconds before the time limit at which a checkpoint is saved and the job is requeued
    partition: str | None = None  # Partition to submit to; null: cluster default
    account: str | None = None  # Account to charge; null: user default
    qos: str | None = None  # Quality of service; null: user default
    options: list[str] = field(default_factory=list)  # Extra sbatch options: [--exclusive, --mem=0]
    array_limit: int = 0  # Maximum number of concurrent jobs of an array; 0: no limit
    # Container image for Pyxis (docker://..., FILE.sqsh) or Apptainer (FILE.sif); null: no container
    image: str | None = None
    runtime: Runtime = Runtime.pyxis  # Container runtime
    mounts: list[str] = field(default_factory=list)  # Extra container mounts, HOST:CONTAINER
    python: str | None = None  # Python interpreter; null: the current one, or python3 in a container


@dataclass
class K8sConfig(LauncherConfig):
    """A Kubernetes JobSet, optionally queued by Kueue. Entries of `env` without a value are read from `secret`."""

    least: ClassVar[dict[str, int]] = {"hosts": 1, "slices": 1, "grace": 1, "gpus_per_host": 0, "tpus_per_host": 0}

    kind: str = "k8s"
    namespace: str = "default"  # Kubernetes namespace
    # Container image with Python and Meshwright's dependencies; the code of this checkout is copied into it
    image: str = ""
    queue: str | None = None  # Kueue LocalQueue; null: no queue
    priority: str | None = None  # Kueue WorkloadPriorityClass; null: none
    hosts: int = 1  # Number of pods; with TPUs, pods per slice
    slices: int = 1  # Number of TPU slices
    gpus_per_host: int = 0  # GPUs per pod
    tpu_accelerator: str | None = None  # GKE TPU type: tpu-v5p-slice, tpu-v6e-slice; null: no TPUs
    tpu_topology: str | None = None  # Topology of a TPU slice: 2x2x4
    tpus_per_host: int = 0  # TPU chips per pod
    cpu: str | None = None  # CPU request per pod in Kubernetes units: 8, 500m; null: no request
    memory: str | None = None  # Memory request per pod: 64Gi; null: no request
    # PersistentVolumeClaim for run folders; null: they are lost with the pod unless output_dir= is a bucket
    volume: str | None = None
    secret: str | None = None  # Kubernetes secret that holds the env variables given without a value
    service_account: str | None = None  # Service account of the pods; null: namespace default
    host_network: bool = False  # Use the host network; may be required for multiple slices or InfiniBand
    node_selector: dict[str, str] = field(default_factory=dict)  # Labels of the nodes to run on
    grace: int = 120  # Seconds from SIGTERM to SIGKILL; must be long enough to save a checkpoint

    def validate(self) -> None:
        super().validate()
        if not self.image:
            raise ValueError(
                "launcher.image='': k8s needs a container image; build launch/launchers/Dockerfile and push it"
            )
        tpu = (self.tpu_accelerator, self.tpu_topology, self.tpus_per_host or None)
        if any(tpu) and not all(tpu):
            raise ValueError(
                f"launcher.tpu_accelerator={self.tpu_accelerator}: TPUs need launcher.tpu_accelerator, "
                "launcher.tpu_topology and launcher.tpus_per_host together"
            )
        if any(tpu) and self.gpus_per_host:
            raise ValueError(
                f"launcher.gpus_per_host={self.gpus_per_host}: a pod has TPUs or GPUs, not both; set it to 0 or "
                "remove the TPU keys"
            )
        if self.slices > 1 and not any(tpu):
            raise ValueError(f"launcher.slices={self.slices}: applies only to TPUs; otherwise set launcher.hosts")
        for entry in self.env:
            if "=" not in entry and self.secret is None:
                raise ValueError(
                    f"launcher.env=[{entry}]: a variable without a value is read from a Kubernetes secret; give "
                    f"launcher.secret=NAME, created with: kubectl create secret generic NAME --from-literal={entry}=..."
                )


@dataclass
class RayConfig(LauncherConfig):
    """One actor per host of a Ray cluster. Run folders must be on a file system shared by all hosts."""

    least: ClassVar[dict[str, int]] = {"hosts": 1}

    kind: str = "ray"
    address: str = "auto"  # Ray cluster address: auto or HOST:PORT; local: start one on this machine
    hosts: int = 1  # Number of actors, one process each
    cpus_per_host: float = 1.0  # CPUs per actor
    gpus_per_host: float = 0.0  # GPUs per actor
    resources: dict[str, float] = field(default_factory=dict)  # Custom resources per actor: {TPU: 4}
    spread: bool = True  # Place each actor on a different host
    port: int = 0  # TCP port of the coordinator; 0: any free port
    elastic: bool = False  # Halve the number of hosts after two consecutive restarts without progress


@dataclass
class TpuVmConfig(LauncherConfig):
    """A Cloud TPU slice, requested as a queued resource; workers are started over ssh with gcloud."""

    kind: str = "tpu_vm"
    name: str | None = None  # TPU name; an existing TPU is reused; null: the run name
    accelerator: str = ""  # TPU type and size: v5p-32, v6e-64
    runtime: str = ""  # TPU software version: v2-alpha-tpuv5, v2-alpha-tpuv6e
    zone: str = ""  # Google Cloud zone
    project: str | None = None  # Google Cloud project; null: gcloud default
    spot: bool = False  # Use spot capacity: cheaper, but may be preempted at any time
    reserved: bool = False  # Use reserved capacity
    # Setup command, run in the code folder of each worker
    setup: str = "python3 -m pip install -q --user -e '.[tpu]'"
    python: str = "python3"  # Python interpreter on the workers

    def validate(self) -> None:
        super().validate()
        for key in ("accelerator", "runtime", "zone"):
            if not getattr(self, key):
                raise ValueError(f"launcher.{key}='': required by tpu_vm, for example {TPU_VM_EXAMPLE}")
        if self.spot and self.reserved:
            raise ValueError(
                "launcher.spot=true: cannot be combined with launcher.reserved=true, as reserved TPUs are not "
                "preempted; set one of them"
            )


TPU_VM_EXAMPLE = "launcher.accelerator=v6e-16 launcher.runtime=v2-alpha-tpuv6e launcher.zone=us-east5-b"


@dataclass
class SkypilotConfig(LauncherConfig):
    """A SkyPilot task on any cloud, with one cluster per run."""

    least: ClassVar[dict[str, int]] = {"num_nodes": 1, "autostop": 0}

    kind: str = "skypilot"
    cluster: str | None = None  # Cluster name; null: the run name
    infra: str | None = None  # Cloud and region: aws/us-east-1, gcp, k8s; null: the cheapest
    accelerators: str | None = None  # Accelerators per node: H100:8, tpu-v6e-8; null: CPUs only
    num_nodes: int = 1  # Number of nodes
    cpus: str | None = None  # CPUs per node: 8, 8+ for at least 8; null: SkyPilot default
    memory: str | None = None  # Memory per node in GB: 64, 64+ for at least 64; null: SkyPilot default
    spot: bool = False  # Use spot instances: cheaper, but may be preempted at any time
    image: str | None = None  # Image: docker:NAME, or a cloud image ID; null: SkyPilot default
    # Bucket for run folders (s3://... or gs://...), which then outlive the cluster; null: none
    bucket: str | None = None
    # Setup command, run in the code folder of each node; null: install Meshwright for the accelerators
    setup: str | None = None
    python: str = "python3"  # Python interpreter on the nodes
    autostop: int = 10  # Idle minutes before the cluster is deleted


LAUNCHERS: dict[str, type[LauncherConfig]] = {
    "local": LocalConfig,
    "slurm": SlurmConfig,
    "k8s": K8sConfig,
    "ray": RayConfig,
    "tpu_vm": TpuVmConfig,
    "skypilot": SkypilotConfig,
}
