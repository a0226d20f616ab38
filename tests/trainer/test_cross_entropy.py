import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from models.transformer import ModelOutput
from trainer.mesh import MeshConfig, make_mesh
from trainer.objectives.cross_entropy import TokenLogprobs, chunked_loss, token_logprobs

B, L, D, V = 2, 10, 4, 24


def inputs(dtype=jnp.float32, soft_cap: float | None = None) -> tuple[ModelOutput, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden_BLD = jax.random.normal(keys[0], (B, L, D), dtype)
    head_DV = 3 * jax.random.normal(keys[1], (D, V))
    return ModelOutput(hidden_BLD, head_DV, soft_cap), jax.random.randint(keys[2], (B, L), 0, V)


def reference(output: ModelOutput, targets_BL: jax.Array) -> dict[str, np.ndarray]:
    """Reference formulas in float64 on full logits."""
    logits = np.asarray(output.hidden_BLD, np.float64) @ np.asarray(output.head_DV, np.float64)
    if output.logit_soft_cap is not None:
        logits = output.logit_soft_cap * np.tanh(logits / output.logit_soft_cap)
    logsumexp = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, np.asarray(targets_BL)[..., None], -1)[..., 0]
    return {
        "logprob": target - logsumexp,
        "logsumexp": logsumexp,
        "mean_logit": logits.mean(-1),
        "correct": logits.argmax(-1) == np.asarray(targets_BL),
    }


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("soft_cap", [None, 10.0])
def test_any_chunk_gives_the_formula(chunk: int, soft_cap: float | None) -> None:
    output, targets = inputs(soft_cap=soft_cap)
    found = token_logprobs(output, targets, chunk=chunk)
    for name, expected in reference(output, targets).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 5])
def test_chunks_do_not_change_the_gradient(chunk: int) -> None:
    output, targets = inputs(soft_cap=5.0)

    def total(hidden_BLD: jax.Array, head_DV: jax.Array, chunk: int) -> jax.Array:
        tokens = token_logprobs(ModelOutput(hidden_BLD, head_DV, 5.0), targets, chunk=chunk)
        return jnp.sum(tokens.logprob + 0.1 * tokens.logsumexp**2 + 0.2 * tokens.mean_logit)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    whole, chunked = gradient(*output[:2], L), gradient(*output[:2], chunk)
    for expected, found in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def largest_array(jaxpr: Jaxpr) -> int:
    """Returns the size of the largest array in a jaxpr, including inner jaxprs."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [int(np.prod(v.aval.shape)) for v in equation.outvars]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)):
            inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            sizes += [largest_array(inner)] if isinstance(inner, Jaxpr) else []
    return max(sizes)


def test_logits_of_the_whole_batch_never_exist() -> None:
    output, targets = inputs()

    def total(output: ModelOutput, chunk: int) -> jax.Array:
        return jnp.sum(token_logprobs(output, targets, chunk=chunk).logprob)

    sizes = {}
    for chunk in (2, L):
        gradient = jax.make_jaxpr(jax.grad(lambda h, w, c=chunk: total(ModelOutput(h, w, None), c), argnums=(0, 1)))
        sizes[chunk] = largest_array(gradient(*output[:2]).jaxpr)
    assert sizes[L] == B * L * V  # the check can see them
    assert sizes[2] == max(B * 2 * V, D * V, B * L * D)


def test_the_head_gradient_is_summed_in_f32() -> None:
    output, targets = inputs(jnp.bfloat16)
    grad = jax.grad(lambda w: jnp.sum(token_logprobs(output._replace(head_DV=w), targets, chunk=2).logprob))
    assert grad(output.head_DV).dtype == jnp.float32
    assert token_logprobs(output, targets, chunk=2).logprob.dtype == jnp.float32


def test_of_equal_logits_the_first_token_is_the_guess() -> None:
    output = ModelOutput(jnp.zeros((1, 4, D)), jnp.zeros((D, V)), None)
    found = token_logprobs(output, jnp.asarray([[0, 1, 2, V - 1]]), chunk=4)
    np.testing.assert_array_equal(found.correct, [[True, False, False, False]])


def test_logits_stay_cut_along_the_vocabulary() -> None:
    mesh = make_mesh(MeshConfig(1, 1, 8))
    output, targets = inputs()
    split = jax.NamedSharding(mesh, jax.P(None, "tensor"))
    head_DV = jax.device_put(output.head_DV, split)

    def total(head_DV: jax.Array) -> jax.Array:
        return jnp.sum(token_logprobs(output._replace(head_DV=head_DV), targets, chunk=5).logprob)

    compiled = jax.jit(jax.grad(total), out_shardings=split).lower(head_DV).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(head_DV), jax.grad(total)(output.head_DV), rtol=1e-5, atol=1e-5)


def of_token(tokens: TokenLogprobs) -> jax.Array:
    return 0.1 * tokens.logsumexp**2 - tokens.logprob + 0.2 * tokens.mean_logit


@pytest.mark.parametrize("chunk", [1, 3, 5, L])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_a_summed_loss_has_the_gradient_of_its_formula(chunk: int, soft_cap: float | None) -> None:
    output, targets = inputs(soft_cap=soft_cap)
    weights = jax.random.uniform(jax.random.key(1), (B, L)).at[:, 2].set(0.0)
    factor = 0.7  # a gradient that comes from behind the sum

    def formula(hidden_BLD, head_DV):
        tokens = token_logprobs(ModelOutput(hidden_BLD, head_DV, soft_cap), targets, chunk=L)
        return factor * jnp.sum(of_token(tokens) * weights)

    def found(hidden_BLD, head_DV):
        return (
            factor
            * chunked_loss(of_token, ModelOutput(hidden_BLD, head_DV, soft_cap), targets, weights, chunk=chunk)[0]
        )

    expected = jax.value_and_grad(formula, argnums=(0, 1))(*output[:2])
    assert_near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(assert_near, jax.jit(jax.value_and_grad(found, argnums=(0, 1)))(*output[:2]), expected)
    assert_near(found(*output[:2]), expected[0])  # and where nobody asks for a gradient
    tokens = chunked_loss(of_token, output, targets, weights, chunk=chunk)[1]
    jax.tree.map(assert_near, tokens, token_logprobs(output, targets, chunk=L))


def test_a_summed_loss_makes_logits_once_and_never_all() -> None:
    output, targets = inputs()
    weights = jnp.ones((B, L))

    def program(loss):
        return jax.make_jaxpr(jax.grad(lambda h, w: loss(ModelOutput(h, w, None)), argnums=(0, 1)))(*output[:2]).jaxpr

    once = program(lambda o: chunked_loss(of_token, o, targets, weights, chunk=2)[0])
    twice = program(lambda o: jnp.sum(of_token(token_logprobs(o, targets, chunk=2))))
    assert largest_array(once) == max(B * 2 * V, D * V, B * L * D)
    assert str(once).count("dot_general") == 4  # the head's gradient is emitted for two platforms
    assert str(twice).count("dot_general") == 5


def test_a_summed_loss_stays_cut_along_the_vocabulary() -> None:
    mesh = make_mesh(MeshConfig(1, 1, 8))
    output, targets = inputs()
    split = jax.NamedSharding(mesh, jax.P(None, "tensor"))
    head_DV, weights = jax.device_put(output.head_DV, split), jnp.ones((B, L))
    total = lambda head_DV: chunked_loss(of_token, output._replace(head_DV=head_DV), targets, weights, chunk=5)[0]
    compiled = jax.jit(jax.grad(total), out_shardings=split).lower(head_DV).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(head_DV), jax.grad(total)(output.head_DV), rtol=1e-5, atol=1e-5)
