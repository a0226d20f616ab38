"""Train state: parameters, optimizer state, step and PRNG key, and its sharding over a mesh."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from trainer.host_offload import in_host_memory
from trainer.sharding import partition, replicated, with_shardings

Params = Any  # a nested dict of arrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training updates. The fields hold arrays, shapes or shardings."""

    step: jax.Array  # [] i32: updates done
    params: Params  # f32 master weights
    opt_state: Any  # optimizer state, such as moments and averages
    rng: jax.Array  # [] typed key, constant over the run: step s uses fold_in(rng, s)


def make_state(
    init_params: Callable[..., Params], optimizer: optax.GradientTransformation, key: jax.Array, *reads: Any
) -> TrainState:
    """Initializes a state at step 0 from one typed key. `reads`: further arguments of `init_params`."""
    init_key, rng = jax.random.split(key)
    params = init_params(init_key, *reads)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), rng=rng)


def abstract_state(
    init_params: Callable[..., Params],
    optimizer: optax.GradientTransformation,
    *reads: Any,
    param_shardings: Any,
    offload: bool = False,
) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct`s with shardings, for ahead-of-time compilation and restores.

    `offload`: the optimizer state is in host memory.
    """
    make = lambda key, *reads: make_state(init_params, optimizer, key, *reads)
    shapes = jax.eval_shape(make, jax.random.key(0), *reads)
    shardings = state_shardings(shapes, param_shardings)
    if offload:
        shardings = replace(shardings, opt_state=in_host_memory(shapes.opt_state, shardings.opt_state))
    return with_shardings(shapes, shardings)


def init_sharded_state(
    init_params: Callable[..., Params],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *reads: Any,
    param_shardings: Any,
    offload: bool = False,
) -> TrainState:
    """Initializes a sharded state; each device computes only its own shards. Bit-identical on every mesh."""
    abstract = abstract_state(init_params, optimizer, *reads, param_shardings=param_shardings, offload=offload)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = lambda key, *reads: make_state(init_params, optimizer, key, *reads)
    return jax.jit(make, out_shardings=shardings)(key, *reads)


def state_shardings(state: TrainState, param_shardings: Any) -> TrainState:
    """Returns shardings for a state of arrays or shapes; optimizer state is sharded like its parameters."""
    unsharded = replicated(jax.tree.leaves(param_shardings)[0].mesh)
    return TrainState(
        step=unsharded,
        params=param_shardings,
        opt_state=_opt_state_shardings(state.opt_state, state.params, param_shardings, unsharded),
        rng=unsharded,
    )


def _opt_state_shardings(opt_state: Any, params: Params, param_shardings: Any, unsharded: NamedSharding) -> Any:
    """Shards optimizer state like its parameters; `jax.jit(optimizer.init)` alone would silently replicate it.

    A leaf belongs to the parameter whose path is a suffix of its own path. Dims of the parameter's size are sharded
    like the parameter. Dims reduced to 1 and additional trailing dims are unsharded.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    owners = {path: (leaf.shape, s) for (path, leaf), s in zip(flat, jax.tree.leaves(param_shardings), strict=True)}

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The longest suffix: with parameters `w` and `a/w`, the moment `mu/a/w` belongs to `a/w`.
        owner = next((owners[path[i:]] for i in range(len(path)) if path[i:] in owners), None)
        if owner is None:
            return unsharded
        shape, param_sharding = owner
        dims = leaf.shape[: len(shape)]
        if len(dims) != len(shape) or any(d not in (1, s) for d, s in zip(dims, shape, strict=True)):
            return unsharded
        spec = (*param_sharding.spec, *[None] * len(shape))
        entries = [axes if d == s else None for d, s, axes in zip(dims, shape, spec, strict=False)]
        return NamedSharding(unsharded.mesh, partition(*entries))

    return jax.tree_util.tree_map_with_path(sharding, opt_state)
