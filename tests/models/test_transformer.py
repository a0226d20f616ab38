"""The decoder: causality, separation of packed documents, and equal results of all implementations."""

import dataclasses
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from configs.ranges import check_ranges
from launch.planning.jaxpr_cost import jaxpr_cost
from models.config import (
    CHECKPOINT_NAMES,
    SAVED_NAMES,
    Activation,
    ActivationOffload,
    AttentionConfig,
    Dtype,
    LayerKind,
    LoadBalancing,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    Norm,
    NormPlacement,
    Position,
    QKNorm,
    Remat,
    RopeConfig,
    RopeScaling,
    RouterScore,
)
from models.decode.engine import decoding_params
from models.layers import inverse_frequencies
from models.mixers.mixer_registry import init_cache
from models.remat import checkpoint_name
from models.transformer import abstract_params, forward_cached, init_params, logits, make_apply, param_axes, stacks
from trainer.objectives.cross_entropy import token_logprobs

V, L = 37, 16
BASE = ModelConfig(
    num_layers=2,
    embed_dim=32,
    vocab_size=V,
    max_seq_len=64,
    dtype=Dtype.float32,
    init_std=0.2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    mlp=MLPConfig(intermediate_dim=48),
)


EXPERTS = MoEConfig(num_experts=8, experts_per_token=2, intermediate_dim=24)


def change(**fields):
    attention = dataclasses.replace(BASE.attention, **fields.pop("attention", {}))
    mlp = dataclasses.replace(BASE.mlp, **fields.pop("mlp", {}))
    return dataclasses.replace(BASE, attention=attention, mlp=mlp, **fields)


FAMILIES = {
    "llama": BASE,
    "gpt2": change(
        norm=Norm.layer,
        position=Position.learned,
        attention={"num_kv_heads": 4, "qkv_bias": True, "out_bias": True},
        mlp={"gated": False, "activation": Activation.gelu_tanh, "bias": True},
    ),
    "gemma": change(
        num_layers=3,
        norm_placement=NormPlacement.sandwich,
        norm_unit_offset=True,
        scale_embeddings=True,
        final_logit_softcap=10.0,
        rope=RopeConfig(theta=1e6, local_theta=1e4),
        attention={
            "qk_norm": QKNorm.head,
            "layer_types": [LayerKind.sliding, LayerKind.full],
            "sliding_window": 4,
            "logit_softcap": 5.0,
            "scale": 0.3,
        },
    ),
    "olmo2": change(norm_placement=NormPlacement.post, tied_embeddings=False, attention={"qk_norm": QKNorm.projection}),
    "partial rope": change(rope=RopeConfig(partial_rotary_factor=0.5)),
    "sinks and unrotated layers": change(
        num_layers=3,
        rope=RopeConfig(layer_pattern=[True, False], scaling=RopeScaling.yarn, factor=4.0, truncate=False),
        attention={"sinks": True, "layer_types": [LayerKind.sliding, LayerKind.full], "sliding_window": 4},
        mlp={"activation": Activation.gelu_sigmoid, "activation_clamp": 2.0, "up_offset": 1.0},
    ),
    "latent": change(
        rope=RopeConfig(interleaved=True, scaling=RopeScaling.yarn, factor=4.0, mscale_all_dim=0.7),
        attention={
            "num_kv_heads": 4,
            "head_dim": 12,
            "v_head_dim": 6,
            "mla": MLAConfig(kv_lora_rank=10, q_lora_rank=9, qk_rope_head_dim=4),
        },
    ),
    "experts": change(moe=EXPERTS),
    "first layer dense, shared and grouped experts": change(
        num_layers=3,
        tied_embeddings=False,
        moe=replace(
            EXPERTS,
            first_num_dense_layers=1,
            shared_intermediate_dim=12,
            router_score=RouterScore.sigmoid,
            routed_scaling_factor=2.5,
            num_groups=4,
            topk_groups=2,
            load_balancing=LoadBalancing.bias,
            bias=True,
            router_bias=True,
        ),
    ),
    "plain": change(position=Position.none, mlp={"gated": False, "activation": Activation.relu2}),
}
families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())


def setup(config, rows=2, seed=0):
    params = init_params(config, jax.random.key(seed))
    tokens = jax.random.randint(jax.random.key(seed + 1), (rows, L), 0, V)
    positions = jnp.broadcast_to(jnp.arange(L)[None], (rows, L))
    return params, tokens, positions, jnp.ones((rows, L), jnp.int32)


def run(config, params, tokens, positions, segments):
    return logits(make_apply(config)(params, tokens, positions_BL=positions, segment_ids_BL=segments))


@families
def test_no_token_depends_on_a_later_one(config):
    """By gradient, through tokens given as vectors: exactly zero, not small."""
    params, _, positions, segments = setup(config, rows=1)
    params = {**params, "embedding": jax.random.normal(jax.random.key(5), (L, config.embed_dim))}
    config = dataclasses.replace(config, vocab_size=L)  # token i is row i: its own vector
    if not config.tied_embeddings:
        params["head"] = jnp.ones((config.embed_dim, L))
    head = params["embedding"]

    def at(embedding, i):
        # The output is read from the hidden vectors, for a tied head would depend on every token.
        output = make_apply(config)(
            {**params, "embedding": embedding},
            jnp.arange(L)[None],
            positions_BL=positions,
            segment_ids_BL=segments,
        )
        return output.hidden_BLD[0, i].sum() + jnp.square(output.hidden_BLD[0, i]).sum()

    for i in (0, 3, L - 2):
        grads = jax.grad(at)(head, i)
        assert (grads[i + 1 :] == 0).all(), "a later token has influence"
        assert (grads[i] != 0).any()


@families
def test_packed_documents_never_see_each_other(config):
    params, _, _, _ = setup(config, rows=1)
    embedding = jax.random.normal(jax.random.key(5), (L, config.embed_dim))
    config = dataclasses.replace(config, vocab_size=L)
    positions = jnp.concatenate([jnp.arange(6), jnp.arange(L - 6)])[None]
    segments = jnp.array([[1] * 6 + [2] * (L - 6)])

    def second(embedding):
        output = make_apply(config)(
            {**params, "embedding": embedding},
            jnp.arange(L)[None],
            positions_BL=positions,
            segment_ids_BL=segments,
        )
        return jnp.square(output.hidden_BLD[0, 6:]).sum() + output.hidden_BLD[0, 6:].sum()

    grads = jax.grad(second)(embedding)
    assert (grads[:6] == 0).all()
    assert (grads[6:] != 0).any(axis=1).all()


@families
def test_a_packed_document_equals_the_same_document_alone(config):
    params, tokens, positions, segments = setup(config, rows=1)
    packed_positions = jnp.concatenate([jnp.arange(5), jnp.arange(L - 5)])[None]
    packed = run(config, params, tokens, packed_positions, jnp.array([[1] * 5 + [2] * (L - 5)]))
    alone = run(config, params, tokens[:, 5:], positions[:, : L - 5], segments[:, 5:])
    np.testing.assert_allclose(packed[:, 5:], alone, atol=1e-5)


@families
def test_cached_decoding_equals_the_full_forward(config):
    params, tokens, positions, segments = setup(config)
    whole = run(config, params, tokens, positions, segments)
    cache, ready = init_cache(config, 2, 32), decoding_params(params, config)
    pieces = []
    for part in (
        slice(0, 7),
        slice(7, 8),
        slice(8, 9),
        slice(9, 12),
        *(slice(i, i + 1) for i in range(12, L)),
    ):
        output, cache = forward_cached(ready, tokens[:, part], positions[:, part], cache, config=config)
        pieces.append(logits(output))
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=1e-5)


@families
def test_axes_shapes_and_parameters_are_one_tree(config):
    params = init_params(config, jax.random.key(0))
    shapes = abstract_params(config)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
    axes = param_axes(config)
    jax.tree.map(lambda s, a: pytest.fail(f"{a} for {s.shape}") if len(a) != len(s.shape) else None, shapes, axes)
    for stack in stacks(config):
        assert all(leaf.shape[0] == stack.stop - stack.start for leaf in jax.tree.leaves(shapes[stack.name]))


@pytest.mark.parametrize("remat", [r for r in Remat if r is not Remat.none])
def test_remat_changes_memory_and_not_numbers(remat):
    params, tokens, positions, segments = setup(BASE)

    def loss(params, remat):
        config = dataclasses.replace(BASE, remat=remat)
        return jnp.square(run(config, params, tokens, positions, segments)).mean()

    want, want_grads = jax.value_and_grad(loss)(params, Remat.none)
    got, grads = jax.value_and_grad(loss)(params, remat)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, want_grads)


@pytest.mark.parametrize("unroll", [0, 2, 3])
def test_layers_without_a_loop_give_the_same(unroll):
    params, tokens, positions, segments = setup(BASE)

    def loss(params, unroll):
        config = dataclasses.replace(BASE, scan_unroll=unroll)
        return jnp.square(run(config, params, tokens, positions, segments)).mean()

    want, want_grads = jax.value_and_grad(loss)(params, 1)
    got, grads = jax.value_and_grad(loss)(params, unroll)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, want_grads)


def test_a_loop_has_no_negative_turns():
    with pytest.raises(ValueError, match=r"model\.scan_unroll=-1: must be at least 0"):
        check_ranges(dataclasses.replace(BASE, scan_unroll=-1), "model")


def test_remat_dots_multiplies_with_no_weight_again():
    params, tokens, positions, segments = setup(BASE)

    def flops(remat):
        config = dataclasses.replace(BASE, remat=remat)
        loss = lambda params: jnp.square(run(config, params, tokens, positions, segments)).mean()
        return jaxpr_cost(jax.make_jaxpr(jax.grad(loss))(params), [False] * len(jax.tree.leaves(params))).flops

    a, rows = BASE.attention, tokens.shape[0]
    of_attention = BASE.num_layers * 2 * (2 * rows * a.num_heads * L * L * a.head_dim)  # scores, and what they weigh
    assert flops(Remat.save_dots) - flops(Remat.none) == of_attention
    assert flops(Remat.full) - flops(Remat.save_dots) > 2 * of_attention


def gradient_jaxpr(config):
    params, tokens, positions, segments = setup(config)
    loss = lambda params: jnp.square(run(config, params, tokens, positions, segments)).mean()
    return jax.make_jaxpr(jax.grad(loss))(params)


def test_the_model_uses_every_checkpoint_name_and_no_other():
    """A name that the remat policies do not know would save and offload nothing."""
    assert set(re.findall(r"\bname\[name=(\w+)\]", str(gradient_jaxpr(BASE)))) == set(CHECKPOINT_NAMES)
    assert {name.name for name in ActivationOffload} <= {"layer_input", *SAVED_NAMES[Remat.save_qkv]}
    with pytest.raises(ValueError, match="checkpoint name 'attention': no remat policy saves it; known: layer_input"):
        checkpoint_name("attention", jnp.ones(2))


def test_each_remat_policy_recomputes_less_than_the_one_before():
    costs = [
        jaxpr_cost(jaxpr := gradient_jaxpr(replace(BASE, remat=remat)), [False] * len(jaxpr.jaxpr.invars)).flops
        for remat in (Remat.full, Remat.save_attn_out, Remat.save_qkv, Remat.none)
    ]
    assert costs[0] > costs[1] > costs[2] > costs[3]


@pytest.mark.parametrize("name", list(ActivationOffload))
def test_every_activation_of_the_menu_is_offloaded(name):
    config = replace(BASE, remat=Remat.save_qkv, activation_offload=[name])
    config.validate()
    moved = lambda config: str(gradient_jaxpr(config)).count("MemorySpace.Host")
    assert moved(config) > moved(replace(config, activation_offload=[])) == 0


@pytest.mark.parametrize(
    ("remat", "valid"), [("save_dots", "nothing"), ("full", "layer_input"), ("save_attn_out", "layer_input, attn_out")]
)
def test_activations_that_are_not_saved_cannot_be_offloaded(remat, valid):
    config = replace(BASE, remat=Remat[remat], activation_offload=[ActivationOffload.qkv_proj])
    with pytest.raises(ValueError, match=f"activation_offload: qkv_proj .* model.remat={remat}; valid: {valid};"):
        config.validate()


def test_llama_equals_a_float64_formula():
    config = BASE
    params, tokens, positions, segments = setup(config, rows=1)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    a = config.attention

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotate(x):  # [L, N, H]
        half = a.head_dim // 2
        angle = np.arange(L)[:, None] * 10_000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate(
            [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1
        )

    x = p["embedding"][np.asarray(tokens[0])]
    for layer in range(config.num_layers):
        w = jax.tree.map(lambda leaf: leaf[layer], p["layers"])  # noqa: B023
        h = rms(x, w["attention_norm"]["scale"])
        q = rotate(np.einsum("ld,dnh->lnh", h, w["attention"]["query"]["kernel"]))
        k = rotate(np.einsum("ld,dnh->lnh", h, w["attention"]["key"]["kernel"]))
        v = np.einsum("ld,dnh->lnh", h, w["attention"]["value"]["kernel"])
        k, v = (np.repeat(y, a.num_heads // a.num_kv_heads, axis=1) for y in (k, v))
        s = np.einsum("lnh,snh->nls", q, k) / np.sqrt(a.head_dim)
        s = np.where(np.tril(np.ones((L, L), bool)), s, -np.inf)
        e = np.exp(s - s.max(-1, keepdims=True))
        o = np.einsum("nls,snh->lnh", e / e.sum(-1, keepdims=True), v)
        x = x + np.einsum("lnh,nhd->ld", o, w["attention"]["out"]["kernel"])
        h = rms(x, w["mlp_norm"]["scale"])
        gate, up = h @ w["mlp"]["gate"]["kernel"], h @ w["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp"]["down"]["kernel"]
    want = rms(x, p["final_norm"]["scale"]) @ p["embedding"].T
    np.testing.assert_allclose(run(config, params, tokens, positions, segments)[0], want, atol=2e-5)


@pytest.mark.parametrize("chunk", [5, L])
@families
def test_bfloat16_gradients_stay_near_those_in_float32(config, chunk):
    if experts := config.moe.num_experts:  # all are chosen: near ties fall otherwise in bf16, as they may
        groups = config.moe.num_groups
        config = replace(config, moe=replace(config.moe, experts_per_token=experts, topk_groups=groups))
    params, tokens, positions, segments = setup(config)

    def gradient(config):
        def loss(params):
            output = make_apply(config)(params, tokens, positions_BL=positions, segment_ids_BL=segments)
            return -token_logprobs(output, tokens, chunk=chunk).logprob.mean()

        return ravel_pytree(jax.jit(jax.grad(loss))(params))[0]

    want, got = gradient(config), gradient(dataclasses.replace(config, dtype=Dtype.bfloat16))
    assert float(jnp.linalg.norm(got - want)) < 0.05 * float(jnp.linalg.norm(want))


def test_dropout_needs_a_key_and_depends_on_it():
    config = change(dropout=0.5, attention={"dropout": 0.5})
    params, tokens, positions, segments = setup(config)

    def hidden(rng):
        return make_apply(config)(params, tokens, positions_BL=positions, segment_ids_BL=segments, rng=rng).hidden_BLD

    assert (hidden(None) == hidden(None)).all()
    one, same, other = (hidden(jax.random.key(i)) for i in (1, 1, 2))
    assert (one == same).all() and not (one == other).all() and not (one == hidden(None)).all()


def test_rope_scaling_follows_the_published_formulas():
    plain = inverse_frequencies(RopeConfig(theta=5e5), 128, theta=5e5, scaled=True)
    linear = inverse_frequencies(RopeConfig(scaling=RopeScaling.linear, factor=4.0), 128, theta=5e5, scaled=True)
    np.testing.assert_allclose(linear, plain / 4)
    config = RopeConfig(scaling=RopeScaling.llama3, factor=8.0, original_max_seq_len=8192)
    got = inverse_frequencies(config, 128, theta=5e5, scaled=True)
    for f, g in zip(plain, got, strict=True):  # as Llama 3.1's reference code has it
        wavelength = 2 * np.pi / f
        if wavelength < 8192 / 4:
            want = f
        elif wavelength > 8192 / 1:
            want = f / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * f / 8 + smooth * f
        assert g == pytest.approx(want, rel=1e-12)
    assert (inverse_frequencies(config, 128, theta=5e5, scaled=False) == plain).all()
    yarn = inverse_frequencies(
        RopeConfig(scaling=RopeScaling.yarn, factor=4.0, original_max_seq_len=4096),
        128,
        theta=1e4,
        scaled=True,
    )
    bare = inverse_frequencies(RopeConfig(), 128, theta=1e4, scaled=True)
    assert yarn[0] == bare[0] and yarn[-1] == pytest.approx(bare[-1] / 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            change(attention={"num_kv_heads": 3}),
            r"num_kv_heads=3: must divide num_heads=4; valid: \[1, 2, 4\]",
        ),
        (change(attention={"head_dim": 7}), "head_dim=7"),
        (change(dropout=1.0), "dropout=1.0"),
        (change(attention={"layer_types": []}), r"model\.attention\.layer_types=\[\]"),
    ],
)
def test_impossible_models_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        check_ranges(config, "model")
        config.validate()
