"""Multi-process behaviour: processes save, restore and stop together."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.trainer.test_checkpointer import abstract, toy_state
from trainer.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from trainer.checkpoint.checksums import state_hash

ROOT = Path(__file__).parents[2]

WORKER = """
import json, sys, time
import jax
port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, coordinator_bind_address=f"127.0.0.1:{port}",
                           heartbeat_timeout_seconds=10)
from tests.trainer.test_checkpointer import abstract, data_files, flip_a_bit, save, toy_state
from types import SimpleNamespace
from pathlib import Path
from trainer.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from trainer.checkpoint.checksums import state_hash
from trainer.hooks import StopOnSignal
from trainer.loop import StopTraining
import numpy as np

spec = abstract(toy_state(), (2, 4))
def place(leaf, spec):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raw = np.asarray(jax.random.key_data(leaf))
        replicated = jax.sharding.NamedSharding(spec.sharding.mesh, jax.sharding.PartitionSpec())
        raw = jax.make_array_from_callback(raw.shape, replicated, lambda index: raw[index])
        return jax.random.wrap_key_data(raw)
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, spec.sharding, lambda index: value[index])
state = jax.tree.map(place, toy_state(), spec)
messages = []
result = {"hash": state_hash(state)}
with Checkpointer(folder, CheckpointConfig(max_to_keep=9), say=messages.append) as checkpointer:
    save(checkpointer, 1, state, loss=2.0)
    save(checkpointer, 2, state, loss=1.0)
    checkpointer.wait()
with Checkpointer(folder, CheckpointConfig(max_to_keep=9), say=messages.append) as checkpointer:
    if index == 0:
        flip_a_bit(data_files(Path(folder) / "2")[0])
    step, back = checkpointer.restore(None, spec)
    result |= {"step": step, "back": state_hash(back), "messages": len(messages)}
    saved = []
    with StopOnSignal(lambda step, state, source: saved.append(step)) as hook:
        print("ready", flush=True)
        try:
            for step in range(1000):
                hook(step, state, None)
                time.sleep(0.02)
        except StopTraining as stop:
            result |= {"reason": stop.reason, "stopped": step, "saved": saved}
    print(json.dumps(result), flush=True)
"""


def test_two_processes_save_restore_and_stop_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-c", WORKER, str(port)]
    workers = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )
        for i in range(2)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            lines = iter(worker.stdout.readline, "")
            if not any(line.strip() == "ready" for line in lines):
                raise AssertionError(worker.communicate(timeout=30)[1][-3000:])
        workers[1].send_signal(signal.SIGTERM)  # a signal to one process is enough
        outputs = [worker.communicate(timeout=60) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    results = []
    for out, err in outputs:
        rows = [line for line in out.splitlines() if line.startswith("{")]
        assert rows, err[-3000:]
        results.append(json.loads(rows[-1]))
    expected = state_hash(toy_state())
    for result in results:
        assert result["hash"] == result["back"] == expected
        assert result["step"] == 1 and result["reason"] == "preempted"
        assert result["saved"] == [result["stopped"]] == [results[0]["stopped"]]
    assert [result["messages"] for result in results] == [1, 0]
    with Checkpointer(tmp_path, CheckpointConfig(max_to_keep=9)) as checkpointer:  # a single process resumes
        assert checkpointer.steps() == [1]
        assert state_hash(checkpointer.restore(None, abstract(toy_state(), (4, 2))).state) == expected
