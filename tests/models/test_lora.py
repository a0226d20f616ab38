"""Low-rank adapters on frozen and quantized weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.ranges import check_ranges
from data.batch import TokenBatch
from models.adapters.lora import (
    AdapterConfig,
    Method,
    QuantizeBase,
    adapter_axes,
    bind_adapters,
    find_targets,
    init_adapters,
    merge,
    quantized_base,
    short_name,
)
from models.config import Dtype, ModelConfig, MoEConfig
from models.quantization.blockwise import BLOCK, DYNAMIC, NF4, Bits, quantize
from models.transformer import init_params, logits, make_apply, param_axes
from models.weight_views import WeightView, as_array
from trainer.adapters import BASE, AdapterObjective
from trainer.objectives.next_token import NextTokenConfig
from trainer.optimizers.param_groups import ParamGroup, param_groups
from trainer.state import make_state
from trainer.step import make_train_step

PLAIN = ModelConfig(vocab_size=32, embed_dim=64, dtype=Dtype.float32, tied_embeddings=False)
MIXTURE = dataclasses.replace(PLAIN, moe=MoEConfig(num_experts=4, intermediate_dim=32, shared_intermediate_dim=32))
F32 = jnp.dtype("float32")
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 12)).astype(np.int32)
PLACES = {
    "positions_BL": np.arange(12, dtype=np.int32)[None].repeat(2, 0),
    "segment_ids_BL": np.ones((2, 12), np.int32),
}


def parts(adapter: AdapterConfig, model: ModelConfig = PLAIN):
    """(axes, base, adapters, forward)."""
    axes = param_axes(model)

    @jax.jit
    def make(key):
        base = quantized_base(adapter, axes, init_params(model, key))
        return base, init_adapters(adapter, axes, key, base)

    base, adapters = make(jax.random.key(0))
    apply = make_apply(model)
    return axes, base, adapters, jax.jit(lambda params: logits(apply(params, TOKENS, **PLACES)))


def trained(adapters, size=0.02):
    """Returns adapters as after training."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + size * rng.standard_normal(x.shape).astype(np.float32), adapters)


def plain(base):
    return jax.tree.map(as_array, base, is_leaf=lambda w: isinstance(w, WeightView))


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("model", [PLAIN, MIXTURE], ids=["plain", "experts"])
def test_new_adapters_change_nothing_and_merged_weights_equal_bound_adapters(method, model):
    targets = ["attention", "mlp", "head"] + (["embedding"] if method != "dora" else [])
    adapter = AdapterConfig(Method[method], rank=4, target_modules=targets)
    axes, base, adapters, forward = parts(adapter, model)
    before = forward(base)
    # A magnitude is computed in one program and divided by the same length in another: that may differ in a last bit.
    np.testing.assert_allclose(
        forward(bind_adapters(adapter, axes, base, adapters)), before, rtol=0, atol=1e-6 if method == "dora" else 0
    )
    tuned = trained(adapters)
    bound = forward(bind_adapters(adapter, axes, base, tuned))
    np.testing.assert_allclose(forward(merge(adapter, axes, base, tuned, F32)), bound, atol=2e-5)
    assert np.abs(bound - before).max() > 0.01


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_dequantized(kind):
    adapter = AdapterConfig(Method.lora, rank=4, quantize_base=QuantizeBase[kind])
    axes, base, adapters, forward = parts(adapter)
    np.testing.assert_allclose(forward(base), forward(plain(base)), atol=1e-5)
    tuned = trained(adapters)
    bound = forward(bind_adapters(adapter, axes, base, tuned))
    np.testing.assert_allclose(forward(merge(adapter, axes, base, tuned, F32)), bound, atol=2e-5)
    full = parts(dataclasses.replace(adapter, quantize_base=QuantizeBase.none))[1]
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree["layers"]["mlp"]))
    assert bytes_of(base) < bytes_of(full) * (0.15 if kind == "nf4" else 0.27)


def test_merging_in_f32_and_casting_once_is_closer_than_adding_cast_weights():
    adapter = AdapterConfig(Method.lora, rank=4)
    axes, base, adapters, _ = parts(adapter)
    tuned = trained(adapters, 0.02)
    exact = merge(adapter, axes, base, tuned, F32)
    once = merge(adapter, axes, base, tuned, jnp.dtype("bfloat16"))
    low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    twice = jax.tree.map(lambda e, b: b + (e - b.astype(F32)).astype(jnp.bfloat16), exact, low(base))
    far = lambda tree: sum(
        float(jnp.sum(jnp.square(x.astype(F32) - e)))
        for x, e in zip(jax.tree.leaves(tree), jax.tree.leaves(exact), strict=True)
    )
    assert far(once) < far(twice)


def test_targets_are_parts_of_names_or_patterns():
    axes = param_axes(PLAIN)
    chosen = lambda *targets: [
        short_name(path) for path in find_targets(AdapterConfig(Method.lora, target_modules=list(targets)), axes)
    ]
    assert chosen("query", "value") == ["attention.query", "attention.value"]
    assert chosen("mlp") == ["mlp.down", "mlp.gate", "mlp.up"]
    assert chosen("*.o*", "mlp.up") == ["attention.out", "mlp.up"]
    with pytest.raises(ValueError, match="'qeury' matches no matrix; valid: attention"):
        chosen("qeury")
    assert "mlp.router" not in {short_name(p) for p in find_targets(AdapterConfig(Method.lora), param_axes(MIXTURE))}


@pytest.mark.parametrize("target", ["head", "embedding", "e*"])
def test_a_tied_head_takes_no_adapter(target):
    tied = param_axes(dataclasses.replace(PLAIN, tied_embeddings=True))
    with pytest.raises(ValueError, match="tied_embeddings=true"):
        find_targets(AdapterConfig(Method.lora, target_modules=[target]), tied)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dropout": 1.0}, "adapter.dropout=1.0"),
        ({"double_quant": True}, "adapter.double_quant=true"),
        ({"rank": 0}, "adapter.rank=0"),
        ({"target_modules": []}, "adapter.target_modules="),
        ({"method": Method.none, "quantize_base": QuantizeBase.nf4}, "adapter.quantize_base=nf4"),
    ],
)
def test_invalid_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        config = AdapterConfig(**({"method": Method.lora} | wrong))
        check_ranges(config, "adapter")
        config.validate()


def test_names_of_dims_follow_the_dims_and_a_magnitude_is_a_vector():
    axes = adapter_axes(AdapterConfig(Method.dora), param_axes(MIXTURE))["layers"]
    assert axes["attention"]["query"]["kernel"] == {
        "a": ("layers", "embed", None),
        "b": ("layers", None, "heads", "head_dim"),
        "magnitude": ("layers", "heads", "head_dim"),
    }
    assert axes["attention"]["out"]["kernel"]["a"] == ("layers", "heads", "head_dim", None)
    assert axes["mlp"]["up"]["kernel"]["b"] == ("layers", "experts", None, "mlp")
    roles = param_groups(axes)["attention"]["query"]["kernel"]
    assert roles == {"a": ParamGroup.matrix, "b": ParamGroup.matrix, "magnitude": ParamGroup.vector}


def test_only_adapters_are_differentiated_and_have_moments():
    adapter = AdapterConfig(Method.dora, rank=4)
    axes, base, _, _ = parts(adapter)
    objective = AdapterObjective(NextTokenConfig().build(None), lambda *args: bind_adapters(adapter, axes, *args))
    optimizer = optax.adam(1e-2)
    update = optax.GradientTransformationExtraArgs(optimizer.init, lambda u, s, p=None, **_: optimizer.update(u, s, p))
    state = make_state(lambda key, base: init_adapters(adapter, axes, key, base), update, jax.random.key(0), base)
    of_adapters = sum(x.size for x in jax.tree.leaves(state.params))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * of_adapters + 1
    step = jax.jit(make_train_step(objective, make_apply(PLAIN), update))
    ones = np.ones(TOKENS.shape, np.float32)
    batch = TokenBatch(TOKENS, TOKENS, ones, PLACES["segment_ids_BL"], PLACES["positions_BL"])
    losses = []
    for _ in range(5):
        state, metrics = step(state, {BASE: base}, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    # The gradient of a frozen matrix would cost as much as its product: two thirds are left of a full step's work.
    full = make_train_step(NextTokenConfig().build(None), make_apply(PLAIN), update)
    whole = make_state(lambda key: base, update, jax.random.key(0))
    flops = lambda step, *args: jax.jit(step).lower(*args).cost_analysis()["flops"]
    assert flops(step, state, {BASE: base}, batch) < 1.2 * flops(full, whole, {}, batch)


def test_dropout_applies_to_adapter_inputs_only():
    adapter = AdapterConfig(Method.lora, rank=4, dropout=0.5)
    axes, base, adapters, forward = parts(adapter)
    plain, tuned = forward(base), trained(adapters, 0.2)
    with_key = lambda key: forward(bind_adapters(adapter, axes, base, tuned, key))
    assert np.array_equal(forward(bind_adapters(adapter, axes, base, adapters, jax.random.key(1))), plain)  # B is 0
    whole, one, other = (
        forward(bind_adapters(adapter, axes, base, tuned)),
        with_key(jax.random.key(1)),
        with_key(jax.random.key(2)),
    )
    assert not np.allclose(one, whole) and not np.allclose(one, other)
    assert np.array_equal(one, with_key(jax.random.key(1)))
    # Each matrix of a stack has a separate mask, and remaining inputs are scaled up.
    kernel = bind_adapters(adapter, axes, base, tuned, jax.random.key(1))["layers"]["attention"]["query"]["kernel"]
    x = jnp.ones((1, 64))
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], kernel) for i in range(2)]
    dropped = [np.asarray(layer._dropped(x)) for layer in layers]
    assert set(np.unique(dropped)) == {0.0, 2.0} and not np.array_equal(*dropped)
    y = layers[0].product("BD,DNH->BNH", x, F32)
    low = np.einsum("br,rnh->bnh", dropped[0] @ layers[0].a, layers[0].b)
    want = np.einsum("bd,dnh->bnh", x, layers[0].base) + adapter.scale * low
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_evaluation_has_no_dropout():
    adapter = AdapterConfig(Method.lora, rank=4, dropout=0.5)
    axes, base, adapters, _ = parts(adapter)
    join = lambda *args: bind_adapters(adapter, axes, *args)
    objective = AdapterObjective(NextTokenConfig().build(None), join)
    ones = np.ones(TOKENS.shape, np.float32)
    batch = TokenBatch(TOKENS, TOKENS, ones, PLACES["segment_ids_BL"], PLACES["positions_BL"])
    value = lambda rng: float(
        objective.loss(make_apply(PLAIN), trained(adapters, 0.2), {BASE: base}, batch, rng)[0].total
    )
    assert value(None) == value(None) != value(jax.random.key(0))


def test_scales_in_8_bits_take_a_quarter_and_stay_near():
    weight = np.random.default_rng(0).standard_normal((2, 512, 6, 64)).astype(np.float32)
    one, two = (quantize(weight, 1, 1, Bits.nf4, double) for double in (False, True))
    assert len(DYNAMIC) == 256 and (np.diff(DYNAMIC) > 0).all() and DYNAMIC[-1] == 1
    size = lambda scales: sum(leaf.nbytes for leaf in jax.tree.leaves(scales))
    assert size(two.scales) < 0.26 * size(one.scales)
    np.testing.assert_array_equal(two.codes, one.codes)
    np.testing.assert_allclose(two.scales.array(), one.scales, rtol=0.03)
    cut = jax.tree.map(lambda x: x[1], two)  # as a scan cuts it
    np.testing.assert_array_equal(cut.array(), two.array()[1])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(128, 96), (192, 300), (64, 64)])
def test_nf4_equals_bitsandbytes(shape, double, measured):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = 0.05 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)  # in, out
    given = torch.tensor(weight.T.copy())
    codes, state = theirs.quantize_4bit(given, quant_type="nf4", blocksize=BLOCK, compress_statistics=double)
    found = quantize(weight[None], 1, 1, Bits.nf4, double)
    np.testing.assert_array_equal(np.asarray(found.codes)[0].T.ravel(), codes.numpy().ravel())
    if double:  # theirs takes a neighbour of the nearest level now and then
        apart = np.asarray(found.scales.codes).ravel()[: state.absmax.numel()].astype(int) - state.absmax.numpy()
        assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 0.02
    back = theirs.dequantize_4bit(codes, state).numpy().T
    largest = np.abs(np.asarray(found.array()[0]) - back).max() / np.abs(weight).max()
    measured("Weights of 4 bits vs. bitsandbytes", f"{shape}{', scales in 8 bits' if double else ''}", weights=largest)
    np.testing.assert_allclose(found.array()[0], back, atol=2e-3 if double else 1e-6)


def test_nf4_equals_the_published_table():
    assert len(NF4) == 16 and (np.diff(NF4) > 0).all()
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 2 * BLOCK, 5)).astype(np.float32)  # layers, in, out
    found = quantize(weight, 1, 1, Bits.nf4)
    # bitsandbytes: blocks of 64 along the flattened [out, in], the nearest level, two codes a byte, the first above.
    flat = weight.transpose(0, 2, 1).reshape(-1, BLOCK)
    largest = np.abs(flat).max(1, keepdims=True)
    codes = np.abs((flat / largest)[..., None] - NF4).argmin(-1).astype(np.uint8)
    wanted = (NF4[codes] * largest).reshape(3, 5, -1).transpose(0, 2, 1)
    np.testing.assert_allclose(found.array(), wanted, atol=1e-6)
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).reshape(3, 5, -1).transpose(0, 2, 1)
    np.testing.assert_array_equal(found.codes, packed)


@pytest.mark.parametrize("bits", list(Bits))
@pytest.mark.parametrize(
    ("shape", "num_in"), [((2, 48, 4, 16), 1), ((2, 4, 16, 48), 2), ((2, 4, 64, 8), 2), ((3, 5, 7), 1)]
)
def test_every_shape_is_dequantized_within_half_a_level(bits, shape, num_in):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = quantize(weight, 1, num_in, bits)
    back = np.asarray(found.array())
    assert back.shape == shape
    assert np.abs(back - weight).max() <= (0.153 if bits is Bits.nf4 else 0.5 / 127 + 1e-6) * np.abs(weight).max()
    one = jax.tree.map(lambda x: x[1], found)  # as a scan cuts it
    np.testing.assert_array_equal(one.array(), back[1])
