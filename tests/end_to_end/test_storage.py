"""Runs of an object store, from the command line: data, checkpoints and run folders of a bucket, nothing kept here."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.end_to_end.run import TINY, inspect, losses, meshwright, start

pytest.importorskip("fsspec", reason="pip install -e '.[test]'")

import fsspec

from tests.stores import s3_server
from trainer.checkpoint.checksums import DIGESTS

DATA = ["source=[jsonl]", "data.sources.jsonl.paths=[s3://bucket/texts]", "data.packing=best_fit"]
RUN = [*TINY, *DATA, "checkpoint.save_interval_steps=2", "task.eval_every=0", "data.max_eval_batches=1"]
RUNS = "output_dir=s3://bucket/runs"


@pytest.fixture(scope="module")
def s3():
    with s3_server():
        store = fsspec.filesystem("s3", use_listings_cache=False)
        for part in range(2):
            lines = [json.dumps({"text": f"text {i} of part {part}: " + "a few words " * (i % 9)}) for i in range(60)]
            store.pipe_file(f"bucket/texts/{part}.jsonl", "\n".join(lines).encode())
        yield store


@pytest.fixture(scope="module")
def unbroken(s3, tmp_path_factory):
    """Six steps on a disk that nobody disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    meshwright(folder, "train", "run=a", *RUN, "task.num_steps=6")
    return inspect(folder, "a"), losses(folder, "a")


def folder(tmp_path: Path, name: str) -> Path:
    """An empty disk."""
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_a_run_goes_on_from_the_bucket_alone_as_if_nothing_had_happened(s3, unbroken, tmp_path):
    one, two = folder(tmp_path, "one"), folder(tmp_path, "two")
    out, _ = meshwright(one, "train", "run=a", *RUN, "task.num_steps=4", RUNS)
    assert "run 'a' is in s3://bucket/runs/a" in out
    shutil.rmtree(one)
    out, _ = meshwright(two, "train", "run=a", *RUN, "task.num_steps=6", RUNS)
    assert "run 'a': resumes at step 4" in out
    shutil.rmtree(two)
    rows = [json.loads(line) for line in s3.cat_file("bucket/runs/a/metrics.jsonl").splitlines()]
    assert {row["step"]: row["train/loss"] for row in rows if "train/loss" in row} == unbroken[1]

    out, _ = meshwright(folder(tmp_path, "three"), "runs", RUNS, "format=json")
    assert [(row["run"], row["step"], row["ended"]) for row in json.loads(out)] == [("a", 6, "done")]
    name = max(s3.find("bucket/runs/a/checkpoints/6/state"), key=s3.size)
    content = bytearray(s3.cat_file(name))
    content[len(content) // 2] ^= 1
    s3.pipe_file(name, bytes(content))
    out, _ = meshwright(folder(tmp_path, "four"), "train", "run=a", *RUN, "task.num_steps=6", RUNS)
    assert "checkpoint of step 6 is damaged" in out and "falling back to step 4" in out
    found = inspect(folder(tmp_path, "five"), "a", RUNS)
    hashes = ("step", "params_sha256", "optimizer_sha256", "data_position", "next_batch_sha256")
    assert found["checkpoints"] == [2, 4, 6]
    assert {name: found[name] for name in hashes} == {name: unbroken[0][name] for name in hashes}


def train_on_two_hosts(tmp_path: Path, name: str, *arguments: str) -> str:
    """Two processes that see no common disk. Returns what the first printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    hosts = [
        start(folder(tmp_path, f"{name}_{i}"), "train", *arguments, JAX_PROCESS_ID=str(i), **joined) for i in range(2)
    ]
    said = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    return said[0][0]


def test_two_hosts_without_a_common_disk_write_one_checkpoint_and_go_on_from_it(s3, tmp_path):
    arguments = ["run=two", *RUN, "mesh.data=1", "mesh.fsdp=2", "task.num_steps=4", RUNS]
    out = train_on_two_hosts(tmp_path, "first", *arguments)
    assert "could not be written" not in out, out
    newest = "bucket/runs/two/checkpoints/4"
    digests = json.loads(s3.cat_file(f"{newest}/{DIGESTS}"))["files"]
    kernels = [name for name in digests if "mlp.up.kernel" in name and not name.endswith(".zarray")]
    assert len(kernels) == 6  # parameters and two moments, of each process a half
    assert {f"{newest}/{name}" for name in [*digests, DIGESTS]} == set(s3.find(newest))

    s3.rm_file(f"{newest}/{DIGESTS}")  # as if all had been killed just before
    out = train_on_two_hosts(tmp_path, "second", *arguments)
    assert "run 'two': resumes at step 2" in out, out
    again = json.loads(s3.cat_file(f"{newest}/{DIGESTS}"))["files"]
    arrays = [name for name in digests if name.startswith(("state/params", "state/opt_state"))]
    assert arrays and {name: again[name] for name in arrays} == {name: digests[name] for name in arrays}
