import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from configs.ranges import check_ranges
from tests.trainer import toy
from trainer.objectives.next_token import NextTokenConfig

PARAMS = toy.init_params(jax.random.key(0))


def loss_of(config: NextTokenConfig, batch=None, token_bytes: np.ndarray | None = None):
    return config.build(token_bytes).loss(toy.apply, PARAMS, {}, batch or toy.batch(4), None)


def logits64(batch) -> np.ndarray:
    output = toy.apply(PARAMS, batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids)
    return np.asarray(output.hidden_BLD, np.float64) @ np.asarray(output.head_DV, np.float64)


def test_loss_is_the_formula_with_smoothing_and_z_loss() -> None:
    batch = toy.batch(4)
    logits = logits64(batch)
    logsumexp = np.log(np.exp(logits).sum(-1))
    logprobs = logits - logsumexp[..., None]
    nll = -np.take_along_axis(logprobs, batch.targets[..., None], -1)[..., 0]
    # Smoothed targets: 0.9 on the target, 0.1 spread over the vocabulary.
    expected = 0.9 * nll - 0.1 * logprobs.mean(-1) + 0.01 * logsumexp**2
    loss, metrics = loss_of(NextTokenConfig(z_loss=0.01, label_smoothing=0.1, loss_chunk_size=3), batch)
    np.testing.assert_allclose(loss.total, (expected * batch.loss_mask).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"].total, (nll * batch.loss_mask).sum(), rtol=1e-5)
    assert float(loss.weight) == float(metrics["nll"].weight) == batch.loss_mask.sum()


def test_plain_loss_is_the_nll() -> None:
    loss, metrics = loss_of(NextTokenConfig())
    assert float(loss.total) == float(metrics["nll"].total)


def test_dft_weighs_the_gradient_of_each_token_by_its_probability() -> None:
    batch = toy.batch(4)

    def total(params, config: NextTokenConfig, mask: np.ndarray):
        return config.build(None).loss(toy.apply, params, {}, batch._replace(loss_mask=mask), None)[0].total

    probability = np.exp(logits64(batch))
    probability /= probability.sum(-1, keepdims=True)
    probability = np.take_along_axis(probability, batch.targets[..., None], -1)[..., 0]
    plain, dft = NextTokenConfig(), NextTokenConfig(dft=True)
    weighed = (batch.loss_mask * probability).astype(np.float32)
    np.testing.assert_allclose(total(PARAMS, dft, batch.loss_mask), total(PARAMS, plain, weighed), rtol=1e-5)
    found, want = (jax.grad(total)(PARAMS, c, m) for c, m in ((dft, batch.loss_mask), (plain, weighed)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, want)
    assert float(loss_of(dft)[1]["nll"].total) == float(loss_of(plain)[1]["nll"].total)
    with pytest.raises(ValueError, match=r"objective\.label_smoothing=0.1: cannot be combined with objective.dft=true"):
        NextTokenConfig(dft=True, label_smoothing=0.1).build(None)


def test_masked_targets_count_for_nothing() -> None:
    batch = toy.batch(4)
    other = batch._replace(targets=np.where(batch.loss_mask > 0, batch.targets, 0).astype(np.int32))
    assert float(loss_of(NextTokenConfig(), batch)[0].total) == float(loss_of(NextTokenConfig(), other)[0].total)


def test_bytes_are_those_of_the_learnt_targets() -> None:
    token_bytes = np.arange(toy.V, dtype=np.int32) + 1
    batch = toy.batch(4)
    _, metrics = loss_of(NextTokenConfig(), batch, token_bytes)
    assert float(metrics["bytes"].total) == (token_bytes[batch.targets] * batch.loss_mask).sum()
    assert "bytes" not in loss_of(NextTokenConfig())[1]


def test_accuracy_counts_targets_that_were_the_best_guess() -> None:
    batch = toy.batch(4)
    guess = logits64(batch).argmax(-1).astype(np.int32)
    _, metrics = loss_of(NextTokenConfig(), batch._replace(targets=guess))
    assert float(metrics["accuracy"].total) == batch.loss_mask.sum()


def test_batch_spec_is_the_shape_of_a_batch() -> None:
    spec = NextTokenConfig().build(None).batch_spec(4, toy.L)
    for shape, array in zip(spec, toy.batch(4), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
    loss = NextTokenConfig().build(None).loss
    abstract, _ = jax.eval_shape(lambda batch: loss(toy.apply, PARAMS, {}, batch, None), spec)
    assert abstract.total.dtype == jnp.float32


@pytest.mark.parametrize("wrong", [{"loss_chunk_size": 0}, {"label_smoothing": 1.0}, {"z_loss": -1.0}])
def test_wrong_values_are_refused_by_name(wrong: dict) -> None:
    (key, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=rf"objective\.{key}={value}: "):
        check_ranges(NextTokenConfig(**wrong), "objective")


def test_the_config_is_structured() -> None:
    assert OmegaConf.to_object(OmegaConf.structured(NextTokenConfig)) == NextTokenConfig()
