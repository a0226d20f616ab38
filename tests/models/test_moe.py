"""Mixture of experts against plain loops and formulas."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.ranges import check_ranges
from models.config import (
    Activation,
    Dispatch,
    Dtype,
    LoadBalancing,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RouterScore,
)
from models.logical_axes import no_constraint
from models.moe import BIAS_GRADIENT, Experts, auxiliary, capacity_of, route
from models.transformer import init_params, make_apply

B, L, D, E, K = 3, 10, 12, 8, 3
EXPERTS = MoEConfig(num_experts=E, experts_per_token=K, intermediate_dim=6, bias=True, router_bias=True)
CONFIG = ModelConfig(
    num_layers=2, embed_dim=D, vocab_size=17, dtype=Dtype.float32, init_std=0.5, moe=EXPERTS,
    mlp=MLPConfig(activation=Activation.gelu_sigmoid, activation_clamp=1.0, up_offset=1.0),
)  # fmt: skip
REAL = jnp.arange(L)[None] < jnp.array([10, 7, 0])[:, None]


def layer(config, seed=0):
    """A layer whose biases are not zero."""
    module = Experts(nnx.Rngs(seed), config, 0.5)
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return graph, jax.tree.unflatten(
        tree, [jax.random.normal(k, a.shape) * 0.5 for k, a in zip(keys, leaves, strict=True)]
    )


def run(config, state, graph, x, real=REAL):
    return nnx.merge(graph, state)(x, real, no_constraint)


def x_of(seed=3):
    return jax.random.normal(jax.random.key(seed), (B, L, D))


def by_loop(config, state, x, real=REAL, taken=None):
    """The same sum in float64, one token, one expert at a time; `taken`: tokens of a row an expert takes."""
    e, mlp = config.moe, config.mlp
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(state))
    x, out = np.asarray(x, np.float64), np.zeros((B, L, D))
    for b in range(B):
        count = np.zeros(E, int)
        for t in range(L):
            if not real[b, t]:
                continue
            logits = x[b, t] @ w["router"]["kernel"] + w["router"]["bias"]
            scores = np.exp(logits - logits.max())
            scores = scores / scores.sum() if e.router_score is RouterScore.softmax else 1 / (1 + np.exp(-logits))
            choice = scores + w.get("balance_bias", 0)
            if e.num_groups > 1:
                groups = choice.reshape(e.num_groups, -1)
                worth = np.sort(groups, axis=1)[:, -e.group_score_topk :].sum(1)
                groups[np.argsort(-worth)[e.topk_groups :]] = -np.inf
                choice = groups.reshape(-1)
            chosen = np.argsort(-choice)[:K]
            weights = scores[chosen] / (scores[chosen].sum() if e.norm_topk_prob else 1) * e.routed_scaling_factor
            for expert, weight in zip(chosen, weights, strict=True):
                count[expert] += 1
                if taken is not None and count[expert] > taken:
                    continue
                gate, up = (x[b, t] @ w[n]["kernel"][expert] + w[n]["bias"][expert] for n in ("gate", "up"))
                gate, up = (
                    np.minimum(gate, mlp.activation_clamp),
                    np.clip(up, -mlp.activation_clamp, mlp.activation_clamp),
                )
                hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + mlp.up_offset)
                out[b, t] += weight * (hidden @ w["down"]["kernel"][expert] + w["down"]["bias"][expert])
    return out


ROUTERS = {
    "softmax": {},
    "not renormalised": {"norm_topk_prob": False},
    "sigmoid, bias, scale": {
        "router_score": RouterScore.sigmoid,
        "load_balancing": LoadBalancing.bias,
        "routed_scaling_factor": 2.5,
    },
    "groups by two": {"num_groups": 4, "topk_groups": 2},
    "groups by the best": {
        "num_groups": 4,
        "topk_groups": 2,
        "group_score_topk": 1,
        "router_score": RouterScore.sigmoid,
    },
}
routers = pytest.mark.parametrize("changes", ROUTERS.values(), ids=ROUTERS.keys())


@routers
def test_dropless_equals_a_loop_over_tokens_and_experts(changes):
    config = replace(CONFIG, moe=replace(EXPERTS, **changes))
    graph, state = layer(config)
    np.testing.assert_allclose(run(config, state, graph, x_of())[0], by_loop(config, state, x_of()), atol=2e-5)


@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_an_expert_takes_the_first_tokens_of_a_row_and_the_others_pass_by(factor):
    experts = replace(EXPERTS, dispatch=Dispatch.capacity, capacity_factor=factor)
    config = replace(CONFIG, moe=experts)
    graph, state = layer(config)
    taken = capacity_of(experts, L)
    got, terms = run(config, state, graph, x_of())
    np.testing.assert_allclose(got, by_loop(config, state, x_of(), taken=taken), atol=2e-5)
    assert float(terms.metrics["router/dropped"][0]) > 0
    if factor == 0.3:  # one token each: those that come late find no room at all
        assert (np.abs(got[0]).sum(-1) == 0).any()


def test_room_enough_for_all_equals_dropless_in_value_and_gradient():
    roomy = replace(CONFIG, moe=replace(EXPERTS, dispatch=Dispatch.capacity, capacity_factor=float(E)))
    graph, state = layer(CONFIG)
    roomy_graph = nnx.split(Experts(nnx.Rngs(0), roomy, 0.5))[0]

    def of(graph):
        value = lambda state, x: jnp.sum(jnp.sin(run(CONFIG, state, graph, x)[0]))
        return jax.jit(jax.value_and_grad(value, (0, 1)))(state, x_of())

    want, got = of(graph), of(roomy_graph)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), want, got)


def test_padding_reaches_no_expert_and_moves_nothing():
    for dispatch in Dispatch:
        config = replace(CONFIG, moe=replace(EXPERTS, dispatch=dispatch, capacity_factor=0.5))
        graph, state = layer(config)
        other = jnp.where(REAL[..., None], x_of(), 100.0)
        one, terms = run(config, state, graph, x_of())
        same, same_terms = run(config, state, graph, other)
        np.testing.assert_array_equal(one, same)
        assert (one[2] == 0).all() and (one[1, 7:] == 0).all()
        jax.tree.map(np.testing.assert_array_equal, terms, same_terms)


def test_auxiliary_terms_follow_their_formulas():
    config = replace(EXPERTS, aux_loss_weight=0.3, router_z_loss_weight=0.2)
    logits = jax.random.normal(jax.random.key(0), (B, L, E))
    terms = auxiliary(route(logits, None, config), None, REAL, 2, config)
    for b, count in enumerate((10, 7)):
        x = np.asarray(logits[b, :count], np.float64)
        p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        chosen = np.argsort(-x, axis=-1)[:, :K]
        per_expert = np.bincount(chosen.reshape(-1), minlength=E)
        balance = E * np.sum(per_expert / (K * count) * p.mean(0))
        z = np.mean(np.log(np.exp(x).sum(-1)) ** 2)
        np.testing.assert_allclose(terms.metrics["router/balance_loss"][b], balance, rtol=1e-5)
        np.testing.assert_allclose(terms.metrics["router/z_loss"][b], z, rtol=1e-5)
        np.testing.assert_allclose(terms.metrics["router/max_load"][b], per_expert.max() * E / (K * count), rtol=1e-5)
        np.testing.assert_allclose(
            terms.metrics["router/dropped"][b], np.maximum(per_expert - 2, 0).sum() / (K * count), rtol=1e-5
        )
        np.testing.assert_allclose(terms.loss_B[b], 0.3 * balance + 0.2 * z, rtol=1e-5)
    assert float(terms.loss_B[2]) == 0


def test_even_load_has_a_balance_loss_of_one():
    logits = 20.0 * jnp.stack([jnp.roll(jnp.arange(E) < K, i).astype(float) for i in range(E)])[None]
    terms = auxiliary(route(logits, None, EXPERTS), None, jnp.ones((1, E), bool), None, EXPERTS)
    np.testing.assert_allclose(terms.metrics["router/balance_loss"], 1, rtol=1e-5)
    np.testing.assert_allclose(terms.metrics["router/max_load"], 1, rtol=1e-5)


def test_the_balancing_bias_has_the_load_error_for_its_gradient_and_changes_no_loss():
    config = replace(EXPERTS, load_balancing=LoadBalancing.bias, router_score=RouterScore.sigmoid)
    logits, bias = jax.random.normal(jax.random.key(0), (B, L, E)), 0.1 * jnp.arange(E)

    def loss(bias):
        return auxiliary(route(logits, bias, config), bias, REAL, None, config).loss_B[0]

    value, gradient = jax.value_and_grad(loss)(bias)
    chosen = np.argsort(-np.asarray(jax.nn.sigmoid(logits[0]) + bias[None]), axis=-1)[:, :K]
    load = np.bincount(chosen.reshape(-1), minlength=E) * E / (K * L)
    assert float(value) == 0
    np.testing.assert_allclose(gradient / BIAS_GRADIENT, load - 1, atol=1e-5)


def test_two_kinds_of_layers_take_two_scans_however_many_there_are():
    config = replace(CONFIG, moe=replace(EXPERTS, first_num_dense_layers=2))

    def size(num_layers):
        deep = replace(config, num_layers=num_layers)
        params = jax.eval_shape(lambda: init_params(deep, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((B, L), jnp.int32)
        apply = lambda p, t: make_apply(deep)(p, t, positions_BL=t, segment_ids_BL=t).hidden_BLD
        return len(jax.jit(apply).lower(params, tokens).as_text().splitlines())

    assert size(9) <= 1.05 * size(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 9}, "experts_per_token=9: must be 1 to num_experts=8"),
        ({"num_groups": 3}, r"num_groups=3: must divide num_experts=8; valid: \[1, 2, 4, 8\]"),
        ({"num_groups": 4, "topk_groups": 1}, "topk_groups=1: .* valid: 2 to 4"),
        ({"num_groups": 4, "topk_groups": 2, "group_score_topk": 3}, "group_score_topk=3: .* valid: 1 to 2"),
        ({"first_num_dense_layers": 2}, "first_num_dense_layers=2: .* valid: 0 to 1"),
        ({"router_z_loss_weight": -1.0}, "router_z_loss_weight=-1.0"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
    ],
)
def test_impossible_experts_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config = replace(CONFIG, moe=replace(EXPERTS, **changes))
        check_ranges(config, "model")
        config.validate()
