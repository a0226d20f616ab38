"""What a layer keeps for its backward pass, by name, and what it makes anew: the menu of `model.remat`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.ad_checkpoint

from models.config import SAVED_NAMES, Dtype, ModelConfig, Remat
from models.cpu_workarounds import from_bits, to_bits


def checkpoint_name(name: str, x: jax.Array) -> jax.Array:
    """x, as what a layer may keep under this name. In the forward rule of a `custom_vjp`: `checkpoint_name_fwd`."""
    return _checkpoint_name(name, x)  # type: ignore[return-value]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _checkpoint_name(name: str, x: jax.Array) -> jax.Array:
    return x


def checkpoint_name_fwd(name: str, x: jax.Array) -> jax.Array:
    """`checkpoint_name`, without a gradient.

    bf16 is kept as its bits: XLA's CPU backend writes no bf16 into a stack, but converts the stack of all layers to f32
    and back for each layer.
    """
    return from_bits(checkpoint_name(to_bits(x), name))


_checkpoint_name.defvjp(lambda name, x: (checkpoint_name_fwd(name, x), None), lambda name, _, dy: (dy,))


def remat(body: Callable[..., Any], config: ModelConfig, platform: str) -> Callable[..., Any]:
    """`body`, a layer in a scan, with a backward pass from what `config.remat` keeps, and from where it is kept."""
    in_bits = platform == "cpu" and config.dtype is Dtype.bfloat16
    if config.remat is Remat.none and not in_bits:
        return body
    names, away = (*SAVED_NAMES[config.remat], "border"), [name.name for name in config.activation_offload]
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name in names if name not in away],
        names_which_can_be_offloaded=away,
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
