"""Narrower models out of wider ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import MoEConfig, Norm, NormPlacement, QKNorm
from models.pruning import WidthConfig, prune_params, pruned_config, select_units
from models.transformer import abstract_params, init_params, param_axes
from tests.models.test_transformer import BASE, change, run, setup

MODELS = {
    "grouped queries, tied": BASE,
    "untied, biases, norms of heads": change(
        tied_embeddings=False, attention={"qkv_bias": True, "out_bias": True, "qk_norm": QKNorm.head, "sinks": True}
    ),
    "norms after, of all heads": change(norm_placement=NormPlacement.post, attention={"qk_norm": QKNorm.none}),
    "unit offset, sandwich": change(norm_placement=NormPlacement.sandwich, norm_unit_offset=True),
}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def thin(model, width, params):
    config = pruned_config(model, width)
    return config, prune_params(model, select_units(model, config, params, np.asarray), params)


def filled(model, seed=0):
    """Weights of which none is at a round number."""
    params = init_params(model, jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)


@models
def test_full_width_is_the_identity(model):
    width = WidthConfig(model.embed_dim, model.mlp.intermediate_dim, 4, 2)
    config, found = thin(model, width, params := filled(model))
    assert config == model
    jax.tree.map(np.testing.assert_array_equal, found, params)


@models
@pytest.mark.parametrize("axis", ["mlp", "heads", "kv_heads", "embed"])
def test_units_of_zeros_are_cut_and_change_nothing(model, axis):
    """Zeros among the others: the right ones go, and the function stays."""
    model = dataclasses.replace(model, norm_eps=1e-12)  # it is added to a mean, of more or fewer dims
    params, rng = filled(model), np.random.default_rng(3)
    size = {"mlp": 48, "heads": 4, "kv_heads": 2, "embed": 32}[axis]
    keep = {"mlp": 30, "heads": 2, "kv_heads": 1, "embed": 20}[axis]
    dead = np.ones(size, bool)
    dead[[0, 3] if axis == "heads" else rng.choice(size, keep, replace=False)] = False  # one of each group
    names = {"kv_heads": ("kv_heads", "heads")}.get(axis, (axis,))

    def blank(leaf, axes):
        for name in names:
            if name in axes:
                gone = np.repeat(dead, 2) if (axis, name) == ("kv_heads", "heads") else dead
                leaf = leaf * jnp.asarray(~gone, leaf.dtype).reshape([-1 if a == name else 1 for a in axes])
        return leaf

    params = jax.tree.map(blank, params, param_axes(model))
    width = {
        "mlp": WidthConfig(intermediate_dim=keep),
        "heads": WidthConfig(num_heads=keep),
        "embed": WidthConfig(keep),
    }
    width["kv_heads"] = WidthConfig(num_heads=2, num_kv_heads=1)
    config, found = thin(model, width[axis], params)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, abstract_params(config))
    _, tokens, positions, ones = setup(model)
    whole, cut = (run(c, p, tokens, positions, ones) for c, p in ((model, params), (config, found)))
    np.testing.assert_allclose(cut, whole, atol=1e-5)


def test_the_larger_units_stay_in_their_order_and_layers_choose_for_themselves():
    params = filled(BASE)
    up = params["layers"]["mlp"]["up"]["kernel"]
    params["layers"]["mlp"]["up"]["kernel"] = (
        up.at[0, :, 7].mul(50).at[0, :, 2].mul(50).at[1, :, 40].mul(50).at[1, :, 9].mul(50)
    )
    choice = select_units(BASE, pruned_config(BASE, WidthConfig(intermediate_dim=2)), params, np.asarray)
    assert choice.indices["mlp"].tolist() == [[2, 7], [9, 40]]


@pytest.mark.parametrize(
    "model,width,said",
    [
        (BASE, WidthConfig(embed_dim=33), "prune.width.embed_dim=33: the model has 32; valid: 1 to 32"),
        (BASE, WidthConfig(num_heads=3), r"prune.width.num_heads=3: 2 key-value heads .* valid: \[2, 4\]"),
        (BASE, WidthConfig(num_kv_heads=1), r"prune.width.num_heads=4: 1 key-value heads .* at most 2"),
        (change(norm=Norm.layer), WidthConfig(embed_dim=8), "layer norms take its mean; thin the others"),
        (change(moe=MoEConfig(num_experts=4)), WidthConfig(intermediate_dim=8), "with experts or latent attention"),
    ],
)
def test_widths_that_cannot_be_are_refused(model, width, said):
    with pytest.raises(ValueError, match=said):
        pruned_config(model, width)


def test_the_choice_does_not_depend_on_how_weights_lie():
    params = filled(BASE)
    narrow = pruned_config(BASE, WidthConfig(16, 24, 2, 1))
    spread = jax.device_put(params, jax.devices()[3])
    one, other = (select_units(BASE, narrow, p, np.asarray) for p in (params, spread))
    for axis, indices in one.indices.items():
        np.testing.assert_array_equal(indices, other.indices[axis])
    assert dataclasses.replace(one, indices={}) == dataclasses.replace(other, indices={})
