"""Multi-token prediction (MTP): modules that predict tokens beyond the next one (DeepSeek-V3 2024, section 2.2).

At each position, module k reads the hidden state of the previous module (for the first, of the model) and the
embedding of the token k positions ahead, and predicts the token k + 1 positions ahead through the model's head.
Embedding and head are shared; the other parameters are separate. Only training uses the modules; generation and export
do not.

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

MTP = "mtp"  # their name in the parameter tree, stacked on a leading `layers` dim


class MTPBlock(nnx.Module):
    """One module: norms and a projection before a block like the last one of the model."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, block: nnx.Module):
        D = config.embed_dim
        norm = lambda start=1.0: Normalization(rngs, config, (D,), ("embed",), start=start)
        self.hidden_norm, self.embedding_norm = norm(), norm()
        self.final_norm = norm(final_norm_factor(config))
        self.projection = Linear(rngs, config, "BLE,ED->BLD", (2 * D, D), ("embed", "embed"), std=config.init_std)
        self.block = block

    def __call__(self, x_BLD: jax.Array, embedded_BLD: jax.Array, context, layer, rng):
        """Returns (input of the next module, input of the head, auxiliary terms of the experts)."""
        both_BLE = jnp.concatenate([self.hidden_norm(x_BLD), self.embedding_norm(embedded_BLD)], axis=-1)
        x_BLD = context.constrain(self.projection(both_BLE), RESIDUAL)
        after = self.block(x_BLD, context, layer, rng)  # type: ignore[operator]
        x_BLD = context.constrain(after.x_BLD, TOKENS)
        return x_BLD, self.final_norm(x_BLD), after.terms


def run_mtp(
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
    """Returns (hidden states for the head [K, B, L, D], sums of the experts' auxiliary terms).

    `graph`, `weights`: of the modules, with random keys numbered from `first`. At the last positions of a row and of
    each document they read tokens of the next document; the loss must mask these positions.
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
