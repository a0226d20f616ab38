"""Mesh shapes, sharding rules, batch placement and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from omegaconf import OmegaConf

from data.batch import ColumnBatch, TokenBatch
from tests.trainer import toy
from trainer.mesh import AXES, MeshConfig, make_mesh
from trainer.sharding import (
    ShardingRules,
    balanced_token_order,
    batch_sharding,
    check_batch,
    check_seq_len,
    make_constrain,
    param_shardings,
    place_batch,
    process_rows,
)

RULES = ShardingRules()
SHAPES = jax.eval_shape(toy.init_params, jax.random.key(0))


def specs(config: MeshConfig, rules: ShardingRules = RULES) -> dict:
    shardings = param_shardings(toy.AXES, SHAPES, make_mesh(config), rules)
    return jax.tree.map(lambda s: s.spec, shardings)


def test_one_axis_takes_the_remaining_devices() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"stage": 1, "data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 6


class SliceDevice:
    """A fake device of one of several slices."""

    device_kind, platform = "fake", "cpu"

    def __init__(self, id: int, slice_index: int):
        self.id, self.slice_index = id, slice_index


@pytest.mark.parametrize(
    ("config", "slices", "between"),
    [
        (MeshConfig(data=2, fsdp=4), 2, {"data"}),
        (MeshConfig(data=1, fsdp=8), 2, {"fsdp"}),
        (MeshConfig(data=2, fsdp=2, tensor=2), 4, {"data", "fsdp"}),
        (MeshConfig(data=2, fsdp=2, stage=2), 2, {"stage"}),
    ],
)
def test_slices_are_separated_along_the_first_axes(config, slices, between):
    devices = [SliceDevice(i, i % slices) for i in range(8)]  # interleaved
    mesh = make_mesh(config, devices)
    slice_index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for dim, axis in enumerate(AXES):
        assert (np.diff(slice_index, axis=dim) != 0).any() == (axis in between), axis


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MeshConfig(3, 1, 1),
            r"mesh\.data=3: .*8 devices; nearest valid: mesh\.stage=1 mesh\.data=4 mesh\.fsdp=1 mesh\.expert",
        ),
        (MeshConfig(-1, 3, 1), r"mesh\.fsdp=3: .* must divide the 8 devices; nearest valid: .*mesh\.fsdp=4"),
        (MeshConfig(2, 1, 1), r"mesh\.data=2: .* = 2 must equal the 8 devices; nearest valid: "),
        (MeshConfig(-1, -1, 1), r"mesh\.fsdp=-1: mesh\.data is -1 already"),
        (MeshConfig(0, 1, 1), r"mesh\.data=0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_match_the_devices_are_refused(config: MeshConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_every_suggested_mesh_is_valid() -> None:
    with pytest.raises(ValueError) as error:
        make_mesh(MeshConfig(3, 2, 1))
    for choice in str(error.value).split("nearest valid: ")[1].split("; ")[:3]:
        sizes = dict(part.removeprefix("mesh.").split("=") for part in choice.split())
        assert make_mesh(MeshConfig(**{axis: int(size) for axis, size in sizes.items()})).size == 8


def test_parameters_are_sharded_by_the_rules() -> None:
    found = specs(MeshConfig(2, 2, 2))
    assert found["embedding"] == PartitionSpec(("tensor",), ("fsdp",))
    assert found["layers"]["up"] == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert found["layers"]["scale"] == PartitionSpec(None, ("fsdp",))


def test_mesh_axis_shards_a_tensor_once() -> None:
    rules = ShardingRules(mlp=["fsdp"])
    assert specs(MeshConfig(1, 8, 1), rules)["layers"]["up"] == PartitionSpec(None, ("fsdp",))


def test_indivisible_matrix_is_refused_with_valid_sizes() -> None:
    axes, shapes = {"kv": ("embed", "kv_heads")}, {"kv": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
    mesh = make_mesh(MeshConfig(1, 2, 4))
    message = r"mesh\.tensor=4: cannot shard dim 1 \(kv_heads\) of parameter kv, of size 6.*nearest valid.*: 1, 2"
    with pytest.raises(ValueError, match=message):
        param_shardings(axes, shapes, mesh, RULES)


def test_indivisible_vector_is_replicated() -> None:
    axes, shapes = {"scale": ("layers", "embed")}, {"scale": jax.ShapeDtypeStruct((2, 9), jnp.float32)}
    assert param_shardings(axes, shapes, make_mesh(MeshConfig(1, 8, 1)), RULES)["scale"].spec == PartitionSpec()


def test_unknown_axes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"sharding\.embed=\['fdsp'\]: 'fdsp' is not a mesh axis; valid: stage, data, fsdp"
    ):
        specs(MeshConfig(), ShardingRules(embed=["fdsp"]))
    with pytest.raises(ValueError, match="w: no rule for logical axis 'colour'"):
        shapes = {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}
        param_shardings({"w": ("colour",)}, shapes, make_mesh(MeshConfig()), RULES)


@pytest.mark.parametrize(("size", "microbatches"), [(6, 1), (8, 2), (1, 1)])
def test_indivisible_batch_is_refused(size: int, microbatches: int) -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    check_batch(8, 2, mesh, RULES)
    if size == 8:
        mesh = make_mesh(MeshConfig(4, 2, 1))
    with pytest.raises(ValueError, match=rf"data\.batch_size={size}: must be a multiple of .*nearest valid: ") as error:
        check_batch(size, microbatches, mesh, RULES)
    for valid in str(error.value).split("nearest valid: ")[1].split(", "):
        check_batch(int(valid), microbatches, mesh, RULES)


def test_activations_are_constrained_and_indivisible_dims_stay_unsharded() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    constrain = make_constrain(mesh, RULES)
    function = jax.jit(lambda x: constrain(x, ("batch", "length", "mlp")))
    assert function(jnp.zeros((8, 3, 4))).sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert function(jnp.zeros((1, 3, 5))).sharding.is_fully_replicated
    width = jax.jit(lambda x: constrain(x, ("batch", "length", "embed")))(jnp.zeros((8, 3, 4)))
    assert width.sharding.spec == PartitionSpec(("data", "fsdp"))


def test_constraints_are_no_ops_on_one_device() -> None:
    x = jnp.zeros((2, 2))
    assert make_constrain(make_mesh(MeshConfig(), jax.devices()[:1]), RULES)(x, ("batch", "embed")) is x


@pytest.mark.parametrize("config", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 1, 8)])
def test_placed_batch_preserves_row_order(config: MeshConfig) -> None:
    sharding = batch_sharding(make_mesh(config), RULES)
    batch = toy.batch(8)
    rows = process_rows(sharding, 8)
    np.testing.assert_array_equal(rows, np.arange(8))
    placed = place_batch(batch, sharding, 8)
    for ours, theirs in zip(batch, placed, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert theirs.sharding == sharding


def test_process_loads_only_the_rows_of_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second of four simulated processes of two devices each, on a mesh whose tensor axis spans two processes.
    mesh = make_mesh(MeshConfig(2, 1, 4))
    sharding = batch_sharding(mesh, RULES)
    indices = sharding.devices_indices_map((4,))
    ours = {device: indices[device] for device in mesh.devices.flat[2:4]}
    monkeypatch.setattr(type(sharding), "addressable_devices_indices_map", lambda self, shape: ours)
    np.testing.assert_array_equal(process_rows(sharding, 4), [0, 1])


def test_rows_are_placed_by_block_with_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sharding = batch_sharding(make_mesh(MeshConfig(2, 2, 2)), RULES)
    placed = place_batch(toy.batch(8), sharding, 8)
    np.testing.assert_array_equal(placed.tokens, toy.batch(8).tokens)


CONTEXT = MeshConfig(2, context=4)


def pairs_with_columns(rows: int) -> ColumnBatch:
    sides = [toy.batch(rows, seed) for seed in (0, 1)]
    fields = [np.stack(both, axis=1) for both in zip(*sides, strict=True)]
    return ColumnBatch(*fields, {"reference": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)})


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("make", [toy.batch, pairs_with_columns])
def test_tokens_are_sharded_along_the_row_and_columns_are_not(monkeypatch: pytest.MonkeyPatch, make, processes) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    sharding = batch_sharding(make_mesh(CONTEXT), RULES)
    batch = make(8)
    placed = place_batch(batch, sharding, 8)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    middle = (None,) * (batch.tokens.ndim - 2)
    for field in placed[:5]:
        assert field.sharding.spec == PartitionSpec(("data",), *middle, ("context",))
    if isinstance(batch, ColumnBatch):
        assert placed.columns["reference"].sharding.spec == PartitionSpec(("data",))


def test_balanced_rows_give_each_device_an_early_and_a_late_chunk() -> None:
    np.testing.assert_array_equal(balanced_token_order(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    np.testing.assert_array_equal(balanced_token_order(12, 4), np.arange(12))  # 3 tokens per device cannot be halved
    np.testing.assert_array_equal(balanced_token_order(8, 1), np.arange(8))
    sharding = batch_sharding(make_mesh(CONTEXT), RULES)
    batch = pairs_with_columns(8)
    placed = place_batch(batch, sharding, 8, balanced=True)
    for ours, theirs in zip(placed[:5], batch[:5], strict=True):
        np.testing.assert_array_equal(ours, theirs[..., balanced_token_order(toy.L, 4)])
    np.testing.assert_array_equal(placed.columns["reference"], batch.columns["reference"])


def test_batches_of_indivisible_length_are_not_sharded_along_the_row() -> None:
    sharding = batch_sharding(make_mesh(CONTEXT), RULES)
    batch = TokenBatch(*(field[:, :6] for field in toy.batch(8)))
    assert place_batch(batch, sharding, 8).tokens.sharding.spec == PartitionSpec(("data",))


def test_process_with_shards_of_rows_loads_full_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second of four simulated processes of two devices each: the second halves of the first rows.
    mesh = make_mesh(CONTEXT)
    sharding = batch_sharding(mesh, RULES)
    indices = jax.NamedSharding(mesh, PartitionSpec(("data",))).devices_indices_map((4,))
    ours = {device: indices[device] for device in mesh.devices.flat[2:4]}
    monkeypatch.setattr(type(sharding), "addressable_devices_indices_map", lambda self, shape: ours)
    np.testing.assert_array_equal(process_rows(sharding, 4), [0, 1])


def test_indivisible_seq_len_is_refused_with_valid_lengths_and_meshes() -> None:
    mesh = make_mesh(CONTEXT)
    check_seq_len(64, mesh, RULES)
    check_seq_len(63, make_mesh(MeshConfig()), RULES)
    message = (
        r"data\.seq_len=66: not divisible by mesh\.context=4, which shards each row into 4 equal parts; "
        r"nearest valid: 64, 68; or mesh\.context=1 or 2"
    )
    with pytest.raises(ValueError, match=message):
        check_seq_len(66, mesh, RULES)


def test_mesh_axis_that_shards_layers_cannot_shard_rows() -> None:
    rules = ShardingRules(length=["tensor"])
    check_seq_len(64, make_mesh(MeshConfig()), rules)
    with pytest.raises(ValueError, match=r"sharding\.length=\['tensor'\]: mesh axis 'tensor' already shards 'heads'"):
        check_seq_len(64, make_mesh(MeshConfig(4, tensor=2)), rules)


def test_position_table_is_not_sharded_along_positions() -> None:
    shapes, axes = {"table": jax.ShapeDtypeStruct((9, 8), jnp.float32)}, {"table": ("positions", "embed")}
    found = param_shardings(axes, shapes, make_mesh(MeshConfig(1, fsdp=2, context=4)), RULES)
    assert found["table"].spec == PartitionSpec(None, ("fsdp",))


@pytest.mark.parametrize("cls", [MeshConfig, ShardingRules])
def test_configs_are_structured(cls: type) -> None:
    assert OmegaConf.to_object(OmegaConf.structured(cls)) == cls()
