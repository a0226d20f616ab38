"""Who sees whom: prefixes, encoders, and documents that share a row; and prompts in writing and scoring."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import AttentionConfig, AttentionMask, Dtype, LayerKind, ModelConfig
from models.decode.engine import generate
from models.decode.sampling import SamplingConfig
from models.flops import flops_per_token
from models.formats.gguf.metadata import architecture_for
from models.formats.huggingface.families import family_for
from models.transformer import forward, init_params, logits, make_apply
from trainer.loglikelihood import Text, make_score, score_texts

V, L = 48, 14
BASE = ModelConfig(num_layers=2, embed_dim=32, vocab_size=V, dtype=Dtype.float32)
SEGMENTS = jnp.array([[1] * 6 + [2] * 6 + [0] * 2])
POSITIONS = jnp.array([[*range(6), *range(6), 0, 0]])
PREFIX = jnp.array([[1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]], bool)
TOKENS = jnp.arange(L)[None]  # each its own row of the embedding


def masked(mask: AttentionMask, **changes) -> ModelConfig:
    return dataclasses.replace(BASE, attention=AttentionConfig(mask=mask, **changes))


def sees(config: ModelConfig, prefix=None) -> np.ndarray:
    """[L, L] bool: whether the output at one place depends on the token at another, by gradient."""
    params = init_params(config, jax.random.key(0))

    def hidden(embedding):
        given = {"config": config, "prefix_BL": prefix}
        return forward(params | {"embedding": embedding}, TOKENS, POSITIONS, SEGMENTS, **given).hidden_BLD[0, :, 0]

    grads = jax.jacobian(hidden)(params["embedding"])[:, :L]
    return np.asarray(jnp.abs(grads).sum(-1) > 0)


DOCUMENTS = [range(0, 6), range(6, 12)]


def expected(rule) -> np.ndarray:
    found = np.zeros((L, L), bool)
    for document in DOCUMENTS:
        for q in document:
            for k in document:
                found[q, k] = rule(q, k)
    return found


def test_prompts_see_all_of_themselves_and_what_is_learnt_sees_what_is_before_it():
    want = expected(lambda q, k: k <= q or bool(PREFIX[0, k]))
    assert np.array_equal(sees(masked(AttentionMask.prefix), PREFIX)[:12, :12], want[:12, :12])


def test_an_encoder_sees_all_of_a_document_and_nothing_of_another():
    assert np.array_equal(sees(masked(AttentionMask.bidirectional))[:12], expected(lambda q, k: True)[:12])


def test_a_window_reaches_both_ways():
    config = masked(AttentionMask.bidirectional, layer_types=[LayerKind.sliding], sliding_window=2)
    one = dataclasses.replace(config, num_layers=1)
    assert np.array_equal(sees(one)[:12], expected(lambda q, k: abs(q - k) < 2)[:12])


def test_a_causal_model_does_not_read_the_prefix():
    assert np.array_equal(sees(BASE, PREFIX)[:12], expected(lambda q, k: k <= q)[:12])


def test_a_prefix_model_without_a_prefix_is_refused():
    with pytest.raises(
        ValueError, match=r"model\.attention\.mask=prefix: this task has no prompts; use a model with mask=causal"
    ):
        sees(masked(AttentionMask.prefix))


@pytest.mark.parametrize("length", [1, 2, 20, 70])
def test_writing_reads_a_prompt_as_training_does(length):
    config = masked(AttentionMask.prefix)
    params = init_params(config, jax.random.key(1))
    prompts = [np.random.default_rng(s).integers(0, V, n).tolist() for s, n in enumerate((length, 5))]
    found = generate(params, config, prompts, SamplingConfig(max_new_tokens=4, temperature=0))
    for prompt, completion in zip(prompts, found, strict=True):
        ids = [*prompt, *completion.tokens]
        tokens = jnp.array([ids])
        positions, ones = jnp.arange(len(ids))[None], jnp.ones_like(tokens)
        prefix = positions < len(prompt)
        x = logits(forward(params, tokens, positions, ones, config=config, prefix_BL=prefix))[0]
        want = jax.nn.log_softmax(x)[len(prompt) - 1 : -1]
        assert completion.tokens == want.argmax(-1).tolist()
        np.testing.assert_allclose(completion.logprobs, want.max(-1), atol=1e-4)


def test_scoring_shows_contexts_as_prompts():
    config, ids = masked(AttentionMask.prefix), list(range(10))
    params = init_params(config, jax.random.key(1))
    [score] = score_texts(make_score(make_apply(config), prefix=True), params, [Text(ids, 6)], progress=lambda n: None)
    tokens, positions = jnp.array([ids]), jnp.arange(10)[None]
    given = {"config": config, "prefix_BL": positions < 6}
    found = jax.nn.log_softmax(logits(forward(params, tokens, positions, jnp.ones_like(tokens), **given))[0])
    assert score.logprob == pytest.approx(sum(float(found[t - 1, ids[t]]) for t in range(6, 10)), rel=1e-4)


def test_an_encoder_does_not_write():
    config = masked(AttentionMask.bidirectional)
    with pytest.raises(ValueError, match=r"model\.attention\.mask=bidirectional: an encoder .* writes no next token"):
        generate(init_params(config, jax.random.key(0)), config, [[1]], SamplingConfig())


@pytest.mark.parametrize("mask", [AttentionMask.prefix, AttentionMask.bidirectional])
@pytest.mark.parametrize("find", [family_for, architecture_for])
def test_what_is_not_causal_is_not_exported(mask, find):
    with pytest.raises(ValueError, match=rf"model\.attention\.mask={mask.name}: .* cannot be exported"):
        find(masked(mask))


def test_an_encoder_attends_to_twice_as_much():
    more = flops_per_token(masked(AttentionMask.bidirectional), 64) - flops_per_token(BASE, 64)
    assert more == pytest.approx(3 * 2 * BASE.num_layers * 2 * 4 * 16 * 32)


@pytest.mark.parity
def test_an_encoder_is_a_llama_with_a_full_mask():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-5, rope_theta=10_000.0, tie_word_embeddings=True,
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    weights = {name: jnp.asarray(p.detach().numpy()) for name, p in theirs.state_dict().items()}
    layer = lambda name: jnp.stack([weights[f"model.layers.{i}.{name}.weight"] for i in range(2)])
    heads = lambda w: w.reshape(2, 4, 16, 32).transpose(0, 3, 1, 2)
    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "final_norm": {"scale": weights["model.norm.weight"]},
        "layers": {
            "attention_norm": {"scale": layer("input_layernorm")},
            "mlp_norm": {"scale": layer("post_attention_layernorm")},
            "attention": {
                **{n: {"kernel": heads(layer(f"self_attn.{n[0]}_proj"))} for n in ("query", "key", "value")},
                "out": {"kernel": layer("self_attn.o_proj").transpose(0, 2, 1).reshape(2, 4, 16, 32)},
            },
            "mlp": {n: {"kernel": layer(f"mlp.{n}_proj").transpose(0, 2, 1)} for n in ("up", "gate", "down")},
        },
    }
    config = dataclasses.replace(
        masked(AttentionMask.bidirectional), mlp=dataclasses.replace(BASE.mlp, intermediate_dim=64)
    )
    shapes = jax.tree.map(lambda a: a.shape, init_params(config, jax.random.key(0)))
    assert jax.tree.map(lambda a: a.shape, params) == shapes
    tokens = np.random.default_rng(0).integers(0, V, (2, 9))
    with torch.no_grad():
        full = torch.zeros(2, 1, 9, 9)  # added to the scores: nothing is hidden
        want = theirs(torch.tensor(tokens), attention_mask=full).logits.numpy()
    positions = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    found = logits(forward(params, jnp.asarray(tokens), positions, jnp.ones((2, 9), jnp.int32), config=config))
    np.testing.assert_allclose(found, want, atol=2e-5)
