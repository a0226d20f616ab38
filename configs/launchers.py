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
    dry_run: bool = False  # print what would be run; run nothing and write nothing
    follow: bool = True  # stay with the job and show its log; Ctrl-C leaves a cluster's job running
    max_restarts: int = 3  # starts after the first, from the newest checkpoint
    # Environment variables for the processes: NAME hands on this shell's value and is written nowhere, so it is for
    # secrets; NAME=VALUE is written into scripts.
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
    max_restarts: int = 0
    num_processes: int = 1
    port: int = 0  # of the coordinator; 0: a free one
    elastic: bool = False  # go on with half as many processes where twice in a row nothing was gained


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
    nodes: int = 1
    processes_per_node: int = 1  # of GPUs each takes its share
    gpus_per_node: int = 0
    cpus_per_process: int = 0  # 0: the cluster's default
    time: str | None = None  # limit as SLURM writes it: 4:00:00; null: the partition's
    grace: int = 120  # seconds before the limit at which a checkpoint is written and the job is requeued
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    options: list[str] = field(default_factory=list)  # further ones of sbatch: [--exclusive, --mem=0]
    array_limit: int = 0  # jobs of a sweep that run at once; 0: as many as there is room for
    image: str | None = None  # a container image: of Pyxis (docker://..., FILE.sqsh) or of Apptainer (FILE.sif)
    runtime: Runtime = Runtime.pyxis  # what runs the image
    mounts: list[str] = field(default_factory=list)  # further folders that the image sees, HOST:CONTAINER
    python: str | None = None  # the interpreter; null: this one, in an image python3


@dataclass
class K8sConfig(LauncherConfig):
    """A JobSet, queued by Kueue. Of `env`, names alone are keys of the Kubernetes secret `secret`."""

    least: ClassVar[dict[str, int]] = {"hosts": 1, "slices": 1, "grace": 1, "gpus_per_host": 0, "tpus_per_host": 0}

    kind: str = "k8s"
    namespace: str = "default"
    image: str = ""  # with Python and what Meshwright needs; the code of this checkout is laid into it
    queue: str | None = None  # Kueue's LocalQueue; null: no queue
    priority: str | None = None  # Kueue's WorkloadPriorityClass
    hosts: int = 1  # pods; of TPUs those of one slice
    slices: int = 1  # of TPUs
    gpus_per_host: int = 0
    tpu_accelerator: str | None = None  # GKE's name of the kind: tpu-v5p-slice, tpu-v6e-slice
    tpu_topology: str | None = None  # of a slice: 2x2x4
    tpus_per_host: int = 0  # chips
    cpu: str | None = None  # of a pod, as Kubernetes writes it: 8, 500m
    memory: str | None = None  # of a pod: 64Gi
    volume: str | None = None  # PersistentVolumeClaim for the run folders; null: output_dir= is a bucket, or is lost
    secret: str | None = None  # the Kubernetes secret that holds the names of env
    service_account: str | None = None
    host_network: bool = False  # pods on their host's network, which several slices and InfiniBand may ask for
    node_selector: dict[str, str] = field(default_factory=dict)
    grace: int = 120  # seconds from SIGTERM to SIGKILL: a checkpoint must fit in

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
    address: str = "auto"  # of the cluster: auto, HOST:PORT; local starts one on this machine
    hosts: int = 1
    cpus_per_host: float = 1.0
    gpus_per_host: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)  # further ones of each actor: {TPU: 4}
    spread: bool = True  # each actor on a host of its own
    port: int = 0  # of the coordinator; 0: a free one
    elastic: bool = False  # go on with half as many hosts where twice in a row nothing was gained


@dataclass
class TpuVmConfig(LauncherConfig):
    """A Cloud TPU slice as a queued resource, and every worker of it over ssh, through gcloud."""

    kind: str = "tpu_vm"
    name: str | None = None  # of the TPU; null: the run's. One that is there is used
    accelerator: str = ""  # v5p-32, v6e-64
    runtime: str = ""  # software version: v2-alpha-tpuv5, v2-alpha-tpuv6e
    zone: str = ""
    project: str | None = None  # null: gcloud's
    spot: bool = False  # cheaper, and taken away at any time
    reserved: bool = False
    setup: str = "python3 -m pip install -q --user -e '.[tpu]'"  # on each worker, in the folder of the code
    python: str = "python3"

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
    cluster: str | None = None  # its name; null: the run's
    infra: str | None = None  # aws/us-east-1, gcp, k8s; null: the cheapest
    accelerators: str | None = None  # H100:8, tpu-v6e-8; null: CPUs
    num_nodes: int = 1
    cpus: str | None = None
    memory: str | None = None  # GB, 64+ for at least 64
    spot: bool = False
    image: str | None = None  # docker:NAME, or a cloud's image
    bucket: str | None = None  # s3://... or gs://..., mounted as the folder of runs, so that they outlive the cluster
    setup: str | None = None  # on each node, in the folder of the code; null: installs it for the accelerators
    python: str = "python3"
    autostop: int = 10  # minutes without work after which the cluster is deleted


LAUNCHERS: dict[str, type[LauncherConfig]] = {
    config.kind: config for config in (LocalConfig, SlurmConfig, K8sConfig, RayConfig, TpuVmConfig, SkypilotConfig)
}
