"""Synchronizes reference models with the policy, as in TR-DPO (Gorbatovski et al. 2024 [2404.09656], eq. 4).

The copies are part of the optimizer state, like parameter averages: they are checkpointed, restored bit for bit and
sharded like the parameters.
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
    """NamedTuple of `inner` (state of the inner optimizer) and one copy of the parameters per role."""


@lru_cache
def _state_type(roles: tuple[str, ...]) -> Any:
    # One field per role: checkpoints name each copy by its role.
    return type("SyncState", (ReferenceSyncState, namedtuple("SyncState", ("inner", *roles))), {})


def with_reference_sync(
    optimizer: optax.GradientTransformation, syncs: Mapping[str, Sync]
) -> optax.GradientTransformation:
    """Extends `optimizer` by one copy of the parameters per role, updated on the schedule of its `Sync`.

    Each copy starts with the parameters passed to `init`. `update` requires `step=`. Without roles, returns
    `optimizer` itself.
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

        def synced(role: str, sync: Sync) -> Params:
            due = (step + 1) % sync.every == 0
            mix = lambda old, new: jnp.where(due, (1 - sync.share) * old + sync.share * new, old).astype(old.dtype)
            return jax.tree.map(mix, getattr(state, role), policy)

        return updates, state_type(inner_state, *(synced(role, sync) for role, sync in syncs.items()))

    return optax.GradientTransformationExtraArgs(init, update)


def reference_from_state(opt_state: Any) -> dict[str, Params]:
    """Returns the parameter copies in this optimizer state by role."""
    if not isinstance(opt_state, ReferenceSyncState):
        return {}
    _, *roles = opt_state._fields  # type: ignore[attr-defined]
    return {role: on_device(getattr(opt_state, role)) for role in roles}
