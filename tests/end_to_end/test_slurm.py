"""A real SLURM of three nodes on this machine: a run of two loses one, is queued again, and ends as an unbroken one."""

import os
import signal
import subprocess

import pytest

from launch.launchers.local import free_port
from tests.end_to_end.run import TINY, inspect, losses, meshwright, start, wait_for
from tests.end_to_end.slurm_cluster import Cluster, why_not
from tests.launch.processes import called_in, environment_of

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "SLURM is there")

RUN = [*TINY, "source=[synthetic]", "data.packing=best_fit", "fake_devices=2", "mesh.fsdp=2", "task.num_steps=60"]
RUN += ["checkpoint.save_interval_steps=5"]
SECRET = "sentinel-77aa31"


@pytest.fixture(scope="module")
def cluster():
    with Cluster(["n1", "n2", "n3"]) as found:
        yield found


def on_two_nodes(*options: str) -> list[str]:
    # The nodes have no names that resolve: all are this machine.
    env = f"launcher.env=[CLUSTER_TOKEN,JAX_COORDINATOR_ADDRESS=127.0.0.1:{free_port()}]"
    return ["launcher=slurm", "launcher.nodes=2", env, *options]


def test_a_run_that_loses_a_node_is_requeued_and_ends_the_same(cluster, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir(), broken.mkdir()
    meshwright(unbroken, "train", "run=a", *RUN, "launcher.num_processes=2")
    process = start(broken, "train", "run=a", *RUN, *on_two_nodes(), **cluster.environment, CLUSTER_TOKEN=SECRET)
    checkpoint = broken / "runs" / "a" / "checkpoints" / "5" / "digests.json"
    assert wait_for(checkpoint.exists, process)
    processes = [environment_of(pid) for pid in called_in(broken, "launch.cli")]
    tokens = {env["SLURM_PROCID"]: env.get("CLUSTER_TOKEN") for env in processes if "SLURM_PROCID" in env}
    assert tokens == {"0": SECRET, "1": SECRET}
    cluster.lose("n2")
    out, err = process.communicate(timeout=600)
    log = (broken / "runs" / "a" / "jobs" / "1" / "log").read_text()
    assert process.returncode == 0, log + err
    assert "RUNNING on n[1-2]" in err and "RUNNING on n[1,3], restart 1" in err
    assert "resumes at step" in log and "resumes at step" in out
    assert losses(broken, "a") == losses(unbroken, "a")
    mine, theirs = inspect(broken, "a"), inspect(unbroken, "a")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256", "step"):
        assert mine[key] == theirs[key], key
    status, _ = meshwright(broken, "status", "run=a", **cluster.environment)
    assert "ended with 0; step 60" in status
    found = subprocess.run(["grep", "-rl", SECRET, str(broken)], capture_output=True, text=True).stdout
    assert SECRET not in out + err and found == ""
    cluster.start_node("n2")
    cluster.wait_for_nodes()


def test_a_preempted_job_is_queued_again_and_a_stopped_one_is_not(cluster, tmp_path):
    endless = [*RUN, "task.num_steps=1000000", *on_one_node()]
    out, _ = meshwright(tmp_path, "train", "run=a", *endless, **cluster.environment)
    folder, number = tmp_path / "runs" / "a", out.split("SLURM job ")[1].split(",")[0]
    assert wait_for((folder / "checkpoints" / "5").exists)
    # As a time limit does, launcher.grace seconds before it.
    subprocess.run(["scancel", "--signal=TERM", number], env=os.environ | cluster.environment, check=True)
    log = folder / "jobs" / "1" / "log"
    assert wait_for(lambda: "ended with 75; restart 1 of 3" in log.read_text())
    assert wait_for(lambda: "resumes at step" in log.read_text())
    assert wait_for(lambda: log.read_text().count("start-up") == 2)
    out, _ = meshwright(tmp_path, "stop", "run=a", **cluster.environment)
    assert "to save a checkpoint and exit" in out
    assert wait_for((folder / "jobs" / "1" / "exit_code").exists)
    assert "ended with 75" in meshwright(tmp_path, "status", "run=a", **cluster.environment)[0]
    saved = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert max(losses(tmp_path, "a")) == saved[-1]


def test_a_job_that_is_left_goes_on_and_a_cancelled_one_does_not_come_back(cluster, tmp_path):
    endless = [*RUN, "task.num_steps=1000000", *on_one_node(), "launcher.follow=true"]
    process = start(tmp_path, "train", "run=a", *endless, **cluster.environment)
    folder = tmp_path / "runs" / "a"
    assert wait_for((folder / "checkpoints" / "5").exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "detached; the job is still running" in err and "meshwright stop run=a" in err
    assert "RUNNING on" in meshwright(tmp_path, "status", "run=a", **cluster.environment)[0]
    number = out.split("SLURM job ")[1].split(",")[0]
    subprocess.run(["scancel", number], env=os.environ | cluster.environment, check=True)
    assert wait_for((folder / "jobs" / "1" / "exit_code").exists)
    queue = ["squeue", "--noheader", "--job", number]
    left = lambda: subprocess.run(queue, env=os.environ | cluster.environment, capture_output=True, text=True).stdout
    assert wait_for(lambda: not left()), left()
    assert "restart" not in (folder / "jobs" / "1" / "log").read_text()


def test_a_sweep_runs_as_one_array(cluster, tmp_path):
    sweep = ["-m", "optimizer.learning_rate=1e-3,2e-3", "run=lr_${optimizer.learning_rate}", "launcher.follow=true"]
    out, _ = meshwright(tmp_path, "train", *RUN, "task.num_steps=2", *on_one_node(), *sweep, **cluster.environment)
    assert "_0, log:" in out and "_1, log:" in out
    first = losses(tmp_path, "lr_0.001")
    assert sorted(first) == [1, 2] and first[1] == losses(tmp_path, "lr_0.002")[1]


def on_one_node() -> list[str]:
    return ["fake_devices=2", "launcher=slurm", "launcher.follow=false"]
