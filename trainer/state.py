"""Everything that changes while a run goes on, and how it comes to lie on a mesh."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from trainer.host_offload import in_host_memory
from trainer.mesh import partition, replicated, with_shardings

Params = Any  # a nested dict of arrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds of the core. The same four fields carry arrays, shapes or shardings."""

    step: jax.Array  # [] i32: updates done
    params: Params  # f32 master weights
    opt_state: Any  # moments, averages: whatever the optimizer keeps
    rng: jax.Array  # [] typed key, the same all run long: step s uses fold_in(rng, s)


def make_state(
    init_params: Callable[..., Params], optimizer: optax.GradientTransformation, key: jax.Array, *reads: Any
) -> TrainState:
    """A fresh state at step 0, from one typed key, and what `init_params` reads beside it."""
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
    """The state as `jax.ShapeDtypeStruct`s with shardings: what a plan compiles and a restore fills.

    `offload`: what the optimizer keeps lies in the memory of the host.
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
    """A fresh state, each device computing its own pieces only; the same bits on every mesh."""
    abstract = abstract_state(init_params, optimizer, *reads, param_shardings=param_shardings, offload=offload)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = lambda key, *reads: make_state(init_params, optimizer, key, *reads)
    return jax.jit(make, out_shardings=shardings)(key, *reads)


def state_shardings(state: TrainState, param_shardings: Any) -> TrainState:
    """Shardings for a state of arrays or shapes, the optimizer's following those of its parameters."""
    whole = replicated(jax.tree.leaves(param_shardings)[0].mesh)
    return TrainState(
        step=whole,
        params=param_shardings,
        opt_state=_opt_state_shardings(state.opt_state, state.params, param_shardings, whole),
        rng=whole,
    )


def _opt_state_shardings(opt_state: Any, params: Params, param_shardings: Any, whole: NamedSharding) -> Any:
    """`jax.jit(optimizer.init)` alone would leave all moments whole on each device, silently.

    A leaf belongs to the parameter whose path its own path ends with. Dims of the parameter's size are cut as
    the parameter is; dims that were reduced to 1, and dims that follow the parameter's own, stay whole.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    owners = {path: (leaf.shape, s) for (path, leaf), s in zip(flat, jax.tree.leaves(param_shardings), strict=True)}

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The longest ending: with parameters `w` and `a/w`, the moment `mu/a/w` is of `a/w`.
        owner = next((owners[path[i:]] for i in range(len(path)) if path[i:] in owners), None)
        if owner is None:
            return whole
        shape, param_sharding = owner
        dims = leaf.shape[: len(shape)]
        if len(dims) != len(shape) or any(d not in (1, s) for d, s in zip(dims, shape, strict=True)):
            return whole
        spec = (*param_sharding.spec, *[None] * len(shape))
        kept = [axes if d == s else None for d, s, axes in zip(dims, shape, spec, strict=False)]
        return NamedSharding(whole.mesh, partition(*kept))

    return jax.tree_util.tree_map_with_path(sharding, opt_state)
