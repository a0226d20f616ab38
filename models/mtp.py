"""Predicting further tokens than the next: DeepSeek-V3 (2024), section 2.2.

Module k reads, at each place, what the one before it has made of that place (the model's layers, for the first) and the
embedding of the token k places on; what it makes of both, through the model's own head, predicts the token k + 1 places
on. Embedding and head are shared, the rest is each module's own. Training reads them; writing and exports do not.

Shape letters: K modules, B batch, L length, D model, E twice D.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.layers import Linear, Normalization
from models.logical_axes import RESIDUAL, TOKENS
from models.mup import final_norm_factor

MTP = "further"  # their name in the tree of parameters, stacked on a leading `layers` dim


class MTPBlock(nnx.Module):
    """One module, around a block like the model's last one."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, block: nnx.Module):
        D = config.embed_dim
        norm = lambda start=1.0: Normalization(rngs, config, (D,), ("embed",), start=start)
        self.hidden_norm, self.embedding_norm = norm(), norm()
        self.final_norm = norm(final_norm_factor(config))
        self.projection = Linear(rngs, config, "BLE,ED->BLD", (2 * D, D), ("embed", "embed"), std=config.init_std)
        self.block = block

    def __call__(self, x_BLD: jax.Array, embedded_BLD: jax.Array, context, layer, rng):
        """(what the next module reads, what the head reads, terms of the block's experts)."""
        both_BLE = jnp.concatenate([self.hidden_norm(x_BLD), self.embedding_norm(embedded_BLD)], axis=-1)
        x_BLD = context.constrain(self.projection(both_BLE), RESIDUAL)
        x_BLD, _, terms, _ = self.block(x_BLD, context, layer, None, rng)  # type: ignore[operator]
        x_BLD = context.constrain(x_BLD, TOKENS)
        return x_BLD, self.final_norm(x_BLD), terms
