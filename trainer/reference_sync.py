"""Frozen models that follow the policy, such as the reference of TR-DPO (Gorbatovski et al. 2024 [2404.09656], eq. 4).

They live in the optimizer state, as averages do: checkpoints hold them, a resumed run has the same ones to the bit, and
they are sharded as the parameters are.
"""

from collections import namedtuple
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.host_offload import on_device
from trainer.objective import Params, Sync


class ReferenceSyncState:
    """A NamedTuple of `inner`, the state of the optimizer inside, and one copy of the parameters for each role."""


@lru_cache
def _state_type(roles: tuple[str, ...]) -> Any:
    # A field for each role, so that a checkpoint names each copy by its role.
    return type("MovingState", (ReferenceSyncState, namedtuple("MovingState", ("inner", *roles))), {})


def with_moving_models(
    optimizer: optax.GradientTransformation, syncs: Mapping[str, Sync]
) -> optax.GradientTransformation:
    """`optimizer`, and for each role a copy of the parameters that follows them as its `Sync` says.

    Each starts as the weights that the state is made with. `update` needs `step=`. Without roles: `optimizer` itself.
    """
    if not syncs:
        return optimizer
    inner, state_type = optax.with_extra_args_support(optimizer), _state_type(tuple(syncs))

    def init(params: Params) -> Any:
        return state_type(inner.init(params), *(jax.tree.map(jnp.array, params) for _ in syncs))

    def update(
        grads: Params, state: Any, params: Params | None = None, *, step: jax.Array, update_applied=True, **more: Any
    ):
        assert params is not None
        updates, inner_state = inner.update(
            grads, state.inner, params, step=step, update_applied=update_applied, **more
        )
        policy = optax.tree.where(update_applied, optax.apply_updates(params, updates), params)  # see `scale_by_adam`

        def followed(role: str, sync: Sync) -> Params:
            moves = (step + 1) % sync.every == 0
            follow = lambda old, new: jnp.where(moves, (1 - sync.share) * old + sync.share * new, old).astype(old.dtype)
            return jax.tree.map(follow, getattr(state, role), policy)

        return updates, state_type(inner_state, *(followed(role, sync) for role, sync in syncs.items()))

    return optax.GradientTransformationExtraArgs(init, update)


def reference_from_state(opt_state: Any) -> dict[str, Params]:
    """The models in this state by role, as a loss reads them."""
    if not isinstance(opt_state, ReferenceSyncState):
        return {}
    _, *roles = opt_state._fields  # type: ignore[attr-defined]
    return {role: on_device(getattr(opt_state, role)) for role in roles}
