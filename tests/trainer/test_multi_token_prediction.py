"""Multi-token prediction modules against their equations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ranges import check_ranges
from data.batch import TokenBatch
from models.config import Dtype, ModelConfig, MoEConfig
from models.decode.engine import generate
from models.decode.sampling import SamplingConfig
from models.flops import num_params
from models.transformer import forward, init_params, make_apply
from trainer.objectives.multi_token_prediction import MultiTokenConfig, mtp_targets
from trainer.objectives.next_token import NextTokenConfig

V, L = 40, 12
PLAIN = ModelConfig(num_layers=2, embed_dim=32, vocab_size=V, dtype=Dtype.float32)
MODEL = dataclasses.replace(PLAIN, mtp_num_layers=2)
PARAMS, APPLY = init_params(MODEL, jax.random.key(0)), make_apply(MODEL)
SIZES = (7, 4)  # documents of a row; the rest is padding


def batch(rows: int = 3) -> TokenBatch:
    rng = np.random.default_rng(0)
    rest = L - sum(SIZES)
    segments = np.repeat(np.array([1, 2, 0], np.int32), [*SIZES, rest])
    positions = np.concatenate([np.arange(n) for n in (*SIZES, rest)]).astype(np.int32)
    tokens = rng.integers(0, V, (rows, L)).astype(np.int32)
    mask = (np.roll(segments, -1) == segments) & (segments > 0)
    tile = lambda row, dtype: np.tile(row, (rows, 1)).astype(dtype)
    return TokenBatch(
        tokens, np.roll(tokens, -1, 1), tile(mask, np.float32), tile(segments, np.int32), tile(positions, np.int32)
    )


def rms(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * scale[None]


def module_nll(made: TokenBatch, row: int, start: int, size: int) -> list[float]:
    """Computes the loss of both modules on one document from the equations; blocks are layers of the model."""
    ids = jnp.asarray(made.tokens[row, start : start + size])
    positions, ones = jnp.arange(size)[None], jnp.ones((1, size), jnp.int32)
    without_norm = PARAMS | {"final_norm": {"scale": jnp.ones(32)}}

    def layers(x, weights):
        """Returns hidden states [size, D] without the final norm, which is inverted."""
        config = dataclasses.replace(PLAIN, num_layers=len(jax.tree.leaves(weights)[0]))
        given = {"embedding": x, "final_norm": without_norm["final_norm"], "layers": weights}
        wide = dataclasses.replace(config, vocab_size=size)
        return forward(given, jnp.arange(size)[None], positions, ones, config=wide).hidden_BLD[0]

    embedded, found = PARAMS["embedding"], []
    h = layers(embedded[ids], PARAMS["layers"])  # up to a factor per token, which the next norm removes
    for k in (1, 2):
        w = jax.tree.map(lambda leaf, k=k: leaf[k - 1], PARAMS["mtp"])
        ahead = embedded[jnp.roll(ids, -k)]
        both = jnp.concatenate([rms(h, w["hidden_norm"]["scale"]), rms(ahead, w["embedding_norm"]["scale"])], -1)
        block = jax.tree.map(lambda leaf: leaf[None], w["block"])
        h = layers(both @ w["projection"]["kernel"], block)
        logprobs = jax.nn.log_softmax(rms(h, w["final_norm"]["scale"]) @ embedded.T)
        found.append(-sum(float(logprobs[i, ids[i + k + 1]]) for i in range(size - k - 1)))
    return found


def test_the_loss_is_that_of_the_equations():
    made = batch()
    loss, metrics = MultiTokenConfig(weight=0.3).build(None).loss(APPLY, PARAMS, {}, made, None)
    plain, _ = NextTokenConfig().build(None).loss(APPLY, PARAMS, {}, made, None)
    sums = np.zeros(2)
    for row in range(3):
        for start, size in ((0, SIZES[0]), (SIZES[0], SIZES[1])):
            sums += module_nll(made, row, start, size)
    assert [float(metrics[f"nll_{k}"].total) for k in (2, 3)] == pytest.approx(sums.tolist(), rel=1e-3)
    assert [float(metrics[f"nll_{k}"].weight) for k in (2, 3)] == [3 * (5 + 2), 3 * (4 + 1)]
    assert float(loss.weight) == float(plain.weight)
    assert float(loss.total) == pytest.approx(float(plain.total) + 0.3 / 2 * sums.sum(), rel=1e-4)


def test_no_target_lies_in_another_document():
    made = batch(1)
    for k in (1, 2):
        targets, mask = mtp_targets(made, k)
        for i in range(L):
            inside = i + k + 1 < L and made.segment_ids[0, i] == made.segment_ids[0, i + k + 1] > 0
            assert mask[0, i] == inside
            assert not inside or targets[0, i] == made.tokens[0, i + k + 1]


def test_modules_learn_nothing_from_another_document_nor_from_what_they_predict():
    made = batch(1)._replace(tokens=np.arange(L, dtype=np.int32)[None])
    at = 2  # module 2 predicts token 5 there, and has read tokens 0 to 4

    def hidden(embedding):
        given = {"positions_BL": made.positions, "segment_ids_BL": made.segment_ids, "mtp": True}
        return APPLY(PARAMS | {"embedding": embedding}, made.tokens, **given).mtp_KBLD[1, 0, at].sum()

    grads = jax.grad(hidden)(PARAMS["embedding"])
    assert (grads[:5] != 0).any(axis=1).all() and (grads[5:L] == 0).all()


def test_the_model_beside_its_modules_is_the_same_without_them():
    plain = init_params(PLAIN, jax.random.key(0))
    own = {name: value for name, value in PARAMS.items() if name != "mtp"}
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), plain, own)))
    sampling = SamplingConfig(max_new_tokens=5, temperature=0)
    assert generate(PARAMS, MODEL, [[1, 2, 3]], sampling) == generate(plain, PLAIN, [[1, 2, 3]], sampling)
    assert num_params(MODEL)["mtp"] == num_params(MODEL)["total"] - num_params(PLAIN)["total"] > 0


def test_modules_of_a_mixture_of_experts_have_experts():
    model = dataclasses.replace(MODEL, mtp_num_layers=1, moe=MoEConfig(num_experts=4, intermediate_dim=16))
    params, made = init_params(model, jax.random.key(0)), batch()
    loss, metrics = MultiTokenConfig().build(None).loss(make_apply(model), params, {}, made, None)
    assert params["mtp"]["block"]["mlp"]["up"]["kernel"].shape[:2] == (1, 4)
    assert np.isfinite(float(loss.value())) and {"nll_2", "accuracy_2"} <= metrics.keys()


def test_values_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"objective\.weight=-1: must be at least 0"):
        check_ranges(MultiTokenConfig(weight=-1), "objective")
