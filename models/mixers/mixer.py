"""The interface of a sequence mixer and of its cache.

To add a mixer: subclass `Mixer` in a file of this folder, add it to `MIXERS` in `models.mixers.mixer_registry`, and let
`mixer_kind` there return its name for the layers that use it.

Shape letters: B batch, L length, S key length, D model, N query heads.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
from flax import nnx

from models.config import ModelConfig
from models.forward_context import Context, LayerFlags
from models.logical_axes import ShardingConstraint

IDLE = 2**30  # the position of padding and of idle rows in decoding: beyond every cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What decoding remembers of the tokens so far: one entry per layer, each of its mixer's own type.

    An entry is a pytree of arrays with a leading dim of rows, one row per sequence. Three rules hold for all mixers:

    1. A token at a position of `capacity` or more is padding (`context.segments` is 0 there): it changes nothing.
    2. A token at position 0 starts a new sequence: earlier contents of its row must not reach it.
    3. Tokens of a row come in order, without gaps. Where `Mixer.rewindable`, they may also continue from any earlier
       position; later contents of the row must not reach them.
    """

    layers: tuple[Any, ...]
    capacity: int = field(metadata={"static": True})  # positions per row


def copy_row(cache: Cache, origin: jax.Array, target: jax.Array) -> Cache:
    """The cache with row `target` overwritten by row `origin`."""
    return jax.tree.map(lambda x: x.at[target].set(x[origin]), cache)


class Mixer(nnx.Module):
    """A sequence mixer of one layer; parameters are created by `__init__` and named there with their axes."""

    rewindable: ClassVar[bool]  # the cache holds each position apart, so any prefix of a row can be reused

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, out_std: float):
        """`out_std`: standard deviation of the output projection at initialization."""
        raise NotImplementedError

    def __call__(
        self, x_BLD: jax.Array, context: Context, layer: LayerFlags, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Mixes packed rows: (output [B, L, D], attention weights [B, N, L, S] where `context` asks for them)."""
        raise NotImplementedError

    def step(self, x_BLD: jax.Array, cache: Any, context: Context, layer: LayerFlags) -> tuple[jax.Array, Any]:
        """Mixes new tokens with cached ones: (output [B, L, D], cache). See `Cache` for the rules.

        Row i of the batch is row `context.first_row + i` of the cache.
        """
        raise NotImplementedError

    @classmethod
    def init_cache(cls, config: ModelConfig, rows: int, capacity: int, constrain: ShardingConstraint) -> Any:
        """An empty cache of one layer, in the dtype that `config` computes with."""
        raise NotImplementedError

    @classmethod
    def flops_per_token(cls, config: ModelConfig, layer: LayerFlags, seq_len: int) -> float:
        """Forward FLOPs of a token other than matmuls with weights, on average over a row of `seq_len`."""
        raise NotImplementedError
