"""Pipeline parallelism: each stage holds some of the layers, and microbatches pass through all stages.

One program over arrays with a leading stage dim, as in GSPMD (Xu et al. 2021 [2105.04663], section 3.3): in each turn
every stage runs its layers on its microbatch, then all microbatches move to the next stage. The backward pass is the
derivative of that loop. With R rounds a stage holds R groups of layers: the interleaved schedule of Narayanan et al.
2021 [2104.04473], section 2.2, which has a smaller bubble.

Shape letters: S stages, M microbatches, R rounds, B rows of the batch, b rows of a microbatch.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.config import ModelConfig, PipelineConfig, Remat
from models.logical_axes import ShardingConstraint, no_constraint
from models.remat import remat


class Schedule(NamedTuple):
    """The pipeline schedule. Groups of S microbatches finish all rounds one after the other."""

    stages: int
    rounds: int
    microbatches: int  # a multiple of `stages`

    @property
    def turns(self) -> int:
        return self.rounds * self.microbatches + self.stages - 1

    @property
    def description(self) -> str:
        waiting = (self.stages - 1) / self.turns  # the pipeline bubble
        return f"{self.microbatches} microbatches in {self.rounds} rounds; the bubble is {waiting:.0%} of the time"

    def at(self, turn: jax.Array, stage: Any) -> tuple[jax.Array, jax.Array]:
        """Returns (microbatch, round) of a stage; before its first and after its last turn they repeat as padding."""
        done = jnp.clip(turn - stage, 0, self.rounds * self.microbatches - 1)
        group, rest = jnp.divmod(done, self.stages * self.rounds)
        round_, place = jnp.divmod(rest, self.stages)
        return group * self.stages + place, round_


def schedule_over(config: PipelineConfig, constrain: ShardingConstraint) -> Schedule | None:
    """Returns the schedule; None with one stage."""
    return None if constrain.stages == 1 else Schedule(constrain.stages, config.num_repeats, config.num_microbatches)


def schedule_of(
    config: PipelineConfig, constrain: ShardingConstraint, num_rows: int, num_layers: int
) -> Schedule | None:
    """Returns the schedule; None if all devices run all layers: with one stage, or if rows or layers do not divide.

    The latter occurs for evaluation batches of any size; training batches are checked at start-up.
    """
    shown = constrain.shown_stages
    rows = num_rows * (constrain.stages // shown)
    if constrain.stages == 1 or not config.num_microbatches:
        return None
    if (
        rows % config.num_microbatches
        or num_layers % (shown * config.num_repeats)
        or config.num_microbatches % constrain.stages
    ):
        return None
    return schedule_over(config, constrain)


def run_in_stages(
    schedule: Schedule,
    constrain: ShardingConstraint,
    layers: Callable[..., Any],
    again: Callable[[Callable[..., Any]], Callable[..., Any]],
    scanned: Any,
    moving: Any,
    fixed: Any,
) -> Any:
    """Runs all layers in pipeline stages and returns `moving`; its leaves and those of `fixed` are [B, ...].

    `layers(constrain, scanned, moving, fixed, microbatch)` runs consecutive layers, with their slice of `scanned`
    (leaves [layers, ...]), on the rows of one microbatch. `again` applies remat to the work of a stage in a turn.
    """
    S, R, M = constrain.shown_stages, schedule.rounds, schedule.microbatches
    copies = schedule.stages // S  # a share of the program holds the rows of one stage only
    rows = jax.tree.leaves(moving)[0].shape[0]

    def by_stage(x: jax.Array) -> jax.Array:  # [S, R, layers of a round, ...]
        return constrain.along_stages(jnp.moveaxis(x.reshape(R, S, -1, *x.shape[1:]), 1, 0))

    def in_microbatches(x: jax.Array) -> jax.Array:  # [S, M, b, ...]: row i of microbatch m is i M + m
        x = jnp.concatenate([x] * copies) if copies > 1 else x
        # A device's rows are consecutive, so every microbatch lies on all devices of a stage.
        x = x.reshape(-1, M, *x.shape[1:]).swapaxes(0, 1)
        return constrain.along_stages(jnp.broadcast_to(x[None], (S, *x.shape)))

    scanned = jax.tree.map(by_stage, scanned)
    entering = jax.tree.map(in_microbatches, (moving, fixed))
    stage_S = jnp.arange(S)

    def turn(carried: Any, now: jax.Array) -> tuple[Any, None]:
        here, left = carried
        microbatch_S, round_S = schedule.at(now, stage_S)
        # Recomputed on every stage: slicing the values of all stages would need communication.
        entered, first_round = schedule.at(now, 0)
        begins_S = (stage_S == 0) & (first_round == 0)
        next_one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, entered, 1, False), entering)

        def arrived(x: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(begins_S.reshape(S, *[1] * (x.ndim - 1)), new, jnp.roll(x, 1, axis=0))

        moving, fixed = jax.tree.map(arrived, here, next_one)

        def stage(
            constrain: ShardingConstraint, scanned: Any, moving: Any, fixed: Any, microbatch: Any, round_: Any
        ) -> Any:
            of_round = lambda x: x[0] if R == 1 else jax.lax.dynamic_index_in_dim(x, round_, 0, False)
            return layers(constrain, jax.tree.map(of_round, scanned), moving, fixed, microbatch)

        one = lambda constrain, *args: again(partial(stage, constrain))(*args)
        moving = constrain.vmap_stages(one, scanned, moving, fixed, microbatch_S, round_S)
        # All stages write where the last one must: what the others leave there is read by nobody.
        last, _ = schedule.at(now, schedule.stages - 1)
        left = jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, last, 1), left, moving)
        return ((moving, fixed), left), None

    empty = jax.tree.map(lambda x: constrain.along_stages(jnp.zeros_like(x)), entering)
    start = jax.tree.map(lambda x: x[:, 0], empty), empty[0]
    (_, left), _ = jax.lax.scan(turn, start, jnp.arange(schedule.turns))
    return jax.tree.map(lambda x: x[S - 1].swapaxes(0, 1).reshape(-1, *x.shape[3:])[:rows], left)


def run_layers_in_stages(
    schedule: Schedule,
    run_layers: Callable[..., Any],
    config: ModelConfig,
    constrain: ShardingConstraint,
    scanned: Any,
    stream: Any,
    rows: Any,
    rng: jax.Array | None,
) -> Any:
    """`run_layers(config, constrain, scanned, stream, rows, rng)` with the layers on stages.

    `stream`: a `models.transformer.Stream`. Random numbers differ from those of a run without stages.
    """
    again = lambda stage: stage
    inner = config
    if schedule.rounds > 1:  # not layer by layer: the weights of a round, cut out in each turn, would be saved for each
        again = partial(remat, config=config, platform=constrain.platform)
        inner = replace(config, remat=Remat.none)
    rows_first = lambda buffers: jax.tree.map(lambda buffer: buffer.swapaxes(0, 1), buffers)  # [P, B, ...], and back
    turned = lambda stream: stream._replace(captures=rows_first(stream.captures))

    def layers(constrain: ShardingConstraint, scanned: Any, moving: Any, rows: Any, microbatch: jax.Array) -> Any:
        key = None if rng is None else jax.random.fold_in(rng, microbatch)
        after = run_layers(inner, constrain, scanned, turned(moving), rows, key)
        return turned(after)._replace(terms=jax.tree.map(jnp.add, moving.terms, after.terms))

    terms = jax.eval_shape(partial(run_layers, inner, no_constraint), scanned, stream, rows, rng).terms
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), terms)  # None without experts
    moving = turned(stream)._replace(terms=zeros)
    return turned(run_in_stages(schedule, constrain, layers, again, scanned, moving, rows))
