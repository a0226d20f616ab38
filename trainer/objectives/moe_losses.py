"""Auxiliary losses and router metrics of mixture-of-experts models."""

import jax
import jax.numpy as jnp

from models.transformer import ModelOutput


def auxiliary_terms(output: ModelOutput, shape: tuple[int, int]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (auxiliary loss per token, router metrics by name), each [B, L] = `shape`; zero and none without experts.

    The terms of a row are means over its tokens. Broadcasting them to tokens weights them by the loss mask and divides
    by its denominator: a row without tokens in the loss does not contribute.
    """
    broadcast = lambda values_B: jnp.broadcast_to(values_B[:, None], shape)
    terms = output.auxiliary
    if terms is None:
        return jnp.zeros((1, 1)), {}
    return broadcast(terms.loss_B), {name: broadcast(values_B) for name, values_B in terms.metrics.items()}
