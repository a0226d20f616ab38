"""Kubernetes launcher: runs a job as a JobSet, optionally queued by Kueue.

The code snapshot is stored in a ConfigMap and unpacked into the container, so one image works for many code versions.
Exit code 75 replaces the pod without counting as a restart; exit code 2 fails the JobSet; any other failure restarts
all pods, at most `launcher.max_restarts` times.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from configs.launchers import K8sConfig
from launch import exit_codes
from launch.distributed import FIRST_PORT
from launch.launchers.job import PACKED, Job, Recipe, check_output, public_name, run_command
from launch.launchers.launcher import ClusterLauncher

MANIFEST = "jobset.yaml"
CODE, WORK = "/meshwright/code", "/meshwright/work"  # paths in a pod; a relative output_dir= is below WORK
MAX_PACKED = 1_000_000  # bytes in a ConfigMap; the API server accepts 1 MiB
INDEX = "batch.kubernetes.io/job-completion-index"
HOSTS = "hosts"  # name of the JobSet's only replicated job


def name(job: Job[K8sConfig]) -> str:
    return public_name(job.run, job.number, 40)  # pod names append to it and are limited to 63 characters


def code_map(job: Job[K8sConfig]) -> str:
    return f"{name(job)}-code"


def kubectl(job: Job[K8sConfig]) -> list[str]:
    return ["kubectl", f"--namespace={job.launcher.namespace}"]


def jobset(job: Job[K8sConfig]) -> dict[str, Any]:
    launcher = job.launcher
    labels = {"app.kubernetes.io/name": "meshwright"}
    if launcher.queue:
        labels["kueue.x-k8s.io/queue-name"] = launcher.queue
    if launcher.priority:
        labels["kueue.x-k8s.io/priority-class"] = launcher.priority
    metadata: dict[str, Any] = {"name": name(job), "namespace": launcher.namespace, "labels": labels}
    if launcher.tpu_accelerator:  # a TPU slice is a node pool that runs one job
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": launcher.max_restarts,
                # The only pod failure policy rule that fails a job matches exit code 2: wrong user input.
                "rules": [{"name": "wrongInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": HOSTS, "replicas": launcher.slices, "template": {"spec": _job(job)}}],
        },
    }


def _job(job: Job[K8sConfig]) -> dict[str, Any]:
    launcher = job.launcher
    rules: list[dict[str, Any]] = [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [exit_codes.WRONG_INPUT]}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [exit_codes.PREEMPTED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},  # node drained or preempted
    ]
    return {
        "completionMode": "Indexed",
        "parallelism": launcher.hosts,
        "completions": launcher.hosts,
        "backoffLimit": 0,  # if a pod is lost, the JobSet restarts all pods
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": {"app.kubernetes.io/name": "meshwright"}}, "spec": _pod(job)},
    }


def _pod(job: Job[K8sConfig]) -> dict[str, Any]:
    launcher = job.launcher
    code, packed_code = {"name": "code", "mountPath": CODE}, {"name": "packed", "mountPath": "/meshwright/packed"}
    work, shared = {"name": "work", "mountPath": WORK}, {"name": "shared-memory", "mountPath": "/dev/shm"}
    claim = {"persistentVolumeClaim": {"claimName": launcher.volume}} if launcher.volume else {"emptyDir": {}}
    selector = dict(launcher.node_selector)
    if launcher.tpu_accelerator and launcher.tpu_topology:
        selector["cloud.google.com/gke-tpu-accelerator"] = launcher.tpu_accelerator
        selector["cloud.google.com/gke-tpu-topology"] = launcher.tpu_topology
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # required by podFailurePolicy
        "terminationGracePeriodSeconds": launcher.grace,
        "initContainers": [
            {
                "name": "code",
                "image": launcher.image,
                "command": ["tar", "-xzf", f"/meshwright/packed/{PACKED}", "-C", CODE],
                "volumeMounts": [dict(code), packed_code],  # a copy, because PyYAML writes shared objects as anchors
            }
        ],
        "containers": [
            {
                "name": "process",
                "image": launcher.image,
                "workingDir": WORK,
                # Escaped, because Kubernetes expands $(NAME).
                "command": [word.replace("$(", "$$(") for word in job.command("python3")],
                "env": environment(job),
                "resources": _resources(launcher),
                "volumeMounts": [code, work, shared],
            }
        ],
        "volumes": [
            {"name": "code", "emptyDir": {}},
            {"name": "packed", "configMap": {"name": code_map(job)}},
            {"name": "work", **claim},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},  # NCCL needs more than the default 64 MB
        ],
    }
    if selector:
        spec["nodeSelector"] = selector
    if launcher.service_account:
        spec["serviceAccountName"] = launcher.service_account
    if launcher.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if launcher.gpus_per_host:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return spec


def environment(job: Job[K8sConfig]) -> list[dict[str, Any]]:
    """Returns the environment of a pod. Variables without a value refer to the secret.

    JAX's coordinator variables are omitted for TPUs with several hosts or slices, where GKE provides the topology.
    """
    launcher = job.launcher
    variables: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in job.environment(CODE).items()]
    for entry in launcher.env:
        if "=" not in entry:
            reference = {"name": launcher.secret, "key": entry}
            variables.append({"name": entry, "valueFrom": {"secretKeyRef": reference}})
    if launcher.tpu_accelerator is None or (launcher.hosts == 1 and launcher.slices == 1):
        first = f"{name(job)}-{HOSTS}-0-0.{name(job)}:{FIRST_PORT}"
        index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
        variables += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
            {"name": "JAX_NUM_PROCESSES", "value": str(launcher.hosts)},
            {"name": "JAX_PROCESS_ID", "valueFrom": index},
        ]
    return variables


def _resources(launcher: K8sConfig) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if launcher.gpus_per_host:
        limits["nvidia.com/gpu"] = launcher.gpus_per_host
    if launcher.tpus_per_host:
        limits["google.com/tpu"] = launcher.tpus_per_host
    requests = {key: value for key, value in (("cpu", launcher.cpu), ("memory", launcher.memory)) if value}
    return {part: found for part, found in (("requests", {**requests, **limits}), ("limits", limits)) if found}


def state_text(jobset: dict[str, Any]) -> str:
    """Returns the state of a JobSet, given as kubectl's JSON, as short text."""
    status = jobset.get("status", {})
    true = {c["type"]: c for c in status.get("conditions", []) if c.get("status") == "True"}
    if "Completed" in true:
        return "completed"
    if "Failed" in true:
        return f"failed ({true['Failed'].get('message', '')})"
    restarts = f", restart {status['restarts']}" if status.get("restarts") else ""
    if "Suspended" in true:
        return f"queued{restarts}"
    pods = sum(part.get("ready", 0) for part in status.get("replicatedJobsStatus", []))
    return f"running{restarts}" if pods else f"starting{restarts}"


class K8sLauncher(ClusterLauncher[K8sConfig]):
    """Creates a JobSet per job and a ConfigMap with its code."""

    shares_disk = local_secrets = False  # secrets are stored in the cluster
    over = ("completed", "failed", "gone")
    pause = 5.0

    def recipe(self, jobs: Sequence[Job[K8sConfig]]) -> Recipe:
        folder, commands = jobs[0].folder, []
        for job in jobs:
            source = f"--from-file={PACKED}={job.folder / PACKED}"
            commands.append([*kubectl(job), "create", "configmap", code_map(job), source])
        commands.append([*kubectl(jobs[0]), "apply", "-f", str(folder / MANIFEST)])
        return Recipe({MANIFEST: yaml.safe_dump_all(map(jobset, jobs), sort_keys=False, width=120)}, commands)

    def start(self, jobs: Sequence[Job[K8sConfig]], recipe: Recipe) -> Iterator[tuple[Job[K8sConfig], str]]:
        """Raises ValueError if the code is too large for a ConfigMap or kubectl fails."""
        for job in jobs:
            size = job.pack()
            if size > MAX_PACKED:
                raise ValueError(
                    f"launcher=k8s: the packed code has {size:,} bytes, but a ConfigMap holds {MAX_PACKED:,}; exclude "
                    "large files with .gitignore"
                )
        for command in recipe.commands:
            check_output(command)
        for job in jobs:
            yield job.update_handle(name=name(job)), f"is the {self.label(job)}"

    def follow(self, jobs: Sequence[Job[K8sConfig]]) -> int:
        """Follows the JobSets one after another, with the log of each."""
        return max(super(K8sLauncher, self).follow([job]) for job in jobs)

    def log_view(self, jobs: Sequence[Job[K8sConfig]]) -> Callable[[str], None]:
        """Reopens the log after each restart, because kubectl exits when the pod ends."""
        return lambda state: self.logs(jobs[0], follow=True) if state.startswith("running") else None

    def label(self, job: Job[K8sConfig]) -> str:
        return f"JobSet {name(job)}"

    def state(self, job: Job[K8sConfig]) -> str:
        found = run_command([*kubectl(job), "get", "jobset", name(job), "--output=json"])
        if found.returncode:
            return "gone" if "NotFound" in found.stderr else f"unknown: {found.stderr.strip()}"
        return state_text(json.loads(found.stdout))

    def logs(self, job: Job[K8sConfig], *, follow: bool) -> int:
        """Prints the log of the first pod of the first slice."""
        labels = {"jobset-name": name(job), "replicatedjob-name": HOSTS, "job-index": "0"}
        selector = ",".join([*(f"jobset.sigs.k8s.io/{key}={value}" for key, value in labels.items()), f"{INDEX}=0"])
        flags = [f"--selector={selector}", "--container=process", "--tail=-1", *(["--follow"] if follow else [])]
        return run_command([*kubectl(job), "logs", *flags], shown=True).returncode

    def stop(self, job: Job[K8sConfig]) -> str:
        """Deletes the JobSet. Its processes receive SIGTERM and have `launcher.grace` seconds to save."""
        check_output([*kubectl(job), "delete", "jobset", name(job), "--wait=false"])
        check_output([*kubectl(job), "delete", "configmap", code_map(job), "--ignore-not-found"])
        return f"deleted the {self.label(job)}; its processes save a checkpoint and exit"
