"""Building blocks of a layer compared with their definitions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.matmul import einsum_f32

SPECS = ["BLD,DF->BLF", "BLD,DNH->BLNH", "BLNH,NHD->BLD", "BKGLH,BKSH->BKGLS", "BKGLS,BKSH->BKGLH", "BLS,SG->BLG"]


@pytest.mark.parametrize("spec", SPECS)
def test_einsum_f32_has_the_gradients_of_einsum(spec):
    sizes = dict(zip("BLSDFNKGH", (2, 3, 5, 4, 6, 2, 2, 3, 4), strict=True))
    dims, (left, right) = spec.split("->")[0].split(","), jax.random.split(jax.random.key(0))
    a = jax.random.normal(left, [sizes[d] for d in dims[0]])
    b = jax.random.normal(right, [sizes[d] for d in dims[1]])
    ours = jax.grad(lambda a, b: jnp.sum(jnp.sin(einsum_f32(spec, a, b, a.dtype))), argnums=(0, 1))(a, b)
    plain = jax.grad(lambda a, b: jnp.sum(jnp.sin(jnp.einsum(spec, a, b))), argnums=(0, 1))(a, b)
    for x, y in zip(ours, plain, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_heads_and_head_dim_are_merged_in_a_matmul():
    """For a contraction over two dims XLA would transpose both operands."""
    for spec in ("BLD,DNH->BLNH", "BLNH,NHD->BLD"):
        shapes = {"BLD": (2, 3, 32), "DNH": (32, 4, 8), "BLNH": (2, 3, 4, 8), "NHD": (4, 8, 32)}
        a, b = (jnp.ones(shapes[dims]) for dims in spec.split("->")[0].split(","))
        of = jax.jit(jax.grad(lambda a, b, spec=spec: jnp.sum(jnp.sin(einsum_f32(spec, a, b, a.dtype)))))
        dots = [line for line in of.lower(a, b).as_text().splitlines() if "dot_general" in line]
        assert len(dots) == 2 and all(re.search(r"contracting_dims = \[\d\] x \[\d\]", line) for line in dots)


def test_gradients_of_master_weights_are_not_rounded():
    x, weights = jnp.ones((1, 257, 1), jnp.bfloat16), jnp.ones((1, 1))
    grad = jax.grad(lambda w: jnp.sum(einsum_f32("BLD,DF->BLF", x, w, x.dtype).astype(jnp.float32)))(weights)
    assert grad.dtype == jnp.float32 and grad[0, 0] == 257  # bf16 has no 257
