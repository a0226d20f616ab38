"""Checkpoints in an object store: atomic, readable from any machine, never losing the last valid one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fsspec", reason="pip install -e '.[test]'")

from data.object_store import Store
from tests.stores import flaky_store
from tests.trainer.test_checkpointer import abstract, save, toy_state
from trainer.checkpoint.checkpointer import CheckpointConfig, Checkpointer, SaveFailed
from trainer.checkpoint.checksums import DIGESTS, state_hash
from trainer.checkpoint.remote_checkpointer import RemoteCheckpointer, steps_to_keep

URL = "flaky://bucket/runs/a/checkpoints"


@pytest.fixture(autouse=True)
def flaky(monkeypatch):
    with flaky_store(monkeypatch) as file_system:
        yield file_system


def opened(folder: Path, **settings: Any) -> RemoteCheckpointer:
    say, read_only = settings.pop("say", lambda text: None), settings.pop("read_only", False)
    return RemoteCheckpointer(Store(URL, say), folder, CheckpointConfig(**settings), say=say, read_only=read_only)


def save_all(folder: Path, steps: list[int], **settings: Any) -> None:
    with opened(folder, **settings) as checkpointer:
        for step in steps:
            save(checkpointer, step, toy_state(step))
        checkpointer.wait()


def hash_from(folder: Path, say: Any = lambda text: None) -> tuple[int, str]:
    """Restores in a fresh local folder; returns the step and the hash of the state."""
    with opened(folder, say=say) as checkpointer:
        found = checkpointer.restore(None, abstract(toy_state()))
    return found.step, state_hash(found.state)


def test_state_is_restored_bit_for_bit_on_another_machine(tmp_path):
    with opened(tmp_path / "one") as checkpointer:
        save(checkpointer, 3, toy_state(3), loss=2.5, patience=4)
        checkpointer.wait()
    assert hash_from(tmp_path / "two") == (3, state_hash(toy_state(3)))
    with opened(tmp_path / "three", read_only=True) as reader:
        assert reader.steps() == [3] and reader.best() == 3
        assert reader.read_json(3, "extra") == {"patience": 4}
        assert reader.read_tokenizer(3) == {"tokenizer.model": bytes(range(256))}


def test_store_has_the_layout_of_a_local_checkpoint_folder(tmp_path):
    save_all(tmp_path / "one", [1, 2])
    store = Store(URL)
    store.get(list(store.files()), tmp_path / "copied")
    with Checkpointer(tmp_path / "copied", read_only=True) as checkpointer:
        assert checkpointer.latest_valid_step() == 2
        assert state_hash(checkpointer.restore(2, abstract(toy_state())).state) == state_hash(toy_state(2))


def test_retention_matches_that_of_a_local_folder(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5, 6: None}
    settings = CheckpointConfig(max_to_keep=2, keep_period=3)
    with (
        opened(tmp_path / "one", max_to_keep=2, keep_period=3) as stored,
        Checkpointer(tmp_path / "local", settings) as local,
    ):
        for step, loss in losses.items():
            for checkpointer in (stored, local):
                save(checkpointer, step, toy_state(step), loss=loss)
                checkpointer.wait()
        assert stored.steps() == local.steps() == [2, 3, 5, 6]
    assert steps_to_keep({1: 3.0, 2: 2.0}, CheckpointConfig(max_to_keep=1, keep_best=False)) == {2}


def test_upload_without_digests_does_not_count(tmp_path):
    save_all(tmp_path / "one", [1, 2])
    Store(URL).delete([f"2/{DIGESTS}"])
    assert hash_from(tmp_path / "two") == (1, state_hash(toy_state(1)))
    save_all(tmp_path / "two", [2])  # uploads again over the leftovers
    assert hash_from(tmp_path / "three") == (2, state_hash(toy_state(2)))
    files = json.loads(Store(URL).read(f"2/{DIGESTS}") or b"")["files"]
    assert set(Store(URL).files("2")) == {f"2/{name}" for name in [*files, DIGESTS]}


def flip(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip, "does not match its SHA-256"), (lambda content: content[:-1], "bytes instead of"), (None, "is missing")],
    ids=["flipped", "truncated", "missing"],
)
def test_damaged_object_is_detected_and_the_newest_valid_checkpoint_is_restored(tmp_path, damage, message):
    save_all(tmp_path / "one", [1, 2])
    store, messages = Store(URL), []
    name = max(store.files("2/state"), key=lambda name: store.files("2/state")[name].size)
    if damage is None:
        store.delete([name])
    else:
        store.write(name, damage(store.read(name) or b""))
    assert hash_from(tmp_path / "two", messages.append) == (1, state_hash(toy_state(1)))
    assert len(messages) == 1 and "step 2 is damaged" in messages[0] and "falling back to step 1" in messages[0]
    assert name[2:] in messages[0] and message in messages[0]
    with opened(tmp_path / "two", read_only=True) as reader:
        assert reader.steps() == [1] and "2.damaged" in store.folders()
    save_all(tmp_path / "two", [2])
    assert hash_from(tmp_path / "three") == (2, state_hash(toy_state(2)))


def test_transient_store_failure_is_logged_and_the_save_succeeds(tmp_path, flaky):
    messages: list[str] = []
    with opened(tmp_path / "one", say=messages.append) as checkpointer:
        flaky.failures = 2
        save(checkpointer, 1, toy_state(1))
        checkpointer.wait()
        assert checkpointer.steps() == [1]
    assert messages and all("503 Slow Down; retrying up to 3 times" in line for line in messages)


def test_unavailable_store_fails_the_save_and_leaves_earlier_checkpoints_intact(tmp_path, flaky):
    messages: list[str] = []
    with opened(tmp_path / "one", max_to_keep=1, say=messages.append) as checkpointer:
        save(checkpointer, 1, toy_state(1))
        checkpointer.wait()
        flaky.failures = 10**6
        save(checkpointer, 2, toy_state(2))
        save(checkpointer, 3, toy_state(3))  # logs the failure of step 2 and continues
        failures = [line for line in messages if line.startswith("checkpoint")]
        assert len([line for line in messages if "retrying up to" in line]) <= 2  # one line per save, not per file
        assert len(failures) == 1 and "step 2 could not be written" in failures[0] and "tried 4 times" in failures[0]
        assert "the latest checkpoint is step 1" in failures[0]
        with pytest.raises(SaveFailed, match="step 3 could not be written"):
            checkpointer.wait()
        flaky.failures = 0
        assert checkpointer.steps() == [1]
        save(checkpointer, 4, toy_state(4))
        checkpointer.wait()
        assert checkpointer.steps() == [4]
    assert not list((tmp_path / "one").glob("*tmp*"))
    assert hash_from(tmp_path / "two") == (4, state_hash(toy_state(4)))


def test_older_checkpoints_are_deleted_only_after_the_commit(tmp_path, monkeypatch):
    save_all(tmp_path / "one", [1], max_to_keep=1)
    order: list[str] = []
    write, delete = Store.write, Store.delete
    monkeypatch.setattr(Store, "write", lambda self, name, content: (order.append(name), write(self, name, content)))
    monkeypatch.setattr(Store, "delete", lambda self, names: (order.extend(names), delete(self, names)))
    save_all(tmp_path / "one", [2], max_to_keep=1)
    assert order[:2] == [f"2/{DIGESTS}", f"1/{DIGESTS}"] and len(order) > 2


def test_checkpoints_of_repeated_steps_are_renamed_in_the_store(tmp_path):
    save_all(tmp_path / "one", [1, 2, 3])
    with opened(tmp_path / "two") as checkpointer:
        assert checkpointer.latest_valid_step() == 3
        assert checkpointer.discard_after(1) == [2, 3]
        assert checkpointer.steps() == [1] and checkpointer.superseded() == ["2.superseded", "3.superseded"]
        save(checkpointer, 2, toy_state(12))
        checkpointer.wait()
    assert hash_from(tmp_path / "three") == (2, state_hash(toy_state(12)))


def test_stale_local_copy_is_not_mistaken_for_the_checkpoint(tmp_path):
    save_all(tmp_path / "one", [1])
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    Store(URL).delete(list(Store(URL).files()))
    with opened(tmp_path / "one") as checkpointer:
        assert checkpointer.latest_valid_step() is None  # only the store counts
        save(checkpointer, 1, toy_state(11))
        checkpointer.wait()
    assert hash_from(tmp_path / "copy") == (1, state_hash(toy_state(11)))


KILLED_DURING_UPLOAD = """
import sys, time
from pathlib import Path
from data.object_store import Store
from tests.trainer.test_checkpointer import save, toy_state
from trainer.checkpoint.remote_checkpointer import RemoteCheckpointer

checkpointer = RemoteCheckpointer(Store(sys.argv[1]), Path(sys.argv[2]))
save(checkpointer, 1, toy_state(1))
checkpointer.wait()
put = Store.put

def half(self, files):
    put(self, dict(list(files.items())[: len(files) // 2]))
    print("in the middle of an upload", flush=True)
    time.sleep(60)

Store.put = half
save(checkpointer, 2, toy_state(2))
checkpointer.wait()
"""


def test_kill_during_an_upload_leaves_the_previous_checkpoint_intact(tmp_path):
    root, url = Path(__file__).parents[2], f"file://{tmp_path}/bucket"
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", KILLED_DURING_UPLOAD, url, str(tmp_path / "one")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "in the middle of an upload"
        process.send_signal(signal.SIGKILL)
    assert Store(url).files("2")
    for machine in ("one", "two"):  # the same machine, with a partial copy, and another
        with RemoteCheckpointer(Store(url), tmp_path / machine) as checkpointer:
            assert checkpointer.steps() == [1]
            state = checkpointer.restore(None, abstract(toy_state())).state
            assert state_hash(state) == state_hash(toy_state(1))
            save(checkpointer, 2 if machine == "one" else 3, toy_state(2))
            checkpointer.wait()
            assert len(checkpointer.steps()) > 1
        Store(url).delete([f"2/{DIGESTS}"])
