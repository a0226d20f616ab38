import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ranges import check_ranges
from data.batch import TokenBatch
from data.packing import CounterRng
from data.transforms import Diffusion
from models.config import AttentionConfig, AttentionMask, Dtype, ModelConfig
from models.transformer import ModelOutput, init_params, logits, make_apply
from trainer.eval_loop import summarize
from trainer.objectives.masked_lm import MaskedDiffusionConfig, MaskedLMConfig
from trainer.objectives.prefix_lm import prefix_of

V, L = 40, 12
MODEL = ModelConfig(
    num_layers=1,
    embed_dim=32,
    vocab_size=V,
    dtype=Dtype.float32,
    attention=AttentionConfig(mask=AttentionMask.bidirectional),
)
PARAMS, APPLY = init_params(MODEL, jax.random.key(0)), make_apply(MODEL)


def batch(rows: int = 3) -> TokenBatch:
    """Returns rows with two documents and two padding tokens."""
    rng = np.random.default_rng(0)
    segments = np.tile(np.array([1] * 6 + [2] * 4 + [0] * 2, np.int32), (rows, 1))
    positions = np.tile(np.array([*range(6), *range(4), 0, 0], np.int32), (rows, 1))
    tokens, targets = rng.integers(0, V, (2, rows, L)).astype(np.int32)
    mask = ((rng.random((rows, L)) < 0.4) * rng.uniform(1, 4, (rows, L)) * (segments > 0)).astype(np.float32)
    return TokenBatch(tokens, targets, mask, segments, positions)


def nll_of(made: TokenBatch) -> np.ndarray:
    x = logits(APPLY(PARAMS, made.tokens, positions_BL=made.positions, segment_ids_BL=made.segment_ids))
    return -np.take_along_axis(np.asarray(jax.nn.log_softmax(x)), made.targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [5, 128])
def test_masked_language_modelling_is_cross_entropy_of_what_is_hidden(chunk):
    made = batch()._replace(loss_mask=(batch().loss_mask > 0).astype(np.float32))
    loss, metrics = MaskedLMConfig(loss_chunk_size=chunk).build(None).loss(APPLY, PARAMS, {}, made, None)
    assert float(loss.value()) == pytest.approx(float(nll_of(made)[made.loss_mask > 0].mean()), rel=1e-5)
    assert float(loss.weight) == made.loss_mask.sum() and "bytes" not in metrics


def test_diffusion_weighs_what_is_hidden_and_divides_by_all_tokens():
    made = batch()
    sizes = np.arange(V, dtype=np.int32)
    loss, metrics = MaskedDiffusionConfig().build(sizes).loss(APPLY, PARAMS, {}, made, None)
    assert float(loss.weight) == (made.segment_ids > 0).sum()
    assert float(loss.total) == pytest.approx(float((nll_of(made) * made.loss_mask).sum()), rel=1e-5)
    found = summarize({name: (float(mean.total), float(mean.weight)) for name, mean in metrics.items()})
    of_bytes = sizes[made.targets[made.segment_ids > 0]].sum()
    assert found["bits_per_byte"] == pytest.approx(float(loss.total) / np.log(2) / of_bytes, rel=1e-5)


def shown(text: np.ndarray, draws: CounterRng, mask: int) -> TokenBatch:
    tokens, targets, weights = Diffusion(mask)(text, len(text), draws, 0)
    return TokenBatch(tokens, targets, weights, np.ones(len(text), np.int32), np.arange(len(text), dtype=np.int32))


def test_a_model_that_knows_nothing_gets_the_logarithm_of_the_vocabulary():
    def even(params, tokens_BL, **_):
        return ModelOutput(jnp.zeros((*tokens_BL.shape, 8)), jnp.zeros((8, V)), None)

    rows = [shown(np.arange(L), CounterRng(key), V - 1) for key in range(4000)]
    made = TokenBatch(*(np.stack(column) for column in zip(*rows, strict=True)))
    loss, _ = MaskedDiffusionConfig().build(None).loss(even, {}, {}, made, None)
    assert float(loss.value()) == pytest.approx(np.log(V), rel=0.02)


def test_the_bound_is_exact_for_tokens_that_tell_nothing_of_each_other():
    # Letters are drawn alone, from p: the model that knows p gives the entropy of the text itself, -sum log p.
    p = np.array([0.5, 0.25, 0.125, 0.125])

    def knows(params, tokens_BL, **_):
        return ModelOutput(jnp.ones((*tokens_BL.shape, 1)), jnp.log(jnp.asarray(p))[None], None)

    for text in itertools.islice(itertools.product(range(4), repeat=3), 0, 64, 21):
        rows = [shown(np.array(text), CounterRng(7, key), 3) for key in range(6000)]
        made = TokenBatch(*(np.stack(column) for column in zip(*rows, strict=True)))
        loss, _ = MaskedDiffusionConfig().build(None).loss(knows, {}, {}, made, None)
        assert float(loss.value()) == pytest.approx(-np.log(p[list(text)]).mean(), rel=0.05)


@pytest.mark.parametrize("config", [MaskedLMConfig(), MaskedDiffusionConfig()])
def test_no_document_learns_from_another(config):
    made = batch()
    first = made._replace(loss_mask=made.loss_mask * (made.segment_ids == 1))
    tokens = np.tile(np.arange(L, dtype=np.int32), (3, 1))

    def total(embedding):
        params = PARAMS | {"embedding": embedding, "head": PARAMS["embedding"].T}
        return config.build(None).loss(UNTIED, params, {}, first._replace(tokens=tokens), None)[0].total

    grads = jax.grad(total)(PARAMS["embedding"])
    assert (grads[6:] == 0).all() and (grads[:6] != 0).any(axis=1).all()


UNTIED = make_apply(ModelConfig(**{**vars(MODEL), "tied_embeddings": False}))


def test_a_prefix_ends_where_learning_begins():
    mask = np.array([[0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]], np.float32)
    made = TokenBatch(*(field[:1] for field in batch()))._replace(loss_mask=mask)
    want = [1, 1, 1, 0, 0, 0] + [1, 0, 0, 0] + [0, 0]
    assert prefix_of(made)[0].astype(int).tolist() == want
    nothing = made._replace(loss_mask=np.zeros_like(mask))
    assert prefix_of(nothing)[0].tolist() == [True] * 10 + [False] * 2


def test_values_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"objective\.loss_chunk_size=0: must be at least 1"):
        check_ranges(MaskedDiffusionConfig(loss_chunk_size=0), "objective")
