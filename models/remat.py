"""Activation checkpointing: names of saved activations and the policies of `model.remat`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.ad_checkpoint

from models.config import CHECKPOINT_NAMES, SAVED_NAMES, Dtype, ModelConfig, Remat
from models.cpu_workarounds import from_bits, to_bits


def checkpoint_name(name: str, x: jax.Array) -> jax.Array:
    """Names x for the remat policy. In the forward rule of a `custom_vjp`, use `checkpoint_name_fwd`.

    Raises: ValueError for a name that is not in `CHECKPOINT_NAMES`.
    """
    _check_name(name)
    return _checkpoint_name(name, x)  # type: ignore[return-value]


def _check_name(name: str) -> None:
    if name not in CHECKPOINT_NAMES:
        raise ValueError(f"checkpoint name {name!r}: no remat policy saves it; known: {', '.join(CHECKPOINT_NAMES)}")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _checkpoint_name(name: str, x: jax.Array) -> jax.Array:
    return x


def checkpoint_name_fwd(name: str, x: jax.Array) -> jax.Array:
    """`checkpoint_name` without a gradient rule.

    bf16 is saved as u16 bits: when XLA's CPU backend writes bf16 into the array that stacks all layers, it converts the
    full array to f32 and back for each layer.
    """
    _check_name(name)
    return from_bits(jax.ad_checkpoint.checkpoint_name(to_bits(x), name))


_checkpoint_name.defvjp(lambda name, x: (checkpoint_name_fwd(name, x), None), lambda name, _, dy: (dy,))


def remat(body: Callable[..., Any], config: ModelConfig, platform: str) -> Callable[..., Any]:
    """Wraps `body`, a layer of a scan, in `jax.checkpoint` with the policy of `config.remat` and its offloading."""
    in_bits = platform == "cpu" and config.dtype is Dtype.bfloat16
    if config.remat is Remat.none and not in_bits:
        return body
    names, offloaded = ("layer_input", *SAVED_NAMES[config.remat]), [name.name for name in config.activation_offload]
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name in names if name not in offloaded],
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
