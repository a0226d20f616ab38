"""A real Ray on this machine: an actor is killed, all begin again, and the run ends as an unbroken one."""

import os
import signal

import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright, start, wait_for
from tests.launch.processes import environment_of, holding, parent
from tests.launch.programs import files_with

pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")

RUN = ["train", "run=a", *TINY, "source=[synthetic]", "data.packing=best_fit", "fake_devices=2", "mesh.fsdp=2"]
RUN += ["task.num_steps=60", "checkpoint.save_interval_steps=5"]
SECRET = "sentinel-6f6f6f"


def test_a_killed_actor_brings_all_back_and_the_run_ends_the_same(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir(), broken.mkdir()
    meshwright(unbroken, *RUN, "launcher.num_processes=2")
    ray = ["launcher=ray", "launcher.address=local", "launcher.hosts=2", "launcher.env=[CLUSTER_TOKEN]"]
    process = start(broken, *RUN, *ray, CLUSTER_TOKEN=SECRET)
    assert wait_for((broken / "runs" / "a" / "checkpoints" / "5" / "digests.json").exists, process)
    [trains] = holding(broken / "runs" / "a" / "jobs" / "1" / "process_1.log")
    assert environment_of(trains)["CLUSTER_TOKEN"] == SECRET
    os.kill(parent(trains), signal.SIGKILL)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    assert "the actor of process 1 was lost; restart 1 of 3 with 2 processes, from step" in err
    assert "resumes at step" in out
    assert losses(broken, "a") == losses(unbroken, "a")
    mine, theirs = inspect(broken, "a"), inspect(unbroken, "a")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256", "step"):
        assert mine[key] == theirs[key], key
    assert files_with(broken, SECRET) == [] and SECRET not in out + err
    assert "ended with 0; step 60" in meshwright(broken, "status", "run=a")[0]
    assert "resumes at step" in meshwright(broken, "logs", "run=a")[0]
