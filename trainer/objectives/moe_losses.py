"""What a mixture of experts adds to any loss over tokens."""

import jax
import jax.numpy as jnp

from models.transformer import ModelOutput


def auxiliary_terms(output: ModelOutput, shape: tuple[int, int]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What to add to the loss of each token, and the router's metrics by name, each [B, L] as `shape` says.

    A row's terms are means over its tokens. Laid on each token of the row, they are weighed by the loss's own mask
    and stand on its denominator: a row of which nothing is learnt adds nothing. Zero and none without experts.
    """
    spread = lambda values_B: jnp.broadcast_to(values_B[:, None], shape)
    terms = output.auxiliary
    if terms is None:
        return jnp.zeros((1, 1)), {}
    return spread(terms.loss_B), {name: spread(values_B) for name, values_B in terms.metrics.items()}
