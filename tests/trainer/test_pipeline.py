"""Pipeline parallelism: the same losses and gradients as on one device, and the schedule."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from models.config import PipelineConfig
from models.pipeline_parallel import Schedule
from models.transformer import abstract_params, param_axes
from tests.trainer.on_meshes import DENSE, alone, assert_same, losses_and_gradients
from trainer.mesh import MeshConfig, abstract_mesh
from trainer.sharding import ShardingRules, param_shardings, with_pipeline

MESH = abstract_mesh(MeshConfig(4, stage=2), 8)


@pytest.mark.parametrize(
    ("model", "objective", "mesh", "pipeline"),
    [
        ("dense", "next token", MeshConfig(4, stage=2), PipelineConfig()),
        ("dense", "next token", MeshConfig(2, stage=4), PipelineConfig(4)),
        ("dense", "next token", MeshConfig(1, fsdp=2, tensor=2, stage=2), PipelineConfig(num_repeats=2)),
        ("dense", "next token", MeshConfig(1, context=4, stage=2), PipelineConfig(2, num_repeats=2)),
        ("experts", "next token", MeshConfig(1, fsdp=2, expert=2, stage=2), PipelineConfig(num_repeats=2)),
        ("capacity", "next token", MeshConfig(1, expert=4, stage=2), PipelineConfig()),
        ("latent", "multi-token prediction", MeshConfig(2, tensor=2, stage=2), PipelineConfig(num_repeats=2)),
        ("dense", "pairs", MeshConfig(2, stage=4), PipelineConfig()),
    ],
)
def test_losses_and_gradients_match_one_device(model, objective, mesh, pipeline):
    found = losses_and_gradients(model, objective, mesh, num_layers=4, pipeline=pipeline)
    assert_same(found, alone(model, objective, num_layers=4))


@pytest.mark.parametrize("schedule", [Schedule(1, 1, 1), Schedule(2, 1, 4), Schedule(4, 1, 4), Schedule(4, 3, 8)])
def test_each_microbatch_passes_all_stages_in_each_round_without_waiting(schedule):
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for turn in range(schedule.turns):
        for stage in range(schedule.stages):
            microbatch, round_ = map(int, schedule.at(np.int32(turn), np.int32(stage)))
            own = 0 <= turn - stage < schedule.rounds * schedule.microbatches
            if own:
                seen.setdefault((microbatch, round_), []).append((turn, stage))
    for microbatch in range(schedule.microbatches):
        turns = [t for round_ in range(schedule.rounds) for t, _ in seen[microbatch, round_]]
        assert turns == list(range(turns[0], turns[0] + schedule.rounds * schedule.stages))
        for round_ in range(schedule.rounds):
            assert [stage for _, stage in seen[microbatch, round_]] == list(range(schedule.stages))


@pytest.mark.parametrize(
    ("rows", "pipeline", "microbatches"),
    [(32, PipelineConfig(), 8), (16, PipelineConfig(), 4), (96, PipelineConfig(), 8), (32, PipelineConfig(2), 2)],
)
def test_default_is_up_to_four_microbatches_per_stage(rows, pipeline, microbatches):
    model = with_pipeline(replace(DENSE, num_layers=4, pipeline=pipeline), rows, MESH, ShardingRules())
    assert model.pipeline.num_microbatches == microbatches


@pytest.mark.parametrize(
    ("layers", "rows", "pipeline", "message"),
    [
        (
            3,
            32,
            PipelineConfig(),
            r"mesh.stage=2: 3 layers cannot be split evenly over 2 pipeline stages .* valid mesh.stage .*8 devices: 1;",
        ),
        (6, 32, PipelineConfig(num_repeats=2), r"6 layers cannot be split .* model.pipeline.num_repeats=2;"),
        (
            4,
            32,
            PipelineConfig(3),
            r"model.pipeline.num_microbatches=3: must be a multiple of mesh.stage=2 .* valid: 2, 4, 8",
        ),
        (4, 8, PipelineConfig(4), r"divides the 2 rows of each of 4 data-parallel replicas; valid: 2"),
        (4, 32, PipelineConfig(num_repeats=0), r"num_repeats=0 must be at least 1"),
    ],
)
def test_indivisible_sizes_are_refused_with_valid_ones(layers, rows, pipeline, message):
    with pytest.raises(ValueError, match=message):
        with_pipeline(replace(DENSE, num_layers=layers, pipeline=pipeline), rows, MESH, ShardingRules())


def test_layers_of_a_stage_are_only_on_its_devices():
    config = replace(DENSE, num_layers=4)
    shapes = abstract_params(config)
    shardings = param_shardings(param_axes(config), shapes, MESH, ShardingRules())
    parts = jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape)[0], shapes, shardings)
    assert set(jax.tree.leaves(parts["layers"])) == {2}
