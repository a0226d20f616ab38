"""Kubernetes launcher: recorded JobSets, validation against published schemas, and exit code policies."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.launchers import k8s
from launch.launchers.job import MARK, PACKED, Job
from launch.launchers.launcher_registry import LAUNCHERS, launch
from tests.end_to_end.run import ROOT
from tests.launch.jobs import composed, job, same_as_recorded
from tests.launch.programs import files_with, program

K8S = LAUNCHERS["k8s"]
GPU = ["launcher=k8s", "launcher.image=registry/me/meshwright:cuda", "launcher.hosts=4", "launcher.gpus_per_host=8"]
GPU += ["launcher.queue=research", "launcher.volume=runs", "launcher.memory=512Gi"]
GPU += ["launcher.secret=keys", "launcher.env=[WANDB_API_KEY,NCCL_DEBUG=INFO]"]
TPU = ["launcher=k8s", "launcher.image=registry/me/meshwright:tpu", "launcher.hosts=4", "launcher.slices=2"]
TPU += ["launcher.tpu_accelerator=tpu-v5p-slice", "launcher.tpu_topology=2x2x4", "launcher.tpus_per_host=4"]
TPU += [
    "launcher.host_network=true",
    "launcher.service_account=trainer",
    "launcher.priority=low",
    "launcher.queue=tpus",
]
ONE = ["launcher=k8s", "launcher.image=registry/me/meshwright:cpu"]
WAYS = {"gpu": GPU, "tpu": TPU, "one": ONE}


@pytest.mark.parametrize("way", WAYS)
def test_the_manifest_and_its_commands_are_as_recorded(way):
    one = job(*WAYS[way])
    same_as_recorded(f"k8s_{way}.txt", K8S.recipe([one]).render(one.folder) + "\n")


def published(kind: str):
    """Returns the published schema of a kind from the folder of CustomResourceDefinitions in MESHWRIGHT_CRDS.

    The files are in config/components/crd/bases of kubernetes-sigs/jobset and kubernetes-sigs/kueue.
    """
    folder = os.environ.get("MESHWRIGHT_CRDS")
    if folder is None:
        pytest.skip("needs the published CustomResourceDefinitions: MESHWRIGHT_CRDS=FOLDER")
    for path in Path(folder).glob("*.yaml"):
        definition = yaml.safe_load(path.read_text())
        if definition.get("spec", {}).get("names", {}).get("kind") == kind:
            return {
                f"{definition['spec']['group']}/{version['name']}": closed(version["schema"]["openAPIV3Schema"])
                for version in definition["spec"]["versions"]
            }
    raise AssertionError(f"{folder} has no {kind}")


def closed(schema):
    """Returns a schema that rejects unknown fields, like `kubectl apply --validate=strict`."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        found.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
        found.pop("anyOf", None)
    return found


def faults(document) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    schema = published(document["kind"])[document["apiVersion"]]
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in found]


@pytest.mark.parametrize("way", WAYS)
def test_jobsets_are_valid_by_their_published_schema(way):
    first = job(*WAYS[way])
    second = replace(first, run="b", folder=Path("/home/me/runs/b/jobs/4"))
    documents = list(yaml.safe_load_all(K8S.recipe([first, second]).files[k8s.MANIFEST]))
    assert [document["metadata"]["name"] for document in documents] == ["a-1", "b-4"]
    assert [faults(document) for document in documents] == [[], []]


def test_the_schema_finds_faults():
    document = k8s.jobset(job(*GPU))
    document["spec"]["failurePolicy"]["maxRestart"] = 3
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = 7
    assert len(faults(document)) == 2


def test_the_queues_of_the_page_are_valid_by_kueues_published_schemas():
    page = (ROOT / "docs" / "launching.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    documents = [document for block in blocks for document in yaml.safe_load_all(block)]
    assert {document["kind"] for document in documents} == {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
    assert [faults(document) for document in documents] == [[]] * len(documents)


def test_exit_codes_mean_on_kubernetes_what_they_mean_here():
    document = k8s.jobset(job(*GPU))
    spec = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    codes = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert codes == {2: "FailJob", 75: "Ignore"}
    [rule] = document["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"


def test_pods_find_each_other_and_the_secret_by_reference():
    found = {variable["name"]: variable for variable in k8s.environment(job(*GPU))}
    assert found["JAX_COORDINATOR_ADDRESS"]["value"].startswith("a-1-hosts-0-0.a-1:")
    assert found["JAX_NUM_PROCESSES"]["value"] == "4" and found[MARK]["value"] == "1"
    assert found["WANDB_API_KEY"] == {
        "name": "WANDB_API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "keys", "key": "WANDB_API_KEY"}},
    }
    assert "JAX_NUM_PROCESSES" not in {variable["name"] for variable in k8s.environment(job(*TPU))}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launcher=k8s"], "launcher.image=''"),
        ([*ONE, "launcher.env=[HF_TOKEN]"], "give launcher.secret=NAME"),
        ([*ONE, "launcher.tpus_per_host=4"], "TPUs need launcher.tpu_accelerator"),
        ([*TPU, "launcher.gpus_per_host=1"], "TPUs or GPUs, not both"),
        ([*ONE, "launcher.slices=2"], "launcher.slices=2: applies only to TPUs"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, said):
    with pytest.raises(ValueError) as error:
        composed(*overrides)
    assert said in str(error.value)


def conditions(*true, **more):
    return {"status": {"conditions": [{"type": kind, "status": "True", "message": "why"} for kind in true], **more}}


def test_states_are_told_in_a_few_words():
    assert k8s.state_text({}) == "starting"
    assert k8s.state_text(conditions("Suspended")) == "queued"
    assert k8s.state_text(conditions(replicatedJobsStatus=[{"ready": 1}], restarts=2)) == "running, restart 2"
    assert k8s.state_text(conditions("Completed")) == "completed"
    assert k8s.state_text(conditions("Failed")) == "failed (why)"


def test_a_jobset_is_submitted_looked_at_and_deleted(tmp_path, monkeypatch, capfd):
    calls = program(tmp_path, "kubectl", {"get jobset": "echo '{\"status\": {}}'"})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_API_KEY", "sentinel-31337")
    monkeypatch.chdir(tmp_path)
    overrides = ["run=a", *GPU, "launcher.follow=false"]
    assert launch([(composed(*overrides), overrides)]) == 0
    one = Job.load(tmp_path / "runs" / "a" / "jobs" / "1")
    assert K8S.status(one) == "JobSet a-1: starting"
    assert K8S.logs(one, follow=True) == 0
    assert "deleted the JobSet a-1" in K8S.stop(one)
    verbs = [" ".join(line.split()[1:4]) for line in calls.read_text().splitlines()]
    assert verbs[:2] == ["create configmap a-1-code", f"apply -f {one.folder}/jobset.yaml"]
    assert verbs[-2:] == ["delete jobset a-1", "delete configmap a-1-code"]
    assert (one.folder / PACKED).stat().st_size < k8s.MAX_PACKED
    assert files_with(tmp_path, "sentinel-31337") == [] and "sentinel" not in capfd.readouterr().out
