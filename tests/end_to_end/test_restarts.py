"""A job on this machine that loses a process goes on by itself and ends as one that lost none."""

import os
import signal
import subprocess

from launch.launchers.local import free_port
from tests.end_to_end.run import TINY, inspect, losses, meshwright, metrics, start, wait_for
from tests.launch.processes import children

RUN = ["train", "run=a", *TINY, "source=[synthetic]", "data.packing=best_fit", "fake_devices=2", "mesh.fsdp=2"]
RUN += ["task.num_steps=60", "checkpoint.save_interval_steps=10", "launcher.num_processes=2"]


def test_a_killed_process_brings_all_back_and_the_run_ends_the_same(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir(), broken.mkdir()
    meshwright(unbroken, *RUN)
    secret = "sentinel-9e3f5a"
    lines = ["launcher.max_restarts=2", "launcher.env=[CLUSTER_TOKEN,PLAIN=seen]"]
    process = start(broken, *RUN, *lines, CLUSTER_TOKEN=secret)
    assert wait_for(lambda: (broken / "runs" / "a" / "checkpoints" / "10" / "digests.json").exists(), process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    assert "job 1 (local): running" in meshwright(broken, "status", "run=a")[0]
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "process 1 was killed by SIGKILL" in err and "restart 1 of 2 with 2 processes, from step" in err
    assert losses(broken, "a") == losses(unbroken, "a")
    assert [row["run/start"] for row in metrics(broken, "a") if "run/start" in row] == [2]
    mine, theirs = inspect(broken, "a"), inspect(unbroken, "a")
    for key in ("params_sha256", "optimizer_sha256", "next_batch_sha256", "step"):
        assert mine[key] == theirs[key], key
    assert "ended with 0; step 60" in meshwright(broken, "status", "run=a")[0]
    found = subprocess.run(["grep", "-rl", secret, str(broken)], capture_output=True, text=True).stdout
    assert secret not in out + err and found == ""


def test_who_is_left_alone_says_by_whom_and_leaves_to_be_started_again(tmp_path):
    alone = [argument for argument in RUN if not argument.startswith("launcher.")]
    both = [
        start(tmp_path, *alone, "task.num_steps=100000", JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", **index)
        for port in [free_port()]
        for index in ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": number} for number in "01")
    ]
    assert wait_for(lambda: (tmp_path / "runs" / "a" / "checkpoints" / "10" / "digests.json").exists(), both[0])
    both[0].kill()  # which held the coordinator: JAX's own client would abort the other
    _, err = both[1].communicate(timeout=100)
    both[0].communicate()
    assert both[1].returncode == 75, err
    assert "process 1 of 2" in err and "process 0 " in err and "is lost" in err


def test_a_job_in_the_background_is_followed_and_stopped_with_a_checkpoint(tmp_path):
    (out, _) = meshwright(tmp_path, *RUN, "task.num_steps=100000", "launcher.follow=false")
    assert "job 1 runs in the background" in out
    log = tmp_path / "runs" / "a" / "jobs" / "1" / "log"
    assert wait_for(lambda: (tmp_path / "runs" / "a" / "checkpoints" / "10").exists())
    out, _ = meshwright(tmp_path, "stop", "run=a")
    assert "to save a checkpoint and exit" in out
    out, _ = meshwright(tmp_path, "logs", "run=a", "follow=true")  # until it has ended
    assert out == log.read_text()
    assert "ended with 75" in meshwright(tmp_path, "status", "run=a")[0]
    steps = sorted(int(p.name) for p in (tmp_path / "runs" / "a" / "checkpoints").iterdir() if p.name.isdigit())
    assert max(losses(tmp_path, "a")) == steps[-1]
