"""Reference synchronization (TR-DPO) and NEFTune noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import apply_updates

from configs.ranges import check_ranges
from data.batch import TokenBatch
from models.layers import neftune_noise
from models.transformer import init_params, make_apply, param_axes
from tests.trainer.test_preference import APPLY, MODEL, PARAMS, batch
from trainer.mesh import MeshConfig, make_mesh
from trainer.objective import REFERENCE, Sync
from trainer.objectives.preference import Loss, PreferenceConfig
from trainer.optimizers.adamw import AdamWConfig
from trainer.optimizers.eval_params import eval_params
from trainer.reference_sync import ReferenceSyncState, reference_from_state, with_reference_sync
from trainer.schedule import ConstantConfig
from trainer.sharding import ShardingRules, param_shardings
from trainer.state import abstract_state, make_state
from trainer.step import make_train_step

MOVING = PreferenceConfig(ref_model_sync_steps=2, ref_model_mixup_alpha=0.6)


def optimizer(config=MOVING, **changes):
    inner = AdamWConfig(**changes).build(ConstantConfig(warmup_steps=0).build(1e-2, 10), param_axes(MODEL))
    return with_reference_sync(inner, config.frozen_needs.synced)


def train(steps: int, num_microbatches: int = 1, **changes):
    made = batch(np.random.default_rng(0), 4)
    state = make_state(lambda _: PARAMS[0], optimizer(**changes), jax.random.key(0))
    step = jax.jit(make_train_step(MOVING.build(None), APPLY, optimizer(**changes), num_microbatches=num_microbatches))
    states, metrics = [state], {}
    for _ in range(steps):
        state, metrics = step(state, {}, made)
        states.append(state)
    return states, metrics


def leaves(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_the_reference_moves_every_so_many_updates_by_its_share():
    states, _ = train(4)
    policy, reference = (
        [leaves(part(s)) for s in states] for part in (lambda s: s.params, lambda s: s.opt_state.reference)
    )
    np.testing.assert_array_equal(reference[0], policy[0])
    np.testing.assert_array_equal(reference[1], reference[0])
    np.testing.assert_allclose(reference[2], 0.4 * reference[0] + 0.6 * policy[2], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(reference[3], reference[2])
    np.testing.assert_allclose(reference[4], 0.4 * reference[2] + 0.6 * policy[4], rtol=1e-6, atol=1e-7)


def test_the_loss_reads_the_reference_that_moved():
    states, metrics = train(3)
    at = states[2]
    fixed = PreferenceConfig().build(None)
    want, _ = fixed.loss(APPLY, at.params, reference_from_state(at.opt_state), batch(np.random.default_rng(0), 4), None)
    assert float(metrics["loss"]) == pytest.approx(float(want.value()), rel=1e-5)
    stale, _ = fixed.loss(APPLY, at.params, {REFERENCE: PARAMS[0]}, batch(np.random.default_rng(0), 4), None)
    assert float(stale.value()) != pytest.approx(float(want.value()), rel=1e-3)


def test_microbatches_change_nothing_and_an_average_is_still_found():
    (one, _), (two, _) = train(3, ema_decay=0.9), train(3, num_microbatches=2, ema_decay=0.9)
    np.testing.assert_allclose(leaves(one[-1].opt_state.reference), leaves(two[-1].opt_state.reference), atol=2e-4)
    assert np.abs(leaves(eval_params(one[-1])) - leaves(one[-1].params)).max() > 0


def test_the_reference_lies_as_the_parameters_do():
    mesh, rules = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ShardingRules()
    shapes = jax.eval_shape(lambda key: init_params(MODEL, key), jax.random.key(0))
    shardings = param_shardings(param_axes(MODEL), shapes, mesh, rules)
    state = abstract_state(lambda key: init_params(MODEL, key), optimizer(), param_shardings=shardings)
    assert isinstance(state.opt_state, ReferenceSyncState)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state.opt_state.reference, state.params)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"ref_model_sync_steps": 2, "precompute_ref_log_probs": True}, "cannot be precomputed"),
        ({"ref_model_sync_steps": 2, "loss_type": Loss.cpo}, "objective.loss_type=cpo has no reference"),
        (
            {"ref_model_mixup_alpha": 1.5},
            "objective.ref_model_mixup_alpha=1.5: must be above 0 and at most 1; nearest valid: 1",
        ),
        ({"use_weighting": True, "loss_type": Loss.aot}, "has no pairs to weight"),
    ],
)
def test_values_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check_ranges(PreferenceConfig(**changes), "objective")
        PreferenceConfig(**changes).build(None)


def test_noise_is_scaled_by_the_length_of_each_document():
    segments = np.array([[1] * 4 + [2] * 16 + [0] * 4])
    found = np.asarray(neftune_noise(jnp.zeros((1, 24, 64)), jnp.asarray(segments), 5.0, jax.random.key(0)))[0]
    for segment, tokens in ((1, 4), (2, 16)):
        part, bound = found[segments[0] == segment], 5 / np.sqrt(tokens * 64)
        assert np.abs(part).max() <= bound and np.abs(part).max() > 0.9 * bound
        assert part.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert not found[segments[0] == 0].any()


def test_noise_is_the_steps_own_and_evaluation_has_none():
    made = batch(np.random.default_rng(0), 2)
    flat = TokenBatch(*(field.reshape(-1, field.shape[-1]) for field in made))
    given = {"positions_BL": flat.positions, "segment_ids_BL": flat.segment_ids}
    loud = make_apply(MODEL, neftune_alpha=5.0)
    value = lambda apply, rng: np.asarray(apply(PARAMS[0], flat.tokens, **given, rng=rng).hidden_BLD)
    np.testing.assert_array_equal(value(loud, None), value(APPLY, None))
    one, other = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(value(loud, one), value(loud, one))
    assert np.abs(value(loud, one) - value(loud, other)).max() > 1e-3
    np.testing.assert_array_equal(value(APPLY, one), value(APPLY, None))  # the model has no dropout


def test_each_role_is_a_field_of_the_state_and_follows_by_its_own_rule():
    inner = AdamWConfig().build(ConstantConfig(warmup_steps=0).build(1e-2, 10), param_axes(MODEL))
    made = with_reference_sync(inner, {"reference": Sync(2, 0.6), "critic": Sync(1, 1.0)})
    state = made.init(PARAMS[0])
    assert state._fields == ("inner", "reference", "critic") and set(reference_from_state(state)) == {
        "reference",
        "critic",
    }
    grads = jax.tree.map(jnp.ones_like, PARAMS[0])
    updates, state = made.update(grads, state, PARAMS[0], step=jnp.asarray(0))
    np.testing.assert_array_equal(leaves(state.reference), leaves(PARAMS[0]))
    np.testing.assert_allclose(leaves(state.critic), leaves(apply_updates(PARAMS[0], updates)), rtol=1e-6)
    assert with_reference_sync(inner, {}) is inner
