"""Supervised fine-tuning: loss on answers only, identical alone and packed, without leakage across conversations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import TokenBatch
from data.loader import PackedRows, stack
from data.packing import Packing, Piece, build_row
from data.records.chat_encoding import with_template
from data.records.encoding import EncodingConfig, LossMask, OnOverflow
from data.sources.readers import JsonlConfig
from data.tokenize_shards import TokenCorpus, tokenize_source
from data.tokenizers.kinds import Bytes
from models.config import AttentionConfig, Dtype, MLPConfig, ModelConfig
from models.transformer import init_params, logits, make_apply
from trainer.objective import Mean
from trainer.objectives.cross_entropy import token_logprobs
from trainer.objectives.next_token import NextTokenConfig

L = 96
MODEL = ModelConfig(
    num_layers=2,
    embed_dim=32,
    vocab_size=264,
    max_seq_len=2 * L,
    dtype=Dtype.float32,
    init_std=0.2,
    tied_embeddings=False,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    mlp=MLPConfig(intermediate_dim=48),
)
APPLY = make_apply(MODEL)
PARAMS = init_params(MODEL, jax.random.key(0))
ANSWERS = ("one", "four words of it", "three")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Returns a corpus of three conversations of different lengths, in the order of ANSWERS."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(ANSWERS)
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = JsonlConfig(paths=[str(folder / "a.jsonl")], validation_fraction=0.0)
    encoding = EncodingConfig(LossMask.assistant, OnOverflow.truncate_turns, L)
    return TokenCorpus(
        tokenize_source(source, with_template(Bytes(), "plain"), folder / "out", encoding=encoding), "train"
    )


def row(corpus, documents, length=2 * L) -> TokenBatch:
    return build_row(corpus, [Piece(d, 0, int(corpus.lengths[d])) for d in documents], length)


def logprobs(batch: TokenBatch) -> np.ndarray:
    output = APPLY(PARAMS, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids)
    return np.asarray(token_logprobs(output, batch.targets, chunk=32).logprob)


def loss(params, batch: TokenBatch) -> Mean:
    return NextTokenConfig().build(None).loss(APPLY, params, {}, batch, None)[0]


def test_loss_of_a_one_token_answer_is_its_log_probability():
    """The mask is shifted with the targets exactly once."""
    ids, mask = np.array([5, 6, 7, 8]), np.array([False, False, True, False])

    class Corpus:
        fingerprint = ""
        lengths = np.array([4])
        document = staticmethod(lambda index, start, stop: ids[start:stop])
        loss_mask = staticmethod(lambda index, start, stop: mask[start:stop])

    batch = stack([build_row(Corpus(), [Piece(0, 0, 4)], 6)])
    found = loss(PARAMS, batch)
    output = APPLY(PARAMS, ids[None, :2], positions_BL=np.arange(2)[None], segment_ids_BL=np.ones((1, 2), np.int32))
    want = -jax.nn.log_softmax(logits(output)[0, 1])[7]
    assert float(found.weight) == 1 and float(found.total) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_packing_does_not_change_log_probabilities(corpus, order):
    packed, at = stack([row(corpus, order)]), 0
    found = logprobs(packed)[0]
    for document in order:
        alone = stack([row(corpus, [document], L)])
        size = int(corpus.lengths[document])
        in_loss = alone.loss_mask[0] > 0
        assert in_loss.any() and np.array_equal(packed.loss_mask[0, at : at + size], alone.loss_mask[0, :size])
        np.testing.assert_allclose(found[at : at + size][in_loss[:size]], logprobs(alone)[0][in_loss], atol=1e-5)
        at += size
    assert not packed.loss_mask[0, at:].any()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("more", [0, 17])
def test_padding_and_batching_do_not_change_log_probabilities(corpus, side, more):
    longest = int(corpus.lengths[:3].max()) + more

    def padded(document: int) -> TokenBatch:
        alone = row(corpus, [document], longest)
        shift = longest - int(corpus.lengths[document]) if side == "left" else 0
        return TokenBatch(*(np.roll(column, shift) for column in alone))

    together = stack([padded(d) for d in (2, 0, 1)])
    found = logprobs(together)
    for place, document in enumerate((2, 0, 1)):
        alone = stack([row(corpus, [document], int(corpus.lengths[document]))])
        want = logprobs(alone)[0][alone.loss_mask[0] > 0]
        np.testing.assert_allclose(found[place][together.loss_mask[place] > 0], want, atol=1e-5)


def test_gradients_do_not_leak_into_other_conversations(corpus):
    batch = stack([row(corpus, [0, 1, 2])])
    second = np.where(batch.segment_ids == 2, batch.loss_mask, 0)
    # One embedding per position instead of per token: its gradient shows which positions matter.
    size = batch.tokens.shape[1]
    params = PARAMS | {"embedding": jnp.zeros((264, 32)).at[:size].set(PARAMS["embedding"][batch.tokens[0]])}
    placed = batch._replace(tokens=np.arange(size, dtype=np.int32)[None], loss_mask=second)

    def total(embedding):
        return loss(params | {"embedding": embedding}, placed).total

    gradient = np.abs(np.asarray(jax.grad(total)(params["embedding"])))[:size].max(-1)
    segments = batch.segment_ids[0]
    assert (gradient[segments != 2] == 0).all() and (gradient[segments == 2] > 0).any()


def test_packing_does_not_split_conversations(corpus):
    rows = PackedRows(corpus, seq_len=L, packing=Packing.best_fit, seed=0)
    sizes = [p.stop - p.start for i in range(len(rows)) for p in rows.plan.pieces(i)]
    assert sorted(sizes) == sorted(corpus.lengths.tolist())
