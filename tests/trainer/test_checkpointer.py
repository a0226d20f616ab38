"""Checkpoints: bit-exact, atomic, restorable onto any mesh, and verified against damage."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from omegaconf import OmegaConf

from configs.ranges import check_ranges
from trainer.checkpoint.checkpointer import CheckpointConfig, Checkpointer, SaveFailed
from trainer.checkpoint.checksums import state_hash
from trainer.optimizers.adafactor import AdafactorConfig
from trainer.optimizers.adamw import AdamWConfig
from trainer.optimizers.muon import MuonConfig
from trainer.optimizers.soap import SoapConfig
from trainer.state import abstract_state, init_sharded_state


@jax.tree_util.register_dataclass
@dataclass
class ToyState:
    step: Any
    params: Any
    opt_state: Any
    rng: Any


def toy_optimizer() -> optax.GradientTransformation:
    """Returns a chain with every unusual optax node: empty states, masks, partitions, nested tuples."""
    mask = {"embed": False, "layers": {"w": True, "norm": False}}
    labels = {"embed": "a", "layers": {"w": "b", "norm": "a"}}
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3), mask),
        optax.partition({"a": optax.sgd(0.1), "b": optax.adam(0.1)}, labels),
        optax.ema(0.9),
    )


def toy_state(step: int = 3, seed: int = 0) -> ToyState:
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        "layers": {
            "w": jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32),
            "norm": jnp.ones((2, 8), jnp.bfloat16),
        },
    }
    optimizer = toy_optimizer()
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(jax.tree.map(lambda p: p * 0.5, params), opt_state, params)
    return ToyState(jnp.int32(step), params, opt_state, jax.random.key(seed + 7))


def abstract(state: Any, mesh_shape: tuple[int, int] = (1, 1)) -> Any:
    devices = np.array(jax.devices()[: mesh_shape[0] * mesh_shape[1]]).reshape(mesh_shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp"))

    def spec(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        sharded = leaf.ndim >= 2 and leaf.shape[-1] % mesh_shape[1] == 0
        axes = PartitionSpec(*([None] * (leaf.ndim - 1)), "fsdp") if sharded else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, axes))

    return jax.tree.map(spec, state)


def save(checkpointer: Checkpointer, step: int, state: Any, loss: float | None = None, **extra: Any) -> None:
    checkpointer.save(
        step,
        state,
        source={"index": step * 8},
        config={"resolved": {"seed": 1}, "overrides": ["seed=1"]},
        tokenizer={"tokenizer.model": bytes(range(256))},
        extra=extra,
        metrics=None if loss is None else {"loss": loss},
    )


def data_files(folder: Path) -> list[Path]:
    return sorted((p for p in (folder / "state").rglob("d/*") if p.is_file()), key=lambda p: -p.stat().st_size)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_state_is_restored_bit_for_bit_with_rng_key_and_optimizer_state(tmp_path):
    state = toy_state()
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 3, state, patience=4)
        step, back = checkpointer.restore(None, abstract(state))
    assert step == 3
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert state_hash(back) == state_hash(state)
    assert np.array_equal(jax.random.bits(back.rng, (4,)), jax.random.bits(state.rng, (4,)))
    assert state_hash(back) != state_hash(toy_state(seed=1))


def test_json_items_are_read_without_the_arrays(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 3, toy_state(), patience=4)
    with Checkpointer(tmp_path, read_only=True) as reader:
        assert reader.read_json(3, "source") == {"index": 24}
        assert reader.read_json(3, "config")["overrides"] == ["seed=1"]
        assert reader.read_json(3, "extra") == {"patience": 4}
        assert reader.read_tokenizer(3) == {"tokenizer.model": bytes(range(256))}


@pytest.mark.parametrize("saved_on, restored_on", [((1, 8), (4, 2)), ((2, 2), (1, 8)), ((1, 8), (1, 1))])
def test_a_state_is_restored_onto_another_mesh(tmp_path, saved_on, restored_on):
    state = toy_state()
    sharded = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), state, abstract(state, saved_on))
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, sharded)
        _, back = checkpointer.restore(1, abstract(state, restored_on))
    assert state_hash(back) == state_hash(state)
    assert back.params["embed"].sharding == abstract(state, restored_on).params["embed"].sharding


def test_a_state_may_be_donated_right_after_the_call_that_saves_it(tmp_path):
    state = toy_state()
    before = state_hash(state)
    advance = jax.jit(lambda s: jax.tree.map(lambda a: a + 1 if a.dtype == jnp.float32 else a, s), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, state)
        spec = abstract(toy_state())
        for _ in range(3):
            state = advance(state)
        _, back = checkpointer.restore(1, spec)
    assert state_hash(back) == before != state_hash(state)


def test_parameters_alone_are_restored_and_cast(tmp_path):
    state = toy_state()
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 3, state)
    half = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=s.sharding),
        abstract(state, (1, 8)).params,
    )
    with Checkpointer(tmp_path, read_only=True) as reader:
        exact = reader.restore_params(None, abstract(state).params)
        cast = reader.restore_params(3, half)
        average = reader.restore_params(3, abstract(state).params, within=("opt_state", 3, "ema"))
    assert state_hash(exact) == state_hash(state.params)
    assert state_hash(cast) == state_hash(jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params))
    assert state_hash(average) == state_hash(state.opt_state[3].ema)


def test_another_model_or_optimizer_is_refused_by_name(tmp_path):
    state = toy_state()
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 3, state)
        wide = abstract(ToyState(state.step, {**state.params, "embed": jnp.ones((16, 9))}, state.opt_state, state.rng))
        with pytest.raises(ValueError, match=r"params\.embed has shape \[16, 8\], this run expects \[16, 9\]"):
            checkpointer.restore(3, wide)
        other = abstract(ToyState(state.step, state.params, optax.sgd(0.1, 0.9).init(state.params), state.rng))
        with pytest.raises(ValueError, match=r"opt_state\.0\.trace\.embed is missing in the checkpoint"):
            checkpointer.restore(3, other)
        with pytest.raises(ValueError, match=r"step=4: no such checkpoint.*available: 3"):
            checkpointer.restore(4, abstract(state))


def test_retention_keeps_latest_periodic_and_best(tmp_path):
    config = CheckpointConfig(max_to_keep=2, keep_period=4, keep_best=True, async_save=False)
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: float("nan"), 6: 2.0, 7: None, 8: 3.0, 9: 2.5}
    for steps in (range(1, 5), range(5, 10)):  # losses are restored after a restart
        with Checkpointer(tmp_path, config) as checkpointer:
            for step in steps:
                save(checkpointer, step, toy_state(step), losses[step])
            assert checkpointer.best() == 2
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 4, 8, 9]


def test_every_committed_step_carries_digests_of_all_its_files(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 3, toy_state())
    digests = json.loads((tmp_path / "3" / "digests.json").read_text())["files"]
    on_disk = {p.relative_to(tmp_path / "3").as_posix() for p in (tmp_path / "3").rglob("*") if p.is_file()}
    assert on_disk - set(digests) == {"digests.json", "_CHECKPOINT_METADATA", "commit_success.txt"}
    assert set(digests) <= on_disk


def test_flipped_bits_are_detected_and_the_run_falls_back(tmp_path):
    state = toy_state()
    with Checkpointer(tmp_path, CheckpointConfig(max_to_keep=9)) as checkpointer:
        for step in (1, 2, 3):
            save(checkpointer, step, state)
    flip_a_bit(data_files(tmp_path / "3")[0])
    (tmp_path / "2" / "source" / "metadata").write_text('{"index": 17}')
    messages: list[str] = []
    with Checkpointer(tmp_path, say=messages.append) as checkpointer:
        with pytest.raises(ValueError, match=r"step=3: this checkpoint is damaged: state/.*d/"):
            checkpointer.restore(3, abstract(state))
        step, back = checkpointer.restore(None, abstract(state))
        assert step == 1 and state_hash(back) == state_hash(state)
        assert (
            len(messages) == 2
            and "step 3" in messages[0]
            and "state/" in messages[0]
            and "source/metadata" in messages[1]
        )
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.damaged", "3.damaged"]
        save(checkpointer, 2, state)  # the run repeats these steps
        assert checkpointer.restore(None, abstract(state)).step == 2


@pytest.mark.parametrize("damage", ["truncate", "delete", "digests"])
def test_truncated_missing_and_unreadable_files_are_detected(tmp_path, damage):
    state = toy_state()
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, state)
        save(checkpointer, 2, state)
    victim = data_files(tmp_path / "2")[0]
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "delete":
        victim.unlink()
    else:
        (tmp_path / "2" / "digests.json").write_text('{"files": ')
    messages: list[str] = []
    with Checkpointer(tmp_path, read_only=True, say=messages.append) as reader:
        assert reader.latest() == 2
        assert reader.latest_valid_step() == 1
        assert len(messages) == 1 and "falling back to step 1" in messages[0]
    assert (tmp_path / "2").exists()  # read_only moves nothing


def test_checkpoint_without_digests_is_used_with_a_warning(tmp_path):
    state = toy_state()
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, state)
    (tmp_path / "1" / "digests.json").unlink()
    messages: list[str] = []
    with Checkpointer(tmp_path, say=messages.append) as checkpointer:
        assert checkpointer.restore(None, abstract(state)).step == 1
    assert len(messages) == 1 and "has no digests.json" in messages[0]


def test_only_damaged_checkpoints_raise_and_an_empty_folder_returns_none(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.latest_valid_step() is None and checkpointer.steps() == []
        with pytest.raises(ValueError, match="holds no checkpoint"):
            checkpointer.restore(None, abstract(toy_state()))
        save(checkpointer, 1, toy_state())
        checkpointer.wait()
    flip_a_bit(data_files(tmp_path / "new" / "1")[0])
    with (
        Checkpointer(tmp_path / "new") as checkpointer,
        pytest.raises(ValueError, match="all checkpoints are damaged: steps 1;"),
    ):
        checkpointer.latest_valid_step()


KILLED_DURING_SAVE = """
import sys
import jax.numpy as jnp
from tests.trainer.test_checkpointer import save, toy_state
from trainer.checkpoint.checkpointer import CheckpointConfig, Checkpointer, SaveFailed
import trainer.checkpoint.checkpointer as module

checkpointer = Checkpointer(sys.argv[1], CheckpointConfig(max_to_keep=9))
save(checkpointer, 1, toy_state(1))
checkpointer.wait()

def stall(folder):
    print("in the middle of a save", flush=True)
    import time
    time.sleep(60)

module.write_digests = stall
save(checkpointer, 2, toy_state(2))
checkpointer.wait()
"""


def test_kill_during_a_save_leaves_the_previous_checkpoint_intact(tmp_path):
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", KILLED_DURING_SAVE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "in the middle of a save"
        process.send_signal(signal.SIGKILL)
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name]
    with Checkpointer(tmp_path, read_only=True) as reader:
        assert reader.steps() == [1]
        assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name]  # may belong to a run that is still writing
    with Checkpointer(tmp_path, CheckpointConfig(max_to_keep=9)) as checkpointer:
        state = toy_state(1)
        assert state_hash(checkpointer.restore(None, abstract(state)).state) == state_hash(state)
        save(checkpointer, 2, toy_state(2))
        checkpointer.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]  # the first save cleans up


def test_saving_a_step_twice_and_max_to_keep_0_are_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, toy_state())
        with pytest.raises(ValueError, match=r"step 1 .* is saved already"):
            save(checkpointer, 1, toy_state())
    with pytest.raises(ValueError, match=r"checkpoint\.max_to_keep=0: must be at least 1"):
        check_ranges(CheckpointConfig(max_to_keep=0), "checkpoint")


def test_checkpoints_of_repeated_steps_are_renamed(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(max_to_keep=9)) as checkpointer:
        for step in (1, 2, 3):
            save(checkpointer, step, toy_state(step))
        assert checkpointer.discard_after(1) == [2, 3]
        assert checkpointer.latest_valid_step() == 1
        save(checkpointer, 2, toy_state(7))
        state = toy_state(7)
        assert state_hash(checkpointer.restore(2, abstract(state)).state) == state_hash(state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "2.superseded", "3.superseded"]


def test_state_hash_depends_only_on_values_names_dtypes_and_shapes():
    base = {"a": jnp.arange(4.0), "b": jnp.ones((2, 2))}
    same = {"b": jnp.ones((2, 2)), "a": np.arange(4, dtype=np.float32)}
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(base["a"], NamedSharding(mesh, PartitionSpec("x")))
    assert state_hash(base) == state_hash(same) == state_hash({**base, "a": sharded})
    others = [
        {**base, "a": jnp.arange(4.0).at[3].set(3.0000002)},
        {**base, "a": jnp.arange(4.0).reshape(2, 2)},
        {**base, "a": jnp.arange(4.0).astype(jnp.bfloat16)},
        {"a": base["a"], "c": base["b"]},
        {**base, "a": jax.random.key(0)},
        {**base, "a": jax.random.key_data(jax.random.key(0))},
    ]
    assert len({state_hash(tree) for tree in [base, *others]}) == 7


def test_config_is_structured():
    assert OmegaConf.structured(CheckpointConfig).max_to_keep == 3


@pytest.mark.parametrize("config", [AdamWConfig(ema_decay=0.9), AdafactorConfig(), MuonConfig(), SoapConfig()])
def test_every_kind_of_optimizer_state_is_restored_onto_another_mesh(tmp_path, config):
    axes = {"embedder": {"table": ("vocab", "embed")}, "layers": {"w": ("layers", "embed", "mlp")}}

    def init(key: jax.Array) -> Any:
        return {"embedder": {"table": jax.random.normal(key, (16, 8))}, "layers": {"w": jnp.ones((2, 8, 16))}}

    def shardings(count: int) -> Any:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("fsdp",))
        specs = {"embedder": {"table": ("fsdp",)}, "layers": {"w": (None, "fsdp")}}
        is_leaf = lambda x: isinstance(x, tuple)
        return jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s)), specs, is_leaf=is_leaf)

    optimizer = config.build(lambda step: jnp.float32(1e-3), axes)
    state = init_sharded_state(init, optimizer, jax.random.key(0), param_shardings=shardings(8))
    target = abstract_state(init, optimizer, param_shardings=shardings(4))
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 0, state)
        back = checkpointer.restore(0, target).state
    assert state_hash(back) == state_hash(state)
    assert [leaf.sharding for leaf in jax.tree.leaves(back)] == [leaf.sharding for leaf in jax.tree.leaves(target)]


@pytest.mark.parametrize("async_save", [True, False])
def test_failed_save_is_logged_and_leaves_earlier_checkpoints_intact(tmp_path, monkeypatch, async_save):
    messages: list[str] = []
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(folder: Path) -> None:
        raise full

    with Checkpointer(
        tmp_path, CheckpointConfig(max_to_keep=2, async_save=async_save), say=messages.append
    ) as checkpointer:
        save(checkpointer, 1, toy_state(1))
        checkpointer.wait()
        with monkeypatch.context() as patched:
            patched.setattr("trainer.checkpoint.checkpointer.write_digests", fail)  # just before the commit
            save(checkpointer, 2, toy_state(2))
            if async_save:
                save(checkpointer, 3, toy_state(3))  # logs the failure of step 2
                with pytest.raises(
                    SaveFailed, match=r"step 3 could not be written: .* the latest checkpoint is step 1"
                ):
                    checkpointer.wait()
        assert len(messages) == 1 and "checkpoint of step 2 could not be written: no space left on" in messages[0]
        assert checkpointer.steps() == [1] and checkpointer.latest_valid_step() == 1
        save(checkpointer, 4, toy_state(4))
        checkpointer.wait()
        assert checkpointer.steps() == [1, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]  # no incomplete checkpoint is left
