"""Hand-written GPT-2 in JAX: unrolled layers, one loss over all logits, optax."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from safetensors.numpy import load_file

F32 = jnp.float32


@jax.custom_vjp
def matmul(x, w):
    """Multiplies [T, I] by [I, O] in x's dtype with f32 accumulation.

    Without a custom rule, XLA's CPU backend recomputes the gradients of all layers in each matmul.
    """
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=F32).astype(x.dtype)


def _backward(saved, dy):
    x, w = saved
    dx = jnp.matmul(dy, w.astype(x.dtype).T, preferred_element_type=F32).astype(x.dtype)
    return dx, jnp.matmul(x.T, dy, preferred_element_type=F32).astype(w.dtype)


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), _backward)


def norm(x, p):
    y = x.astype(F32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
    return (y * p["weight"] + p["bias"]).astype(x.dtype)


def linear(x, p):
    return matmul(x.reshape(-1, x.shape[-1]), p["weight"]).reshape(*x.shape[:-1], -1) + p["bias"].astype(x.dtype)


def loss_of(params, tokens, targets, *, heads, dtype):
    B, L = tokens.shape
    x = (params["wte"]["weight"][tokens] + params["wpe"]["weight"][:L]).astype(dtype)
    mask = jnp.tril(jnp.ones((L, L), bool))
    for index in range(len(params["h"])):
        p = params["h"][str(index)]
        qkv = linear(norm(x, p["ln_1"]), p["attn"]["c_attn"])
        q, k, v = (y.reshape(B, L, heads, -1).swapaxes(1, 2) for y in jnp.split(qkv, 3, -1))
        scores = jnp.einsum("bnlh,bnsh->bnls", q, k, preferred_element_type=F32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), -1).astype(dtype)
        y = jnp.einsum("bnls,bnsh->bnlh", weights, v, preferred_element_type=F32).astype(dtype)
        x = x + linear(y.swapaxes(1, 2).reshape(B, L, -1), p["attn"]["c_proj"])
        y = jax.nn.gelu(linear(norm(x, p["ln_2"]), p["mlp"]["c_fc"]))
        x = x + linear(y, p["mlp"]["c_proj"])
    x = norm(x, params["ln_f"])
    logits = matmul(x.reshape(B * L, -1), params["wte"]["weight"].T).astype(F32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets.reshape(-1)).mean()


def make_turn(folder, heads, precision, optimizer_options, batches):
    rate, b1, b2, eps, weight_decay, clip = optimizer_options
    params: dict = {}
    for name, value in load_file(Path(folder, "model.safetensors")).items():
        *path, last = name.removeprefix("transformer.").split(".")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(value)
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )
    loss = partial(loss_of, heads=heads, dtype=jnp.dtype(precision))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, targets):
        value, grads = jax.value_and_grad(loss)(params, tokens, targets)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    holds = [params, optimizer.init(params)]

    def turn() -> float:
        holds[0], holds[1], value = step(*holds, *next(batches))
        return float(value)

    return turn
