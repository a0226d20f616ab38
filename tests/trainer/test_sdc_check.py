"""SDC checks detect and name a device that computes wrong results or holds a different replica."""

from dataclasses import replace
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from tests.trainer import toy
from tests.trainer.test_step import OPTIMIZER, step_with
from trainer.mesh import MeshConfig, make_mesh
from trainer.reliability.loss_spikes import NO_LIMITS
from trainer.reliability.sdc_check import SDCCheckConfig, SDCChecker, SilentDataCorruption, minority_indices
from trainer.sharding import ShardingRules, param_shardings
from trainer.state import abstract_state, init_sharded_state

EVERY_SECOND = SDCCheckConfig(every=2)


def made(train_step=None, **axes):
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    mesh = make_mesh(MeshConfig(**axes))
    shardings = param_shardings(toy.AXES, shapes, mesh, ShardingRules())
    state = init_sharded_state(toy.init_params, OPTIMIZER, jax.random.key(1), param_shardings=shardings)
    abstract = abstract_state(toy.init_params, OPTIMIZER, param_shardings=shardings)
    return state, SDCChecker(EVERY_SECOND, train_step or step_with(), abstract)


def with_a_flipped_bit(array, device):
    """Flips the lowest bit of one element in the shard of one device."""
    shards = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            bits = data.reshape(-1).view(np.uint32)
            bits[bits.size // 2] ^= 1
        shards.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


@pytest.mark.parametrize(
    ("axes", "replicas"), [({"data": 8}, 8), ({"data": 2, "fsdp": 4}, 2), ({"data": 4, "tensor": 2}, 4)]
)
def test_one_flipped_bit_in_a_replica_is_detected_and_named(axes, replicas):
    state, watch = made(**{"data": 1, "fsdp": 1, "tensor": 1} | axes)
    assert watch.differing_replicas(state) == ""
    corrupted = replace(state, params=state.params | {"head": with_a_flipped_bit(state.params["head"], device=5)})
    problem = watch.differing_replicas(corrupted)
    assert "the replica of params.head on device 5 of process 0 differs from the others" in problem
    assert problem.count(" on device ") == (1 if replicas > 2 else 2)  # two replicas have no majority


def test_unreplicated_shards_cannot_be_compared():
    state, watch = made(data=1, fsdp=8, tensor=1)
    corrupted = replace(state, params=state.params | {"head": with_a_flipped_bit(state.params["head"], device=5)})
    assert watch.differing_replicas(corrupted) == ""


def test_guard_does_not_change_a_correct_run():
    state, watch = made(data=4, fsdp=2, tensor=1)
    plain = jax.jit(step_with())
    expected = plain(state, {}, toy.batch(8), NO_LIMITS)[0]
    guarded = watch.guard(plain, first_step=1)
    got = guarded(state, {}, toy.batch(8), NO_LIMITS)[0]
    for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_non_repeatable_step_raises_before_it_runs():
    ticks = count()

    def unsteady(state, frozen, batch, limits):
        tick = io_callback(lambda: np.float32(next(ticks)), jax.ShapeDtypeStruct((), jnp.float32))
        return replace(state, params=state.params | {"head": state.params["head"] + tick}), {}

    steps = []
    state, watch = made(unsteady, data=8, fsdp=1, tensor=1)
    guarded = watch.guard(lambda state, *_: steps.append(1) or (state, {}), first_step=4)
    guarded(state, {}, toy.batch(8), NO_LIMITS)  # step 5 is not due
    with pytest.raises(
        SilentDataCorruption, match=r"gave different bits for params\.head when the same step was repeated"
    ) as error:
        guarded(state, {}, toy.batch(8), NO_LIMITS)
    assert (error.value.step, error.value.sound, len(steps)) == (6, 4, 1)


def test_non_repeatable_device_is_named():
    state, watch = made(data=8, fsdp=1, tensor=1)
    runs = [np.zeros((8, len(watch._names)), np.uint32) for _ in range(2)]
    runs[1][3, :2] = 7
    watch._of_step = lambda *_: runs.pop()
    problem = watch.differing_repeats(state)
    assert problem.startswith("device 3 of process 0 gave different bits for") and "device 2" not in problem


def test_digest_of_every_dtype():
    from trainer.reliability.sdc_check import _digest

    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.int32, jnp.uint8, jnp.bool_, jnp.float8_e4m3fn):
        x = jnp.arange(12).reshape(3, 4).astype(dtype)
        other = x.at[1, 2].set(x[1, 2] == 0)
        assert _digest(x) == _digest(x + 0 if dtype != jnp.bool_ else x) and _digest(x) != _digest(other), dtype
        assert dtype == jnp.bool_ or _digest(x) != _digest(x[::-1])


@pytest.mark.parametrize(
    ("values", "odd"), [([1, 1, 1], []), ([1, 2, 1], [1]), ([1, 2], [0, 1]), ([1, 2, 3], [0, 1, 2])]
)
def test_minority_indices(values, odd):
    assert minority_indices(np.array(values)) == odd
