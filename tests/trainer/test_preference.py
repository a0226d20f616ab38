import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ranges import check_ranges
from data.batch import ColumnBatch, TokenBatch
from models.config import Dtype, ModelConfig
from models.transformer import init_params, logits, make_apply
from trainer.objective import REFERENCE
from trainer.objectives.preference import (
    LOSSES,
    FDivergence,
    Loss,
    Pairs,
    PreferenceConfig,
    apply_f_divergence,
    log1mexp,
)

PAIRS = Pairs(
    policy=jnp.array([[-10.0, -12.0], [-20.0, -18.0]]),
    reference=jnp.array([[-11.0, -11.5], [-19.0, -18.5]]),
    lengths=jnp.array([[5.0, 6.0], [8.0, 4.0]]),
)
SMOOTH = {"label_smoothing": 0.1}
# In float64 from the formulas of the papers, with beta 0.1 where nothing else is said.
GOLDEN = {
    (Loss.sigmoid, ()): (0.62095705, 0.77095705),
    (Loss.sigmoid, (("label_smoothing", 0.1),)): (0.63595705, 0.75595705),
    (Loss.robust, (("label_smoothing", 0.1),)): (0.60220705, 0.78970705),
    (Loss.hinge, ()): (0.85, 1.15),
    (Loss.ipo, ()): (22.24694444, 27.5625),
    (Loss.sigmoid_norm, ()): (0.67908086, 0.7057253),
    (Loss.exo, (("label_smoothing", 0.1),)): (0.43138846, 0.59587201),
    (Loss.nca, ()): (1.35082481, 1.42582481),
    (Loss.bco, ()): (1.31285631, 1.46285631),
    (Loss.sppo, ()): (36.25, 66.25),
    (Loss.aot, ()): (0.62095705, 0.77095705),  # each at the pair of the upper value
    (Loss.aot_unpaired, ()): (0.66845965, 0.71845965),
    (Loss.apo_zero, ()): (0.96252342, 1.03747658),
    (Loss.apo_down, ()): (0.98754934, 1.01245066),
    (Loss.discopop, ()): (0.84933758, 0.78949474),
    (Loss.simpo, (("beta", 2.0), ("simpo_gamma", 1.0))): (1.31326169, 0.04858735),
    (Loss.cpo, ()): (0.59813887, 0.79813887),
    (Loss.orpo, (("beta", 1.0),)): (0.69314718, 0.11833561),
}
AT_REFERENCE = {
    Loss.sigmoid: np.log(2), Loss.robust: np.log(2), Loss.hinge: 1.0, Loss.ipo: 25.0, Loss.sigmoid_norm: np.log(2),
    Loss.nca: 2 * np.log(2), Loss.bco: 2 * np.log(2), Loss.sppo: 50.0, Loss.aot: np.log(2),
    Loss.aot_unpaired: np.log(2), Loss.apo_zero: 1.0, Loss.apo_down: 1.0, Loss.discopop: (np.log(2) + 1) / 2,
}  # fmt: skip
L, V = 24, 40
MODEL = ModelConfig(num_layers=2, embed_dim=32, vocab_size=V, max_seq_len=64, dtype=Dtype.float32)


@pytest.mark.parametrize("loss,changes", GOLDEN, ids=str)
def test_losses_equal_their_golden_values(loss, changes):
    found = LOSSES[loss](PAIRS, PreferenceConfig(loss_type=loss, **dict(changes)))
    # The sorted losses have no pairs, only an order.
    order = np.sort if "aot" in loss.name else np.asarray
    np.testing.assert_allclose(order(found), order(GOLDEN[loss, changes]), rtol=1e-5)


@pytest.mark.parametrize(
    "kind,want",
    [
        (FDivergence.forward_kl, (0.63115438, 0.80429878)),
        (FDivergence.jensen_shannon, (0.66065216, 0.73598645)),
        (FDivergence.reverse_kl, (0.62095705, 0.77095705)),
    ],
)
def test_f_divergences_equal_their_golden_values(kind, want):
    np.testing.assert_allclose(
        LOSSES[Loss.sigmoid](apply_f_divergence(PAIRS, kind), PreferenceConfig()), want, rtol=1e-5
    )


def test_every_loss_has_a_golden_value():
    assert {loss for loss, _ in GOLDEN} == set(Loss) == set(LOSSES)


@pytest.mark.parametrize("loss", AT_REFERENCE, ids=str)
def test_losses_begin_at_their_known_value_where_policy_and_reference_are_one(loss):
    same = PAIRS._replace(policy=PAIRS.reference)
    np.testing.assert_allclose(LOSSES[loss](same, PreferenceConfig(loss_type=loss)), AT_REFERENCE[loss], rtol=1e-5)


def test_the_gradient_of_dpo_is_its_closed_form():
    loss = lambda policy: LOSSES[Loss.sigmoid](PAIRS._replace(policy=policy), PreferenceConfig()).sum()
    delta = np.array([1.5, -1.5])
    weight = -0.1 / (1 + np.exp(0.1 * delta))
    np.testing.assert_allclose(jax.grad(loss)(PAIRS.policy), np.stack([weight, -weight], 1), rtol=1e-5)


def test_doubling_an_answer_changes_dpo_but_not_simpo():
    doubled = PAIRS._replace(policy=PAIRS.policy * 2, reference=PAIRS.reference * 2, lengths=PAIRS.lengths * 2)
    value = lambda loss, pairs: np.asarray(LOSSES[loss](pairs, PreferenceConfig(loss_type=loss)))
    np.testing.assert_allclose(value(Loss.simpo, doubled), value(Loss.simpo, PAIRS), rtol=1e-6)
    assert (value(Loss.sigmoid, doubled) != value(Loss.sigmoid, PAIRS)).all()


def test_log1mexp_is_right_at_both_ends():
    x = np.array([-50.0, -5.0, -0.7, -0.69, -1e-3, -1e-6])
    np.testing.assert_allclose(log1mexp(jnp.asarray(x)), np.log1p(-np.exp(x)), rtol=2e-5)
    assert np.isfinite(jax.grad(lambda x: log1mexp(x).sum())(jnp.asarray(x))).all()


def batch(rng, pairs: int, length: int = L) -> TokenBatch:
    """Returns pairs with a shared prompt of 5 tokens and answers of 3 to 15."""
    shape = (pairs, 2, length)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for b in range(pairs):
        prompt = rng.integers(1, V, 5)
        for s in range(2):
            answer = rng.integers(1, V, rng.integers(3, 16))
            size = 5 + len(answer)
            tokens[b, s, :size] = [*prompt, *answer]
            mask[b, s, 4 : size - 1] = 1
            segments[b, s, :size], positions[b, s, :size] = 1, np.arange(size)
    return TokenBatch(tokens, np.roll(tokens, -1, -1), mask, segments, positions)


def longer(made: TokenBatch, by: int) -> TokenBatch:
    return TokenBatch(*(np.pad(field, ((0, 0), (0, 0), (0, by))) for field in made))


PARAMS = [init_params(MODEL, jax.random.key(seed)) for seed in (0, 1)]
APPLY = make_apply(MODEL)


def run(config: PreferenceConfig, made: TokenBatch, params=PARAMS[0]):
    loss, metrics = config.build(None).loss(APPLY, params, {REFERENCE: PARAMS[1]}, made, None)
    return loss, {name: float(mean.value()) for name, mean in metrics.items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"ld_alpha": 0.3}, {"loss_type": Loss.ipo, "nll_weight": 0.2}, {"pairs_per_row": 2}],
    ids=str,
)
def test_what_the_reference_said_before_is_what_it_says(changes):
    """Bit-identical, because both are computed the same way."""
    made, config = batch(np.random.default_rng(0), 4), PreferenceConfig(precompute_ref_log_probs=True, **changes)
    objective = config.build(None)
    columns = objective.columns(APPLY, {REFERENCE: PARAMS[1]}, made)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), columns) == jax.tree.map(
        lambda x: (x.shape, x.dtype), objective.batch_spec(4, L).columns
    )
    online = jax.value_and_grad(lambda p: objective.loss(APPLY, p, {REFERENCE: PARAMS[1]}, made, None)[0].total)
    later = jax.value_and_grad(lambda p: objective.loss(APPLY, p, {}, ColumnBatch(*made, columns), None)[0].total)
    jax.tree.map(np.testing.assert_array_equal, later(PARAMS[0]), online(PARAMS[0]))


def summed(params, made: TokenBatch) -> np.ndarray:
    """Reference [B, 2] in float64, row by row and without padding."""
    found = np.zeros(made.tokens.shape[:2])
    for b, s in np.ndindex(found.shape):
        size = int(made.segment_ids[b, s].sum())
        ids = jnp.asarray(made.tokens[b, s, :size])[None]
        positions = jnp.arange(size)[None]
        x = APPLY(params, ids, positions_BL=positions, segment_ids_BL=jnp.ones_like(positions))
        logprobs = jax.nn.log_softmax(logits(x)[0].astype(jnp.float32))
        found[b, s] = sum(float(logprobs[t, ids[0, t + 1]]) for t in range(4, size - 1))
    return found


@pytest.mark.parametrize("loss", [Loss.sigmoid, Loss.ipo, Loss.simpo, Loss.orpo])
def test_batches_give_what_answers_alone_give(loss):
    config, made = PreferenceConfig(loss_type=loss), batch(np.random.default_rng(0), 3)
    pairs = Pairs(*(jnp.asarray(summed(p, made)) for p in PARAMS), jnp.asarray(made.loss_mask.sum(-1)))
    value, metrics = run(config, made)
    np.testing.assert_allclose(value.value(), LOSSES[loss](pairs, config).mean(), rtol=1e-4)
    assert metrics["logprob_chosen"] == pytest.approx(float(pairs.policy[:, 0].mean()), rel=1e-5)
    assert float(value.weight) == 3


def test_padding_changes_nothing():
    made = batch(np.random.default_rng(1), 3)
    wide = longer(made, 17)
    padded = TokenBatch(*(np.concatenate([field, np.zeros_like(field[:1])]) for field in wide))  # and a row of nothing
    config = PreferenceConfig(nll_weight=0.5)
    grad = lambda made: jax.grad(lambda p: run_sum(config, p, made))(PARAMS[0])
    (plain, one), (other, two) = run(config, made), run(config, padded)
    assert float(plain.value()) == pytest.approx(float(other.value()), rel=1e-6)
    assert one == pytest.approx(two, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grad(made), grad(padded))


def in_rows(made: TokenBatch, places: list[list[int]]) -> TokenBatch:
    """Packs the pairs of each list into one row."""
    fields = [np.zeros((len(places), *field.shape[1:]), field.dtype) for field in longer(made, 2 * L)]
    for row, pairs in enumerate(places):
        for side in range(2):
            at = 0
            for number, pair in enumerate(pairs, 1):
                size = int(made.segment_ids[pair, side].sum())
                for field, of in zip(fields, made, strict=True):
                    field[row, side, at : at + size] = of[pair, side, :size]
                fields[3][row, side, at : at + size] = number
                at += size
    return TokenBatch(*fields)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ld_alpha": 0.3},
        {"loss_type": Loss.aot},
        {"loss_type": Loss.aot_unpaired},
        {"loss_type": Loss.simpo, "nll_weight": 0.5},
        {"loss_type": Loss.orpo, "nll_weight": 1.0, "nll_on_prompt": True},
        {"use_weighting": True},
    ],
    ids=str,
)
def test_packed_and_padded_give_the_same(changes):
    """Same loss, metrics and gradients with rows of three, one and no pairs, in another order."""
    made, config = batch(np.random.default_rng(3), 4), PreferenceConfig(**changes)
    packed, many = in_rows(made, [[2, 0, 3], [1], []]), dataclasses.replace(config, pairs_per_row=3)
    (plain, one), (other, two) = run(config, made), run(many, packed)
    assert float(other.weight) == 4
    assert float(other.value()) == pytest.approx(float(plain.value()), rel=1e-5)
    assert two == pytest.approx(one, rel=1e-4)
    grad = lambda config, made: jax.grad(lambda p: run_sum(config, p, made))(PARAMS[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grad(config, made), grad(many, packed)
    )


def run_sum(config: PreferenceConfig, params, made: TokenBatch) -> jax.Array:
    return config.build(None).loss(APPLY, params, {REFERENCE: PARAMS[1]}, made, None)[0].total


@pytest.mark.parametrize("nll", [0.0, 1.0])
def test_pairs_add_up_over_microbatches(nll):
    made = batch(np.random.default_rng(2), 4)
    config = PreferenceConfig(nll_weight=nll, nll_on_prompt=True)
    parts = [TokenBatch(*(field[i : i + 2] for field in made)) for i in (0, 2)]
    grad = lambda made: jax.grad(lambda p: run_sum(config, p, made))(PARAMS[0])
    whole, halves = grad(made), jax.tree.map(jnp.add, *map(grad, parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, halves)


def test_tokens_beyond_the_shorter_answer_may_count_less():
    made = batch(np.random.default_rng(3), 1)
    _, full = run(PreferenceConfig(), made)
    _, none = run(PreferenceConfig(ld_alpha=0.0), made)
    shorter = int(made.loss_mask.sum(-1).min())
    cut = made._replace(loss_mask=made.loss_mask * (np.cumsum(made.loss_mask, -1) <= shorter))
    _, by_hand = run(PreferenceConfig(), cut)
    assert none["reward_margin"] == pytest.approx(by_hand["reward_margin"], rel=1e-5)
    assert none["reward_margin"] != pytest.approx(full["reward_margin"], rel=1e-3)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"beta": 0.0}, "objective.beta=0.0: must be above 0"),
        ({"loss_type": Loss.exo}, "above 0 with objective.loss_type=exo"),
        ({"loss_type": Loss.ipo, "label_smoothing": 0.1}, "not supported with objective.loss_type=ipo"),
        ({"ld_alpha": 2.0}, "from 0 to 1"),
        (
            {"loss_type": Loss.nca, "f_divergence": FDivergence.forward_kl},
            "not supported with objective.loss_type=nca.*objective.loss_type=sigmoid",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        config = dataclasses.replace(PreferenceConfig(), **changes)
        check_ranges(config, "objective")
        config.build(None)
