"""Weight views replace arrays in the parameter tree without changes to layers."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.adapters.lora import quantized_axes_of
from models.matmul import einsum_f32
from models.transformer import init_params, param_axes
from models.weight_views import WeightView, as_array, is_view
from tests.models.test_transformer import BASE, FAMILIES, run, setup


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masked(WeightView):
    """A weight with some entries held at 0."""

    weight: jax.Array
    mask: jax.Array

    def array(self):
        return self.weight * self.mask

    def product(self, spec, x, dtype):
        return einsum_f32(spec, x, self.array(), dtype)

    def view_axes(self, axes, num_lead):
        return Masked(axes, axes)


def masked(params):
    """Returns `params` with a view for every matrix except routers."""

    def view(path, weight):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "router" in name or not name.endswith(("kernel", "embedding", "head")):
            return weight
        return Masked(weight, (jax.random.uniform(jax.random.key(1), weight.shape) < 0.5).astype(weight.dtype))

    return jax.tree_util.tree_map_with_path(view, params)


@pytest.mark.parametrize("name", ["llama", "olmo2", "experts"])
def test_a_new_view_needs_no_change_elsewhere(name):
    config = FAMILIES[name]
    params, tokens, positions, segments = setup(config)
    views = masked(params)
    plain = jax.tree.map(as_array, views, is_leaf=is_view)
    found, want = (run(config, tree, tokens, positions, segments) for tree in (views, plain))
    np.testing.assert_allclose(found, want, atol=1e-5)
    loss = lambda views: jnp.square(run(config, views, tokens, positions, segments)).mean()
    up = jax.grad(loss, allow_int=True)(views)["layers"]["mlp"]["up"]["kernel"].weight
    assert jnp.all((up == 0) | (views["layers"]["mlp"]["up"]["kernel"].mask == 1)) and jnp.any(up != 0)


def test_a_view_names_the_dims_of_its_arrays():
    axes, views = param_axes(BASE), masked(init_params(BASE, jax.random.key(0)))
    layers = {"layers": views["layers"]}
    named = quantized_axes_of({"layers": axes["layers"]}, layers)
    assert named["layers"]["mlp"]["up"]["kernel"] == Masked(("layers", "embed", "mlp"), ("layers", "embed", "mlp"))
    assert named["layers"]["mlp_norm"]["scale"] == ("layers", "embed")
