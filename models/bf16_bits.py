"""bf16 kept as its bits while single rows of an array are written or looked up.

XLA's CPU backend would convert the whole array to f32, and back, for one row.
"""

import jax
import jax.numpy as jnp


def to_bits(x: jax.Array) -> jax.Array:
    """u16 for bf16; every other dtype as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
