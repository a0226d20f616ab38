"""Train state: initialization and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from tests.trainer import toy
from trainer.mesh import MeshConfig, make_mesh
from trainer.sharding import ShardingRules, param_shardings
from trainer.state import TrainState, abstract_state, init_sharded_state, make_state, state_shardings

OPTIMIZER = optax.adam(1e-3)


def shardings_on(config: MeshConfig) -> dict:
    shapes = jax.eval_shape(toy.init_params, jax.random.key(0))
    return param_shardings(toy.AXES, shapes, make_mesh(config), ShardingRules())


def init_on(config: MeshConfig) -> TrainState:
    return init_sharded_state(toy.init_params, OPTIMIZER, jax.random.key(3), param_shardings=shardings_on(config))


def leaves(state: TrainState) -> list[np.ndarray]:
    state = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("config", [MeshConfig(8, 1, 1), MeshConfig(2, 4, 1), MeshConfig(2, 2, 2)])
def test_initial_state_has_the_same_bits_on_every_mesh(config: MeshConfig) -> None:
    alone = jax.jit(lambda key: make_state(toy.init_params, OPTIMIZER, key))(jax.random.key(3))
    for ours, theirs in zip(leaves(alone), leaves(init_on(config)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_moments_are_sharded_like_their_parameters() -> None:
    state = init_on(MeshConfig(2, 2, 2))
    assert state.params["layers"]["up"].sharding.spec == PartitionSpec(None, ("fsdp",), ("tensor",))
    for moments in (state.opt_state[0].mu, state.opt_state[0].nu):
        for moment, param in zip(jax.tree.leaves(moments), jax.tree.leaves(state.params), strict=True):
            assert moment.sharding == param.sharding
    assert state.step.sharding.is_fully_replicated


def test_abstract_state_matches_the_real_state() -> None:
    shardings = shardings_on(MeshConfig(2, 2, 2))
    abstract = abstract_state(toy.init_params, OPTIMIZER, param_shardings=shardings)
    real = init_on(MeshConfig(2, 2, 2))
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_reduced_dims_are_unsharded_and_the_others_sharded() -> None:
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    params = {"w": shape(2, 8, 4, 4), "a": {"w": shape(8, 8)}}
    mesh = make_mesh(MeshConfig(2, 2, 2))
    axes = {"w": ("layers", "embed", "heads", "head_dim"), "a": {"w": ("embed", "vocab")}}
    shardings = param_shardings(axes, params, mesh, ShardingRules())
    opt_state = {
        "rows": {"w": shape(2, 8, 1, 1), "a": {"w": shape(8, 1)}},
        "cols": {"w": shape(2, 1, 4, 4, 16), "a": {"w": shape(1, 8, 8)}},
        "odd": {"w": shape(3, 8, 4, 4), "count": shape(), "a": {"w": shape(1)}},
    }
    state = TrainState(shape(), params, opt_state, shape())  # type: ignore[arg-type]
    found = jax.tree.map(lambda s: s.spec, state_shardings(state, shardings).opt_state)
    assert found["rows"] == {"w": PartitionSpec(None, ("fsdp",)), "a": {"w": PartitionSpec(("fsdp",))}}
    assert found["cols"]["w"] == PartitionSpec(None, None, ("tensor",))
    assert found["cols"]["a"]["w"] == PartitionSpec(None, ("tensor",))
    assert found["odd"] == {"w": PartitionSpec(), "count": PartitionSpec(), "a": {"w": PartitionSpec()}}
