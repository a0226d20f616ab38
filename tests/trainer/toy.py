"""A minimal model with the interface of a real one, and batches for it.

Shape letters: B batch, L length, D model, F mlp, V vocab.
"""

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import TokenBatch
from models.transformer import ModelOutput

V, D, F, L = 32, 8, 16, 8

AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "layers": {
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
        "scale": ("layers", "embed"),
    },
}


def init_params(key: jax.Array, num_layers: int = 2) -> dict:
    keys = jax.random.split(key, 4)
    return {
        "embedding": jax.random.normal(keys[0], (V, D)),
        "head": jax.random.normal(keys[1], (D, V)) / D**0.5,
        "layers": {
            "up": jax.random.normal(keys[2], (num_layers, D, F)) / D**0.5,
            "down": jax.random.normal(keys[3], (num_layers, F, D)) / F**0.5,
            "scale": jnp.ones((num_layers, D)),
        },
    }


def apply(params, tokens_BL, *, positions_BL, segment_ids_BL, rng=None) -> ModelOutput:
    x_BLD = params["embedding"][tokens_BL]
    if rng is not None:  # makes a step depend on its key, as dropout does
        x_BLD = x_BLD * (1 + 1e-3 * jax.random.normal(rng, (D,))[None, None])

    def layer(x_BLD, weights):
        h_BLF = jnp.tanh(jnp.einsum("BLD,DF->BLF", x_BLD, weights["up"]))
        return x_BLD * weights["scale"][None, None] + jnp.einsum("BLF,FD->BLD", h_BLF, weights["down"]), None

    x_BLD, _ = jax.lax.scan(layer, x_BLD, params["layers"])
    return ModelOutput(x_BLD, params["head"], None)


def without_noise(params, tokens_BL, *, positions_BL, segment_ids_BL, rng=None) -> ModelOutput:
    return apply(params, tokens_BL, positions_BL=positions_BL, segment_ids_BL=segment_ids_BL)


def batch(rows: int, seed: int = 0) -> TokenBatch:
    """Random tokens with a random number of target tokens per row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (rows, L + 1)).astype(np.int32)
    num_targets = rng.integers(0, L + 1, (rows, 1))
    mask = (np.arange(L)[None] < num_targets).astype(np.float32)
    ones = np.ones((rows, L), np.int32)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, ones, np.cumsum(ones, 1, dtype=np.int32) - 1)
