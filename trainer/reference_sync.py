"""A reference that follows its policy from afar (TR-DPO, Gorbatovski et al. 2024 [2404.09656], equation 4).

It is kept as an optimizer keeps its averages: in the state, so that checkpoints hold it and a run that goes on has the
same one to the bit, and cut as the parameters are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.host_offload import on_device
from trainer.objective import REFERENCE, Params


class ReferenceSyncState(NamedTuple):
    inner: Any  # of the optimizer around which it stands
    reference: Params


def sync_reference(
    optimizer: optax.GradientTransformation, *, every: int, share: float
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, and after every so many updates reference <- (1 - share) reference + share policy.

    The reference begins as the weights that the state is made with. `update` needs `step=`.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> ReferenceSyncState:
        return ReferenceSyncState(inner.init(params), jax.tree.map(jnp.array, params))

    def update(
        grads: Params, state: Any, params: Params | None = None, *, step: jax.Array, update_applied=True, **more: Any
    ):
        assert params is not None
        updates, inner_state = inner.update(
            grads, state.inner, params, step=step, update_applied=update_applied, **more
        )
        moves = (step + 1) % every == 0
        follow = lambda ref, new: jnp.where(moves, (1 - share) * ref + share * new, ref).astype(ref.dtype)
        policy = optax.tree.where(update_applied, optax.apply_updates(params, updates), params)  # see `scale_by_adam`
        return updates, ReferenceSyncState(inner_state, jax.tree.map(follow, state.reference, policy))

    return optax.GradientTransformationExtraArgs(init, update)


def reference_from_state(opt_state: Any) -> dict[str, Params]:
    """The models that move with the run, by the name under which a loss reads them."""
    return {REFERENCE: on_device(opt_state.reference)} if isinstance(opt_state, ReferenceSyncState) else {}
