"""Checkpoints in an object store: whole or not there, from any machine, and never the last good one taken away."""

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
from tests.trainer.test_checkpoint import abstract, save, toy_state
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
    """Of what a machine that has seen nothing finds."""
    with opened(folder, say=say) as checkpointer:
        found = checkpointer.restore(None, abstract(toy_state()))
    return found.step, state_hash(found.state)


def test_a_state_comes_back_bit_for_bit_on_a_machine_that_has_seen_nothing(tmp_path):
    with opened(tmp_path / "one") as checkpointer:
        save(checkpointer, 3, toy_state(3), loss=2.5, patience=4)
        checkpointer.wait()
    assert hash_from(tmp_path / "two") == (3, state_hash(toy_state(3)))
    with opened(tmp_path / "three", read_only=True) as reader:
        assert reader.steps() == [3] and reader.best() == 3
        assert reader.read_json(3, "extra") == {"patience": 4}
        assert reader.read_tokenizer(3) == {"tokenizer.model": bytes(range(256))}


def test_what_the_store_holds_is_a_folder_of_checkpoints_as_any_other(tmp_path):
    save_all(tmp_path / "one", [1, 2])
    store = Store(URL)
    store.get(list(store.files()), tmp_path / "copied")
    with Checkpointer(tmp_path / "copied", read_only=True) as checkpointer:
        assert checkpointer.latest_valid_step() == 2
        assert state_hash(checkpointer.restore(2, abstract(toy_state())).state) == state_hash(toy_state(2))


def test_the_last_the_multiples_and_the_best_stay_as_they_do_in_a_folder(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5, 6: None}
    settings = CheckpointConfig(max_to_keep=2, keep_period=3)
    with (
        opened(tmp_path / "one", keep=2, keep_every=3) as stored,
        Checkpointer(tmp_path / "local", settings) as local,
    ):
        for step, loss in losses.items():
            for checkpointer in (stored, local):
                save(checkpointer, step, toy_state(step), loss=loss)
                checkpointer.wait()
        assert stored.steps() == local.steps() == [2, 3, 5, 6]
    assert steps_to_keep({1: 3.0, 2: 2.0}, CheckpointConfig(max_to_keep=1, keep_best=False)) == {2}


def test_an_upload_without_its_last_file_is_not_there(tmp_path):
    save_all(tmp_path / "one", [1, 2])
    Store(URL).delete([f"2/{DIGESTS}"])
    assert hash_from(tmp_path / "two") == (1, state_hash(toy_state(1)))
    save_all(tmp_path / "two", [2])  # and is done again over what is left of it
    assert hash_from(tmp_path / "three") == (2, state_hash(toy_state(2)))
    files = json.loads(Store(URL).read(f"2/{DIGESTS}") or b"")["files"]
    assert set(Store(URL).files("2")) == {f"2/{name}" for name in [*files, DIGESTS]}


def flip(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


@pytest.mark.parametrize(
    ("harm", "said"),
    [(flip, "not have the content"), (lambda content: content[:-1], "bytes instead of"), (None, "is missing")],
    ids=["flipped", "truncated", "missing"],
)
def test_a_damaged_object_is_found_and_the_newest_whole_one_is_taken(tmp_path, harm, said):
    save_all(tmp_path / "one", [1, 2])
    store, heard = Store(URL), []
    name = max(store.files("2/state"), key=lambda name: store.files("2/state")[name].size)
    if harm is None:
        store.delete([name])
    else:
        store.write(name, harm(store.read(name) or b""))
    assert hash_from(tmp_path / "two", heard.append) == (1, state_hash(toy_state(1)))
    assert len(heard) == 1 and "step 2 is damaged" in heard[0] and "falling back to step 1" in heard[0]
    assert name[2:] in heard[0] and said in heard[0]
    with opened(tmp_path / "two", read_only=True) as reader:
        assert reader.steps() == [1] and "2.damaged" in store.folders()
    save_all(tmp_path / "two", [2])
    assert hash_from(tmp_path / "three") == (2, state_hash(toy_state(2)))


def test_a_store_that_fails_for_a_moment_is_told_in_a_line_and_the_save_stands(tmp_path, flaky):
    heard: list[str] = []
    with opened(tmp_path / "one", say=heard.append) as checkpointer:
        flaky.failures = 2
        save(checkpointer, 1, toy_state(1))
        checkpointer.wait()
        assert checkpointer.steps() == [1]
    assert heard and all("503 Slow Down; retrying up to 3 times" in line for line in heard)


def test_a_store_that_is_gone_takes_one_save_and_nothing_that_was_there(tmp_path, flaky):
    heard: list[str] = []
    with opened(tmp_path / "one", keep=1, say=heard.append) as checkpointer:
        save(checkpointer, 1, toy_state(1))
        checkpointer.wait()
        flaky.failures = 10**6
        save(checkpointer, 2, toy_state(2))
        save(checkpointer, 3, toy_state(3))  # is told of the one before, and goes on
        told = [line for line in heard if line.startswith("checkpoint")]
        assert len([line for line in heard if "retrying up to" in line]) <= 2  # a line for each save, not for each file
        assert len(told) == 1 and "step 2 could not be written" in told[0] and "tried 4 times" in told[0]
        assert "the newest is that of step 1" in told[0]
        with pytest.raises(SaveFailed, match="step 3 could not be written"):
            checkpointer.wait()
        flaky.failures = 0
        assert checkpointer.steps() == [1]
        save(checkpointer, 4, toy_state(4))
        checkpointer.wait()
        assert checkpointer.steps() == [4]
    assert not list((tmp_path / "one").glob("*tmp*"))
    assert hash_from(tmp_path / "two") == (4, state_hash(toy_state(4)))


def test_older_ones_go_only_when_the_newer_one_is_committed(tmp_path, monkeypatch):
    save_all(tmp_path / "one", [1], keep=1)
    order: list[str] = []
    write, delete = Store.write, Store.delete
    monkeypatch.setattr(Store, "write", lambda self, name, content: (order.append(name), write(self, name, content)))
    monkeypatch.setattr(Store, "delete", lambda self, names: (order.extend(names), delete(self, names)))
    save_all(tmp_path / "one", [2], keep=1)
    assert order[:2] == [f"2/{DIGESTS}", f"1/{DIGESTS}"] and len(order) > 2


def test_steps_that_will_be_done_anew_are_set_aside_in_the_store(tmp_path):
    save_all(tmp_path / "one", [1, 2, 3])
    with opened(tmp_path / "two") as checkpointer:
        assert checkpointer.latest_valid_step() == 3
        assert checkpointer.discard_after(1) == [2, 3]
        assert checkpointer.steps() == [1] and checkpointer.superseded() == ["2.superseded", "3.superseded"]
        save(checkpointer, 2, toy_state(12))
        checkpointer.wait()
    assert hash_from(tmp_path / "three") == (2, state_hash(toy_state(12)))


def test_a_copy_of_something_else_on_this_machine_is_not_taken_for_the_checkpoint(tmp_path):
    save_all(tmp_path / "one", [1])
    shutil.copytree(tmp_path / "one", tmp_path / "kept")
    Store(URL).delete(list(Store(URL).files()))
    with opened(tmp_path / "one") as checkpointer:
        assert checkpointer.latest_valid_step() is None  # what the store holds counts
        save(checkpointer, 1, toy_state(11))
        checkpointer.wait()
    assert hash_from(tmp_path / "kept") == (1, state_hash(toy_state(11)))


KILLED_IN_MID_UPLOAD = """
import sys, time
from pathlib import Path
from data.object_store import Store
from tests.trainer.test_checkpoint import save, toy_state
from trainer.checkpoint.remote_checkpointer import StoredCheckpointer

checkpointer = StoredCheckpointer(Store(sys.argv[1]), Path(sys.argv[2]))
save(checkpointer, 1, toy_state(1))
checkpointer.wait()
put = Store.put

def half(self, files):
    put(self, dict(list(files.items())[: len(files) // 2]))
    print("in mid-upload", flush=True)
    time.sleep(60)

Store.put = half
save(checkpointer, 2, toy_state(2))
checkpointer.wait()
"""


def test_a_kill_in_mid_upload_leaves_the_one_before(tmp_path):
    root, url = Path(__file__).parents[2], f"file://{tmp_path}/bucket"
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", KILLED_IN_MID_UPLOAD, url, str(tmp_path / "one")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "in mid-upload"
        process.send_signal(signal.SIGKILL)
    assert Store(url).files("2")
    for machine in ("one", "two"):  # the same one, which has half of it still, and another
        with RemoteCheckpointer(Store(url), tmp_path / machine) as checkpointer:
            assert checkpointer.steps() == [1]
            state = checkpointer.restore(None, abstract(toy_state())).state
            assert state_hash(state) == state_hash(toy_state(1))
            save(checkpointer, 2 if machine == "one" else 3, toy_state(2))
            checkpointer.wait()
            assert len(checkpointer.steps()) > 1
        Store(url).delete([f"2/{DIGESTS}"])
