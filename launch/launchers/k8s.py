"""A run on Kubernetes: a JobSet, which Kueue may queue.

The frozen code travels in a ConfigMap and is unpacked beside the image's Python, so that an image serves many
versions. A pod that leaves with 75 is replaced and does not count; one that leaves with 2 fails the JobSet; one that is
lost makes all begin again, at most `launcher.max_restarts` times.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from configs.launchers import K8sConfig
from launch import exit_codes
from launch.distributed import FIRST_PORT
from launch.launchers.base import ClusterLauncher
from launch.launchers.job import PACKED, Job, Recipe, check_output, public_name, run_command

MANIFEST = "jobset.yaml"
CODE, WORK = "/meshwright/code", "/meshwright/work"  # in a pod; output_dir= lies below WORK
MAX_PACKED = 1_000_000  # bytes of a ConfigMap; the API server takes 1 MiB
INDEX = "batch.kubernetes.io/job-completion-index"
HOSTS = "hosts"  # the one kind of pods that a JobSet of ours has


def name(job: Job[K8sConfig]) -> str:
    return public_name(job.run, job.number, 40)  # the names of pods are longer, and end at 63


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
    if launcher.tpu_accelerator:  # a slice is a pool of nodes, and has one job
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": launcher.max_restarts,
                # A rule of the pods failed the job, and the only such rule is about what is the user's to correct.
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
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},  # its node is taken away
    ]
    return {
        "completionMode": "Indexed",
        "parallelism": launcher.hosts,
        "completions": launcher.hosts,
        "backoffLimit": 0,  # one that is lost: the JobSet begins again with all
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
        "restartPolicy": "Never",  # what a pod failure policy asks for
        "terminationGracePeriodSeconds": launcher.grace,
        "initContainers": [
            {
                "name": "code",
                "image": launcher.image,
                "command": ["tar", "-xzf", f"/meshwright/packed/{PACKED}", "-C", CODE],
                "volumeMounts": [dict(code), packed_code],  # YAML would make the same one an anchor
            }
        ],
        "containers": [
            {
                "name": "process",
                "image": launcher.image,
                "workingDir": WORK,
                "command": [
                    word.replace("$(", "$$(") for word in job.command("python3")
                ],  # Kubernetes fills in $(NAME)
                "env": environment(job),
                "resources": _resources(launcher),
                "volumeMounts": [code, work, shared],
            }
        ],
        "volumes": [
            {"name": "code", "emptyDir": {}},
            {"name": "packed", "configMap": {"name": code_map(job)}},
            {"name": "work", **claim},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},  # NCCL needs more than the usual 64 MB
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
    """Of a pod. Names alone are keys of the Kubernetes secret; GKE tells the workers of TPU slices of each other."""
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
    asked = {key: value for key, value in (("cpu", launcher.cpu), ("memory", launcher.memory)) if value}
    return {part: found for part, found in (("requests", {**asked, **limits}), ("limits", limits)) if found}


def described(shown: dict[str, Any]) -> str:
    """A JobSet, as kubectl shows it, in a few words."""
    status = shown.get("status", {})
    true = {c["type"]: c for c in status.get("conditions", []) if c.get("status") == "True"}
    if "Completed" in true:
        return "completed"
    if "Failed" in true:
        return f"failed ({true['Failed'].get('message', '')})"
    restarts = f", restart {status['restarts']}" if status.get("restarts") else ""
    if "Suspended" in true:
        return f"waits in its queue{restarts}"
    pods = sum(part.get("ready", 0) for part in status.get("replicatedJobsStatus", []))
    return f"running{restarts}" if pods else f"starting{restarts}"


class K8sLauncher(ClusterLauncher[K8sConfig]):
    """A JobSet for each job, and a ConfigMap with its code."""

    shares_disk = local_secrets = False  # secrets are in the cluster
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
        """Raises: ValueError where the code is too large for a ConfigMap, or kubectl refuses."""
        for job in jobs:
            size = job.pack()
            if size > MAX_PACKED:
                raise ValueError(
                    f"launcher=k8s: the code is {size:,} bytes packed, and a ConfigMap holds {MAX_PACKED:,}; what git "
                    "ignores is left out"
                )
        for command in recipe.commands:
            check_output(command)
        for job in jobs:
            yield job.noted(name=name(job)), f"is the {self.label(job)}"

    def follow(self, jobs: Sequence[Job[K8sConfig]]) -> int:
        """One JobSet after the other, with the log of each."""
        return max(super(K8sLauncher, self).follow([job]) for job in jobs)

    def log_view(self, jobs: Sequence[Job[K8sConfig]]) -> Callable[[str], None]:
        """The log again after each restart: kubectl ends with the pod."""
        return lambda state: self.logs(jobs[0], follow=True) if state.startswith("running") else None

    def label(self, job: Job[K8sConfig]) -> str:
        return f"JobSet {name(job)}"

    def state(self, job: Job[K8sConfig]) -> str:
        found = run_command([*kubectl(job), "get", "jobset", name(job), "--output=json"])
        if found.returncode:
            return "gone" if "NotFound" in found.stderr else f"unknown: {found.stderr.strip()}"
        return described(json.loads(found.stdout))

    def logs(self, job: Job[K8sConfig], *, follow: bool) -> int:
        """Of the first pod of the first slice."""
        labels = {"jobset-name": name(job), "replicatedjob-name": HOSTS, "job-index": "0"}
        selector = ",".join([*(f"jobset.sigs.k8s.io/{key}={value}" for key, value in labels.items()), f"{INDEX}=0"])
        flags = [f"--selector={selector}", "--container=process", "--tail=-1", *(["--follow"] if follow else [])]
        return run_command([*kubectl(job), "logs", *flags], shown=True).returncode

    def stop(self, job: Job[K8sConfig]) -> str:
        """Its processes get SIGTERM, and `launcher.grace` seconds to save."""
        check_output([*kubectl(job), "delete", "jobset", name(job), "--wait=false"])
        check_output([*kubectl(job), "delete", "configmap", code_map(job), "--ignore-not-found"])
        return f"deleted the {self.label(job)}; its processes save and end"
