"""Multi-token prediction: modules that predict further tokens than the next (DeepSeek-V3 2024, section 2.2).

Module k reads, at each place, what the one before it has made of that place (the model's layers, for the first) and the
embedding of the token k places on; what it makes of both, through the model's own head, predicts the token k + 1 places
on. Embedding and head are shared, the rest is each module's own. Training reads them; writing and exports do not.

Shape letters: K modules, B batch, L length, D model, E twice D.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.forward_context import MTP_LAYER, Context, LayerFlags
from models.layers import Linear, Normalization
from models.logical_axes import RESIDUAL, TOKENS
from models.mup import final_norm_factor
from models.remat import remat

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
        after = self.block(x_BLD, context, layer, rng)  # type: ignore[operator]
        x_BLD = context.constrain(after.x_BLD, TOKENS)
        return x_BLD, self.final_norm(x_BLD), after.terms


def run_further(
    graph: Any,
    weights: Any,
    first: int,
    x_BLD: jax.Array,
    tokens_BL: jax.Array,
    embed: Callable[[jax.Array, jax.Array], jax.Array],
    context: Context,
    config: ModelConfig,
    rng: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """(hidden states for the head [K, B, L, D], sums of the experts' terms).

    `graph`, `weights`: of the modules, numbered from `first` on for random numbers. At the last places of a row and of
    each document they read tokens of what follows; the loss must mask these places.
    """
    layer = LayerFlags(*(jnp.asarray(x) for x in MTP_LAYER))

    def body(carried, scanned):
        x_BLD, tokens_BL, positions_BL = carried
        weights, index = scanned
        key = None if rng is None else jax.random.fold_in(rng, index)
        tokens_BL, positions_BL = (jnp.roll(x, -1, axis=1) for x in (tokens_BL, positions_BL))
        module = nnx.merge(graph, nnx.State(weights))
        x_BLD, hidden_BLD, terms = module(x_BLD, embed(tokens_BL, positions_BL), context, layer, key)
        return (x_BLD, tokens_BL, positions_BL), (hidden_BLD, terms)

    start = x_BLD, tokens_BL, context.positions
    scanned = weights, first + jnp.arange(len(jax.tree.leaves(weights)[0]))
    hidden_KBLD, terms = jax.lax.scan(remat(body, config, context.constrain.platform), start, scanned)[1]
    return hidden_KBLD, jax.tree.map(lambda leaf: leaf.sum(0), terms)
