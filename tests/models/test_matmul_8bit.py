"""8-bit matmuls: exact if 8 bits are sufficient, close otherwise, and a model that trains with them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.config import AttentionConfig, Dtype, MatmulPrecision, MLAConfig, MLPConfig, ModelConfig
from models.matmul import einsum_f32
from models.quantization.matmul_8bit import FORMATS, quantized_einsum
from models.transformer import init_params, logits, make_apply

SPECS = ("BLD,DNH->BLNH", "BLNH,NHD->BLD", "BLD,DF->BLF")
KINDS = [MatmulPrecision.int8, MatmulPrecision.fp8]
B, L = 2, 5
TINY = ModelConfig(
    num_layers=2, embed_dim=32, vocab_size=37, dtype=Dtype.float32, attention=AttentionConfig(4, 2, 8),
    mlp=MLPConfig(48), init_std=0.2,
)  # fmt: skip


def sides(spec, rng):
    sizes = dict(zip("BLDNHF", (B, L, 16, 4, 8, 24), strict=True))
    a_dims, b_dims = spec.split("->")[0].split(",")
    return [jnp.asarray(rng.standard_normal([sizes[d] for d in dims]), jnp.float32) for dims in (a_dims, b_dims)]


def by_hand(spec, a, b, kinds):
    """Reference in f64, with each row and column quantized separately."""
    a_dims, b_dims = spec.split("->")[0].split(",")
    rounded = []
    for x, dims, form in zip((a, b), (a_dims, b_dims), kinds, strict=True):
        axes = tuple(i for i, d in enumerate(dims) if d in a_dims and d in b_dims)
        x = np.asarray(x, np.float32)
        scale = np.abs(x).max(axes, keepdims=True) / np.float32(form.largest)
        codes = x / scale
        codes = np.round(codes) if form.dtype == np.int8 else codes.astype(form.dtype).astype(np.float64)
        rounded.append(codes.astype(np.float64) * scale)
    return np.einsum(spec, *rounded)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("spec", SPECS)
def test_products_and_gradients_are_those_of_rounded_sides(spec, kind):
    rng = np.random.default_rng(0)
    a, b = sides(spec, rng)
    form, form_of_gradients = FORMATS[kind]
    y, pull = jax.vjp(lambda a, b: quantized_einsum(kind, spec, a, b), a, b)
    np.testing.assert_allclose(y, by_hand(spec, a, b, (form, form)), rtol=1e-5, atol=1e-5)
    dy = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    da, db = pull(dy)
    a_dims, b_dims, y_dims = spec.replace("->", ",").split(",")
    want = by_hand(f"{y_dims},{b_dims}->{a_dims}", dy, b, (form_of_gradients, form))
    np.testing.assert_allclose(da, want, rtol=1e-5, atol=1e-4)
    exact = jax.vjp(lambda b: einsum_f32(spec, a, b, a.dtype), b)[1](dy)[0]
    np.testing.assert_array_equal(db, exact)  # weight gradients use unquantized operands


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_that_are_zero_stay_zero_and_large_ones_finite(kind):
    x = jnp.zeros((1, 3, 16)).at[0, 1].set(1e30).at[0, 2].set(1e-30)
    w = jnp.eye(16)[:, :4]
    y, pull = jax.vjp(lambda x: quantized_einsum(kind, "BLD,DF->BLF", x, w), x)
    np.testing.assert_array_equal(y[0, 0], 0)
    np.testing.assert_allclose(y[0, 1:], x[0, 1:, :4], rtol=1e-6)
    assert np.isfinite(pull(y)[0]).all()


def test_formats_are_those_of_their_dtypes():
    for form in {form for forms in FORMATS.values() for form in forms}:
        largest = np.iinfo(np.int8).max if form.dtype == np.int8 else float(ml_dtypes.finfo(form.dtype).max)
        assert form.largest == largest


def products_in(jaxpr, dtype):
    """How many products of two sides of this dtype its text has, loops once."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found += all(v.aval.dtype == dtype for v in eqn.invars)
        inner = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple | list) else [value])]
        found += sum(
            products_in(getattr(x, "jaxpr", x), dtype) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")
        )
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("latent", "kernels"), [(False, 7), (True, 8)], ids=["heads", "latent"])
def test_a_model_is_nearly_the_same_and_each_kernel_of_a_layer_takes_part(kind, latent, kernels):
    config = TINY
    if latent:
        few = MLAConfig(kv_lora_rank=16, qk_rope_head_dim=4, q_lora_rank=12)
        config = replace(config, attention=replace(config.attention, num_kv_heads=4, mla=few))
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (B, L), 0, config.vocab_size)
    rows = {"positions_BL": jnp.broadcast_to(jnp.arange(L), (B, L)), "segment_ids_BL": jnp.ones((B, L), jnp.int32)}

    def run(params, products=kind):
        return logits(make_apply(replace(config, matmul_precision=products))(params, tokens, **rows))

    exact, near = run(params, MatmulPrecision.full), run(params)
    off = float(jnp.linalg.norm(near - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < off < 0.12
    form, form_of_gradients = FORMATS[kind]
    assert products_in(jax.make_jaxpr(run)(params).jaxpr, form.dtype) == kernels
    backward = jax.make_jaxpr(jax.grad(lambda params: jnp.square(run(params)).mean()))(params).jaxpr
    if form is form_of_gradients:
        assert products_in(backward, form.dtype) == 2 * kernels
