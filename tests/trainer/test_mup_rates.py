"""muP: initialization, learning rates, and the coordinate check."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.batch import TokenBatch
from models.config import (
    AttentionConfig,
    Dtype,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormPlacement,
)
from models.formats.huggingface.families import family_for
from models.mup import scale_to_width, width_keys
from models.transformer import abstract_params, init_params, make_apply, param_axes
from tests.models.test_transformer import FAMILIES
from trainer.activation_stats import LOGITS, activation_changes, slope
from trainer.objectives.next_token import NextTokenConfig
from trainer.optimizers.adafactor import AdafactorConfig
from trainer.optimizers.adamw import AdamWConfig
from trainer.optimizers.lion import LionConfig
from trainer.optimizers.muon import MuonConfig
from trainer.optimizers.mup_rates import rate_factors
from trainer.optimizers.optimizer import OptimizerConfig
from trainer.optimizers.schedule_free import ScheduleFreeConfig
from trainer.optimizers.sgd import SgdConfig
from trainer.optimizers.soap import SoapConfig
from trainer.schedule import ConstantConfig
from trainer.state import make_state
from trainer.step import make_train_step

V, L, ROWS, STEPS = 64, 16, 8, 4
SMALL = ModelConfig(
    num_layers=1,
    embed_dim=64,
    vocab_size=V,
    dtype=Dtype.float32,
    tied_embeddings=False,
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=16),
    mlp=MLPConfig(intermediate_dim=128),
)
TIED = replace(SMALL, tied_embeddings=True)
GEMMA = replace(TIED, scale_embeddings=True, norm_unit_offset=True, norm_placement=NormPlacement.sandwich)
EXPERTS = replace(SMALL, moe=MoEConfig(num_experts=4, intermediate_dim=64, shared_intermediate_dim=64))


# Halves compile time, at the cost of slower execution.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def batch_of(seed: int) -> TokenBatch:
    tokens = np.random.default_rng(seed).integers(0, V, (ROWS, L + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (ROWS, L))
    ones = np.ones((ROWS, L), np.int32)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)


def parts(model: ModelConfig, optimizer: OptimizerConfig, rate: float, apply=None):
    """Returns (apply, step, state) of a new run."""
    schedule = ConstantConfig(warmup_steps=0).build(rate, STEPS)
    chain = optimizer.build(schedule, param_axes(model), model if model.mup_base_width else None)
    apply = apply or make_apply(model)
    step = quick(make_train_step(NextTokenConfig().build(None), apply, chain))
    return apply, step, quick(lambda key: make_state(partial(init_params, model), chain, key))(jax.random.key(0))


def slopes(model: ModelConfig, optimizer: OptimizerConfig, rate: float, base: int | None, widths) -> dict[str, float]:
    found = []
    for width in widths:
        wide = replace(scale_to_width(model, width), mup_base_width=base)
        apply, step, state = parts(wide, optimizer, rate)
        found.append(activation_changes(apply, step, state, [batch_of(0)] * STEPS, batch_of(0), wide.num_layers)[-1])
    return {name: slope(widths, [each[name] for each in found]) for name in found[0]}


def losses(step, state) -> list[float]:
    found = []
    for i in range(STEPS):
        state, metrics = step(state, {}, batch_of(i))
        found.append(float(metrics["loss"]))
    return found


# The coordinate check -------------------------------------------------------


def test_activation_changes_depend_on_the_width_without_mup_only():
    widths = (64, 128, 256, 512)
    mup = slopes(SMALL, AdamWConfig(), 1e-2, 64, widths)
    standard = slopes(SMALL, AdamWConfig(), 1e-2, None, (64, 256))
    assert max(map(abs, mup.values())) < 0.3, mup
    assert standard[LOGITS] > 0.5 and standard["layer 1"] > 1, standard


@pytest.mark.parametrize(
    ("model", "optimizer", "rate"),
    [(GEMMA, AdamWConfig(), 1e-2), (EXPERTS, MuonConfig(), 1e-2), (TIED, SgdConfig(max_grad_norm=None), 0.3)],
    ids=["scaled tied tables, adamw", "experts, muon", "tied, sgd"],
)
def test_other_models_and_optimizers_pass_the_coordinate_check(model, optimizer, rate):
    found = slopes(model, optimizer, rate, 64, (64, 256))
    assert max(map(abs, found.values())) < 0.3, found


# Exactness ------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamWConfig, LionConfig, SgdConfig, MuonConfig, ScheduleFreeConfig])
def test_updates_at_base_width_match_the_standard_parametrization_bit_for_bit(cls):
    axes, schedule = param_axes(GEMMA), ConstantConfig(warmup_steps=0).build(1e-2, STEPS)
    params = init_params(GEMMA, jax.random.key(0))
    grads = jax.tree.map(jnp.cos, params)

    def end(width: ModelConfig | None):
        optimizer = cls().build(schedule, axes, width)
        state, end = optimizer.init(params), params
        for i in range(2):
            updates, state = quick(optimizer.update)(grads, state, end, step=jnp.asarray(i))
            end = optax.apply_updates(end, updates)
        return end

    assert_same(end(None), end(replace(GEMMA, mup_base_width=GEMMA.embed_dim)))


@pytest.mark.parametrize("model", [SMALL, GEMMA, EXPERTS])
def test_initialization_at_base_width_matches_the_standard_parametrization_bit_for_bit(model):
    models = [init_params(replace(model, mup_base_width=width), jax.random.key(0)) for width in (None, model.embed_dim)]
    assert_same(*models)


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(jnp.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [(GEMMA, AdamWConfig(eps=1e-20, max_grad_norm=None)), (TIED, SgdConfig(max_grad_norm=None))],
    ids=["scaled tied tables, adamw", "tied, sgd"],
)
def test_final_norm_scale_equals_the_output_multiplier_of_table_8(model, optimizer):
    """Reference with multipliers in the forward pass: norms are initialized to 1, embeddings with init_std, logits are
    divided by m, and learning rates are those of the table.
    """
    m, wide = 2.0, replace(scale_to_width(model, 128), num_layers=1, mup_base_width=64)
    lift = 1.0 if wide.norm_unit_offset else 0.0
    scaled = m**-0.5 if wide.scale_embeddings else 1.0
    plain = make_apply(wide)

    def apply(params, tokens_BL, **rows):
        scale = (params["final_norm"]["scale"] + lift) / (m * scaled) - lift
        weights = params | {"embedding": params["embedding"] * scaled, "final_norm": {"scale": scale}}
        return plain(weights, tokens_BL, **rows)

    _, step, state = parts(wide, optimizer, 1e-2)
    ours = losses(step, state)
    params = jax.tree.map(lambda x: x, state.params)
    params["final_norm"] = {"scale": jnp.full_like(params["final_norm"]["scale"], 1 - lift)}
    params["embedding"] = params["embedding"] / scaled
    sgd = isinstance(optimizer, SgdConfig)
    factors = rate_factors(wide, param_axes(wide), optimizer.mup_rule())
    factors["final_norm"]["scale"] = factors["embedding"] = m if sgd else 1.0
    chain = optax.with_extra_args_support(
        optimizer.chain_updates(ConstantConfig(warmup_steps=0).build(1e-2, STEPS), param_axes(wide), factors)
    )
    theirs = quick(make_train_step(NextTokenConfig().build(None), apply, chain))
    found = losses(theirs, replace(state, params=params, opt_state=chain.init(params)))
    assert ours[0] != ours[-1]
    np.testing.assert_allclose(ours, found, rtol=2e-5)


def test_initialization_follows_the_table():
    m, std = 4.0, SMALL.init_std
    model = replace(scale_to_width(EXPERTS, 256), mup_base_width=64)
    params = jax.jit(partial(init_params, model))(jax.random.key(0))
    layers = params["layers"]
    expected = {
        "embedding": (params["embedding"], std),
        "head": (params["head"], std / m),
        "query": (layers["attention"]["query"]["kernel"], std / m**0.5),
        "out": (layers["attention"]["out"]["kernel"], std / (2 * model.num_layers) ** 0.5 / m**0.5),
        "experts": (layers["mlp"]["up"]["kernel"], std / m**0.5),
        "router": (layers["mlp"]["router"]["kernel"], std / m),
    }
    for name, (kernel, wanted) in expected.items():
        assert float(kernel.std()) == pytest.approx(wanted, rel=0.08), name
    assert float(params["final_norm"]["scale"][0]) == 1  # untied head
    for model, first in ((TIED, 1 / m), (GEMMA, m**-0.5 - 1)):
        params = init_params(replace(scale_to_width(model, 256), mup_base_width=64), jax.random.key(0))
        assert float(params["final_norm"]["scale"][0]) == pytest.approx(first)


ADAM = {"embedding": 1, "head": 1 / 4, "final_norm/scale": 1, "layers/attention/query/kernel": 1 / 4,
        "layers/attention/out/kernel": 1 / 4, "layers/attention_norm/scale": 1, "layers/mlp/router/kernel": 1 / 4,
        "layers/mlp/router/bias": 1, "layers/mlp/up/kernel": 1 / 4, "layers/mlp/up/bias": 1,
        "layers/attention/query_norm/scale": 1}  # fmt: skip
SGD = ADAM | {"embedding": 4, "final_norm/scale": 4, "layers/attention/query/kernel": 1, "layers/mlp/up/kernel": 1,
              "layers/attention/out/kernel": 1, "layers/attention_norm/scale": 4, "layers/mlp/up/bias": 4}  # fmt: skip
MUON = ADAM | {"layers/attention/query/kernel": 1 / 2, "layers/attention/out/kernel": 1 / 2,
               "layers/mlp/up/kernel": 1 / 2}  # fmt: skip
JORDAN = ADAM | {"layers/attention/query/kernel": 1, "layers/attention/out/kernel": 1, "layers/mlp/up/kernel": 1,
                 "layers/mlp/router/kernel": 1 / 2}  # fmt: skip
RULES = [(AdamWConfig(), ADAM), (LionConfig(), ADAM), (ScheduleFreeConfig(), ADAM), (SgdConfig(), SGD),
         (MuonConfig(), MUON), (MuonConfig(consistent_rms=None), JORDAN)]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "table"), RULES, ids=["adamw", "lion", "schedule_free", "sgd", "muon", "jordan"])
def test_rates_follow_the_table(optimizer, table):
    experts = replace(EXPERTS.moe, bias=True, router_bias=True)
    attention = replace(SMALL.attention, qk_norm=FAMILIES["gemma"].attention.qk_norm)
    model = replace(scale_to_width(replace(SMALL, moe=experts, attention=attention), 256), mup_base_width=64)
    factors = rate_factors(model, param_axes(model), optimizer.mup_rule())
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): factor
        for path, factor in jax.tree_util.tree_leaves_with_path(factors)
    }
    assert {name: found[name] for name in table} == pytest.approx(table)


def test_weight_decay_is_independent_of_the_width():
    model = replace(scale_to_width(SMALL, 256), mup_base_width=64)
    params = init_params(model, jax.random.key(0))
    optimizer = AdamWConfig(weight_decay=0.5).build(
        ConstantConfig(warmup_steps=0).build(0.1, 10), param_axes(model), model
    )
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params, step=jnp.asarray(0))
    for name in ("embedding", "head"):
        np.testing.assert_allclose(updates[name], -0.05 * params[name], rtol=1e-5)
    kernel = lambda tree: tree["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(kernel(updates), -0.05 * kernel(params), rtol=1e-5)


@pytest.mark.parametrize("optimizer", [SoapConfig(), AdafactorConfig()], ids=["soap", "adafactor"])
def test_optimizers_without_a_rule_are_refused(optimizer):
    schedule = ConstantConfig(warmup_steps=0).build(1e-2, 10)
    optimizer.build(schedule, param_axes(SMALL))
    with pytest.raises(ValueError, match=r"model\.mup_base_width"):
        optimizer.build(schedule, param_axes(SMALL), replace(SMALL, mup_base_width=32))


# Sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_model_scales_in_all_widths_and_stays_exportable(name):
    model = FAMILIES[name]
    wide = replace(scale_to_width(model, 2 * model.embed_dim), mup_base_width=model.embed_dim)
    wide.validate()
    assert wide.attention.num_heads == 2 * model.attention.num_heads
    assert wide.attention.head_dim == model.attention.head_dim
    shapes = zip(*(jax.tree.leaves(abstract_params(each)) for each in (model, wide)), strict=True)
    if not model.attention.mla.kv_lora_rank:  # with MLA, the rank grows but not its rotary part
        assert all(b.size in (a.size, 2 * a.size, 4 * a.size) for a, b in shapes)
    assert scale_to_width(model, model.embed_dim) == model
    try:
        family = family_for(model)
    except ValueError:
        return
    assert family_for(replace(model, mup_base_width=8)) is family


def test_widths_with_fractional_heads_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        width_keys(SMALL, 72)
    latent = replace(SMALL.attention, mla=MLAConfig(kv_lora_rank=24, q_lora_rank=32))
    assert width_keys(replace(EXPERTS, attention=latent), 128) == {
        "embed_dim": 128, "attention.num_heads": 8, "attention.num_kv_heads": 8, "mlp.intermediate_dim": 256,
        "moe.intermediate_dim": 128, "moe.shared_intermediate_dim": 128, "attention.mla.kv_lora_rank": 48,
        "attention.mla.q_lora_rank": 64,
    }  # fmt: skip
