"""Reward, classification and contrastive objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_sigmoid

from configs.ranges import check_ranges
from data.batch import ColumnBatch, TokenBatch, flat_rows
from models.config import Dtype, ModelConfig
from models.transformer import init_params, make_apply
from tests.trainer.test_preference import batch as pairs_of
from tests.trainer.test_preference import in_rows, longer
from trainer.eval_loop import collect_outputs, report_outputs
from trainer.objectives.classification import ClassificationConfig, class_report
from trainer.objectives.contrastive import ContrastiveConfig
from trainer.objectives.pooling import Pooling, at_end, pool
from trainer.objectives.reward import RewardConfig, bradley_terry

V, L = 40, 24
MODEL = ModelConfig(num_layers=2, embed_dim=32, vocab_size=V, dtype=Dtype.float32)


def model(outputs: int):
    config = ModelConfig(num_layers=2, embed_dim=32, vocab_size=V, num_labels=outputs, dtype=Dtype.float32)
    params = init_params(config, jax.random.key(0))
    if outputs:
        params["score"] = jax.random.normal(jax.random.key(1), (32, outputs))
    return make_apply(config), params


def pairs(count: int = 4) -> TokenBatch:
    return pairs_of(np.random.default_rng(0), count)


def alone(apply, params, ids) -> np.ndarray:
    """Returns the hidden state [D] of the last token of one text without padding."""
    ids = jnp.asarray(ids)[None]
    places = jnp.arange(ids.shape[1])[None]
    return np.asarray(apply(params, ids, positions_BL=places, segment_ids_BL=jnp.ones_like(ids)).hidden_BLD[0])


def texts(batch: TokenBatch) -> list[np.ndarray]:
    flat = flat_rows(batch)
    return [row[: int(size)] for row, size in zip(flat.tokens, flat.segment_ids.sum(-1), strict=True)]


# Rewards


def test_bradley_terry_equals_its_golden_values():
    rewards = jnp.array([[1.2, 0.4], [-0.3, 0.1]])
    np.testing.assert_allclose(bradley_terry(rewards, jnp.zeros(2)), [0.37110067, 0.91301525], rtol=1e-6)


def test_a_reward_is_that_of_an_answer_alone():
    apply, params = model(1)
    made = pairs()
    want = np.array([alone(apply, params, ids)[-1] @ np.asarray(params["score"])[:, 0] for ids in texts(made)])
    for batch in (made, longer(made, 9)):
        found = RewardConfig().build(None).read(apply, params, flat_rows(batch))
        np.testing.assert_allclose(found[:, 0], want, rtol=1e-4, atol=1e-5)
    c, r = want.reshape(-1, 2).T
    loss, metrics = RewardConfig(center_rewards_coefficient=0.1).build(None).loss(apply, params, {}, made, None)
    np.testing.assert_allclose(loss.value(), np.mean(-log_sigmoid(c - r) + 0.1 * (c + r) ** 2), rtol=1e-4)
    assert float(metrics["reward_accuracy"].value()) == pytest.approx(np.mean(c > r))
    size = np.array([len(ids) for ids in texts(made)]).reshape(-1, 2)
    longer_wins = (c > r)[size[:, 0] > size[:, 1]]
    assert float(metrics["reward_accuracy_longer"].value()) == pytest.approx(longer_wins.mean())


def test_margins_and_centering_are_all_that_a_shift_of_rewards_changes():
    apply, params = model(1)
    made = pairs()
    value = lambda config, batch: float(config.build(None).loss(apply, params, {}, batch, None)[0].value())
    apart = ColumnBatch(*made, {"margin": np.full(4, 0.7, np.float32)})
    plain = RewardConfig(center_rewards_coefficient=0.0)
    assert value(plain, apart) > value(plain, made)
    c, r = np.asarray(plain.build(None).read(apply, params, flat_rows(made))).reshape(-1, 2).T
    assert value(plain, apart) == pytest.approx(float(np.mean(-log_sigmoid(c - r - 0.7))), rel=1e-5)
    reward = jnp.array([[1.2, 0.4]])
    assert float(bradley_terry(reward + 5, jnp.zeros(1))[0]) == pytest.approx(
        float(bradley_terry(reward, jnp.zeros(1))[0])
    )


def test_padding_and_rows_of_nothing_change_no_reward_loss():
    apply, params = model(1)
    made = pairs()
    wide = longer(made, 17)
    padded = TokenBatch(*(np.concatenate([field, np.zeros_like(field[:1])]) for field in wide))
    objective = RewardConfig().build(None)
    total = lambda batch: lambda p: objective.loss(apply, p, {}, batch, None)[0].total
    np.testing.assert_allclose(total(made)(params), total(padded)(params), rtol=1e-5)
    one, two = jax.grad(total(made))(params), jax.grad(total(padded))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


def test_packed_pairs_are_rewarded_as_padded_ones():
    apply, params = model(1)
    made, rows = pairs(), [[3, 1], [0, 2]]
    margins = np.array([0.5, 0.1, 0.9, 0.0], np.float32)
    padded = ColumnBatch(*made, {"margin": margins[:, None]})
    packed = ColumnBatch(*in_rows(made, rows), {"margin": margins[rows]})

    def evaluated(batch: ColumnBatch, per_row: int):
        objective = RewardConfig(margins=True, pairs_per_row=per_row).build(None)
        rows, _, length = batch.tokens.shape
        assert jax.tree.map(np.shape, batch) == jax.tree.map(lambda x: x.shape, objective.batch_spec(rows, length))
        loss = lambda params: objective.loss(apply, params, {}, batch, None)
        grads = jax.grad(lambda params: loss(params)[0].total)(params)
        total, metrics = loss(params)
        return {"loss": total.value(), **{name: mean.value() for name, mean in metrics.items()}}, grads

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, evaluated(packed, 2), evaluated(padded, 1))


def test_a_new_reward_model_says_nothing_yet():
    config = ModelConfig(num_layers=1, embed_dim=32, vocab_size=V, num_labels=1, dtype=Dtype.float32)
    params = init_params(config, jax.random.key(0))
    assert "head" not in params and params["score"].shape == (32, 1)
    loss, _ = RewardConfig().build(None).loss(make_apply(config), params, {}, pairs(), None)
    assert float(loss.value()) == pytest.approx(np.log(2), rel=1e-6)


# Classes


def packed() -> tuple[TokenBatch, list[tuple[np.ndarray, int]]]:
    """Returns two rows of three texts each, and the texts with their classes."""
    rng = np.random.default_rng(0)
    fields, there = [], []
    for _ in range(2):
        row = [np.zeros(L, t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)]
        at = 0
        for segment, size in enumerate((5, 7, 8), 1):
            ids, label = rng.integers(1, V, size), int(rng.integers(0, 3))
            row[0][at : at + size] = ids
            row[1][at : at + size] = [*ids[1:], label]
            row[2][at + size - 1] = 1
            row[3][at : at + size], row[4][at : at + size] = segment, np.arange(size)
            there.append((ids, label))
            at += size
        fields.append(row)
    return TokenBatch(*(np.stack(column) for column in zip(*fields, strict=True))), there


@pytest.mark.parametrize("pooling", Pooling, ids=lambda pooling: pooling.name)
def test_packed_texts_are_judged_as_each_alone(pooling):
    apply, params = model(3)
    batch, there = packed()
    config = ClassificationConfig(pooling=pooling, class_weights=[1.0, 2.0, 0.5], label_smoothing=0.1)
    nll, weights, right = [], [], []
    for ids, label in there:
        hidden = alone(apply, params, ids)
        logits = (hidden[-1] if pooling is Pooling.last else hidden.mean(0)) @ np.asarray(params["score"])
        target = np.full(3, 0.1 / 3) + 0.9 * (np.arange(3) == label)
        nll.append(-np.sum(target * np.asarray(jax.nn.log_softmax(logits))))
        weights.append(config.class_weights[label])
        right.append(logits.argmax() == label)
    objective = config.build(None)
    loss, metrics = objective.loss(apply, params, {}, batch, None)
    np.testing.assert_allclose(loss.value(), np.average(nll, weights=weights), rtol=1e-4)
    assert float(metrics["accuracy"].value()) == pytest.approx(np.mean(right))
    outputs = jax.jit(lambda p, f, b: objective.eval_outputs(apply, p, f, b))
    found = {"a": collect_outputs(outputs, params, {}, [batch, batch])}
    assert found["a"][0].shape == (12, 3) and found["a"][1].tolist() == 2 * [label for _, label in there]
    report = report_outputs(objective, found)
    assert report["eval/a/f1"] == report["eval/f1"]


def test_means_of_texts_never_mix():
    batch, _ = packed()
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(2, L, 4)), jnp.float32)
    mean = np.asarray(pool(hidden, batch, Pooling.mean))
    for row, end in zip(*np.nonzero(batch.loss_mask), strict=True):
        own = np.asarray(hidden[row])[batch.segment_ids[row] == batch.segment_ids[row, end]]
        np.testing.assert_allclose(mean[row, end], own.mean(0), rtol=1e-5, atol=1e-6)


def test_the_last_token_is_found_wherever_padding_stands():
    values = jnp.arange(12.0).reshape(2, 6, 1)
    right, left = jnp.array([[1, 1, 1, 0, 0, 0]]), jnp.array([[0, 0, 0, 1, 1, 1]])
    assert at_end(values, jnp.concatenate([right, left]))[:, 0].tolist() == [2.0, 11.0]


def test_reports_equal_those_of_hand():
    probability = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2]])
    found = class_report(probability, np.array([0, 0, 1, 1]))
    assert found == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "roc_auc": 0.75})
    assert "roc_auc" not in class_report(probability, np.zeros(4, int))


# Vectors


def matches(sides: int, count: int = 4) -> TokenBatch:
    rng = np.random.default_rng(2)
    parts = [pairs_of(rng, count) for _ in range(2)]
    return TokenBatch(*(np.concatenate(f, 1)[:, :sides] for f in zip(*parts, strict=True)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", [0, 1])
def test_contrast_equals_cross_entropy_in_float64(negatives, symmetric):
    apply, params = model(0)
    made = matches(2 + negatives)
    vectors = np.array([alone(apply, params, ids).astype(np.float64).mean(0) for ids in texts(made)])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    by_side = vectors.reshape(4, 2 + negatives, -1)
    candidates = np.concatenate([by_side[:, side] for side in range(1, 2 + negatives)])
    logits = by_side[:, 0] @ candidates.T / 0.05
    entropy = lambda x: np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1) - np.diagonal(x)
    want = entropy(logits)
    if symmetric:
        want = (want + entropy(logits[:, :4].T)) / 2
    objective = ContrastiveConfig(negatives=negatives, symmetric=symmetric).build(None)
    loss, metrics = objective.loss(apply, params, {}, made, None)
    np.testing.assert_allclose(loss.value(), want.mean(), rtol=1e-4)
    assert float(metrics["accuracy"].value()) == pytest.approx(np.mean(logits.argmax(1) == np.arange(4)))
    nothing = TokenBatch(*(np.concatenate([field, np.zeros_like(field[:2])]) for field in longer(made, 7)))
    padded, _ = objective.loss(apply, params, {}, nothing, None)
    np.testing.assert_allclose(padded.value(), loss.value(), rtol=1e-5)
    np.testing.assert_allclose(objective.read(apply, params, flat_rows(made)), vectors, atol=1e-5)


@pytest.mark.parametrize(
    "config,said",
    [
        (RewardConfig(center_rewards_coefficient=-1.0), "objective.center_rewards_coefficient=-1.0"),
        (ClassificationConfig(class_weights=[1.0, 0.0]), "objective.class_weights"),
        (ClassificationConfig(label_smoothing=1.0), "objective.label_smoothing"),
        (ContrastiveConfig(temperature=0.0), "objective.temperature"),
        (ContrastiveConfig(negatives=-1), "objective.negatives"),
    ],
)
def test_values_that_cannot_be_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        check_ranges(config, "objective")


def test_classes_must_be_named():
    for classes in (0, 1):
        with pytest.raises(ValueError, match="needs at least two"):
            ClassificationConfig().check_classes(classes)
    with pytest.raises(ValueError, match="3 weights for 2 classes"):
        ClassificationConfig(class_weights=[1.0] * 3).check_classes(2)
