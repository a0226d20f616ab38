"""KTO objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ranges import check_ranges
from data.batch import ColumnBatch
from tests.trainer.test_preference import APPLY, PARAMS, L, batch, longer, summed
from trainer.objective import REFERENCE
from trainer.objectives.kto import LABEL, KtoConfig, Loss, losses

RATIOS = jnp.array([1.0, -1.0])
GOLDEN = [(1, (0.47876279, 0.52871836)), (0, (0.48375572, 0.50874911))]


def judged(rows: int = 4) -> ColumnBatch:
    made = batch(np.random.default_rng(0), rows)
    return ColumnBatch(*made, {LABEL: np.arange(rows, dtype=np.float32) % 2})


def run(made: ColumnBatch, params=PARAMS[0], **changes):
    return KtoConfig(**changes).build(None).loss(APPLY, params, {REFERENCE: PARAMS[1]}, made, None)


@pytest.mark.parametrize(("good", "want"), GOLDEN)
def test_losses_equal_their_golden_values(good, want):
    ratios = jnp.array([1.0, -1.0]) if good else jnp.array([-0.5, 0.5])
    found = losses(ratios, jnp.full(2, good), jnp.float32(0.15), KtoConfig())
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("loss", Loss, ids=lambda loss: loss.name)
def test_where_policy_and_reference_are_one_each_answer_costs_half_its_weight(loss):
    objective = KtoConfig(loss_type=loss, desirable_weight=1.2, undesirable_weight=0.8).build(None)
    mean, metrics = objective.loss(APPLY, PARAMS[0], {REFERENCE: PARAMS[0]}, judged(), None)
    assert float(mean.value()) == pytest.approx(0.5, rel=1e-6) and float(metrics["z0"].value()) == 0
    assert float(metrics["reward_good"].weight) == 2


def test_the_loss_is_that_of_answers_alone_and_z0_of_the_other_ones():
    made = judged()
    apart = summed(PARAMS[0], made) - summed(PARAMS[1], made)
    z0 = max(0.0, apart[:, 1].mean())
    want = losses(jnp.asarray(apart[:, 0]), made.columns[LABEL], jnp.float32(z0), KtoConfig())
    mean, metrics = run(made)
    assert float(mean.value()) == pytest.approx(float(want.mean()), rel=1e-5)
    assert float(metrics["z0"].value()) == pytest.approx(z0, abs=1e-4)
    padded = ColumnBatch(*longer(made[:5], 9), made.columns)  # type: ignore[arg-type]
    assert float(run(padded)[0].total) == pytest.approx(float(mean.total), rel=1e-5)


def test_z0_has_no_gradient_and_answers_of_one_kind_are_no_trouble():
    made = judged()
    for label in (0.0, 1.0):
        same = made._replace(columns={LABEL: np.full(4, label, np.float32)})
        grad = jax.grad(lambda p, same=same: run(same, p)[0].total)(PARAMS[0])
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))
    # The other answers' tokens act through z0 alone: below 0 it is cut off, and they do not act at all.
    grad = jax.grad(lambda p: run(made, p, loss_type=Loss.apo_zero)[0].total)(PARAMS[0])
    tokens = made.tokens.copy()
    tokens[:, 1] = 7
    other = jax.grad(lambda p: run(made._replace(tokens=tokens), p, loss_type=Loss.apo_zero)[0].total)(PARAMS[0])
    jax.tree.map(np.testing.assert_array_equal, grad, other)


def test_rows_of_padding_have_no_part_and_what_the_reference_said_before_is_what_it_says():
    made = judged()
    empty = ColumnBatch(
        *(np.concatenate([x, np.zeros_like(x[:2])]) for x in made[:5]), {LABEL: np.zeros(6, np.float32)}
    )
    empty.columns[LABEL][:4] = made.columns[LABEL]
    assert float(run(empty)[0].value()) == pytest.approx(float(run(made)[0].value()), rel=1e-5)
    objective = KtoConfig(precompute_ref_log_probs=True).build(None)
    kept = made._replace(columns={**made.columns, **objective.columns(APPLY, {REFERENCE: PARAMS[1]}, made)})
    assert {n: x.shape for n, x in kept.columns.items()} == {
        n: x.shape for n, x in objective.batch_spec(4, L).columns.items()
    }
    assert float(objective.loss(APPLY, PARAMS[0], {}, kept, None)[0].total) == float(run(made)[0].total)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"beta": 0.0}, "objective.beta=0.0: must be above 0"),
        ({"desirable_weight": -1.0}, "desirable_weight=-1.0: must be at least 0"),
    ],
)
def test_values_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check_ranges(KtoConfig(**changes), "objective")
