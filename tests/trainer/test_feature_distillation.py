"""Feature distillation: hidden states and attention maps of selected layers, and their distance from a teacher's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import adamw

from configs.ranges import check_ranges
from models.captures import CaptureSpec
from models.config import AttentionConfig, Dtype, ModelConfig, MoEConfig, Remat
from models.transformer import init_params, make_apply, param_axes
from tests.trainer.test_distillation import batch
from trainer.mesh import MeshConfig, make_mesh
from trainer.objective import TEACHER, FrozenModel
from trainer.objective_params import (
    OBJECTIVE_PARAMS,
    init_objective_params,
    objective_param_axes,
    with_objective_params,
)
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.feature_distillation import (
    PROJECTION,
    FeatureLossConfig,
    Hidden,
    Maps,
    attention_distance,
    hidden_distance,
)
from trainer.sharding import ShardingRules, batch_sharding, make_constrain, param_shardings
from trainer.state import init_sharded_state
from trainer.step import make_train_step

V = 40
HEADS = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
STUDENT = ModelConfig(num_layers=2, embed_dim=32, vocab_size=V, dtype=Dtype.float32, init_std=0.2, attention=HEADS)
WIDE = ModelConfig(
    num_layers=4, embed_dim=48, vocab_size=V, dtype=Dtype.float32, init_std=0.2,
    attention=AttentionConfig(num_heads=6, num_kv_heads=6, head_dim=8),
)  # fmt: skip
PARAMS, TAUGHT = init_params(STUDENT, jax.random.key(0)), init_params(WIDE, jax.random.key(1))
MATCH = FeatureLossConfig(layer_mapping=[[0, 1], [1, 3]], attention_loss_weight=0.5, teacher_dim=48)
TEACHING = FrozenModel(TAUGHT, make_apply(WIDE), V)


def config(match: FeatureLossConfig = MATCH, **changes) -> DistillationConfig:
    return dataclasses.replace(DistillationConfig(teacher="t", feature_loss=match), **changes)


def with_projection(match: FeatureLossConfig, params=PARAMS):
    return {**params, **init_objective_params(match.extra_params(STUDENT), jax.random.key(5))}


def run(match: FeatureLossConfig, made, params, teacher=TEACHING, **changes):
    objective = config(match, **changes).build(None)
    return objective.loss(make_apply(STUDENT), params, {TEACHER: teacher}, made, None)


@pytest.mark.parametrize("remat", [Remat.none, Remat.full], ids=lambda remat: remat.name)
def test_layers_that_are_asked_for_are_those_of_a_shorter_model(remat):
    made = batch(2)
    given = {"positions_BL": made.positions, "segment_ids_BL": made.segment_ids}
    model = dataclasses.replace(WIDE, remat=remat)
    shown = make_apply(model)(TAUGHT, made.tokens, **given, capture=CaptureSpec((3, 1), True, True)).captures
    assert shown is not None and shown.attention_PBNLS.shape[:3] == (2, 2, 6)
    cut = {**TAUGHT, "layers": jax.tree.map(lambda x: x[:2], TAUGHT["layers"])}
    short = dataclasses.replace(WIDE, num_layers=2)
    other = make_apply(short)(cut, made.tokens, **given, capture=CaptureSpec((1,), True, True)).captures
    np.testing.assert_allclose(shown.hidden_PBLD[1], other.hidden_PBLD[0], atol=1e-5)
    np.testing.assert_allclose(shown.attention_PBNLS[1], other.attention_PBNLS[0], atol=1e-6)
    np.testing.assert_allclose(shown.attention_PBNLS.sum(-1), 1.0, atol=1e-5)
    apart = made.segment_ids[:, :, None] != made.segment_ids[:, None, :]
    assert not np.asarray(shown.attention_PBNLS)[:, apart[:, None].repeat(6, 1)].any()


def test_layers_are_numbered_through_stacks_of_two_kinds():
    experts = MoEConfig(num_experts=4, experts_per_token=2, intermediate_dim=16, first_num_dense_layers=1)
    model = dataclasses.replace(STUDENT, moe=experts)
    params, made = init_params(model, jax.random.key(0)), batch(1)
    given = {"positions_BL": made.positions, "segment_ids_BL": made.segment_ids}
    plain = make_apply(model)(params, made.tokens, **given)
    asked = make_apply(model)(params, made.tokens, **given, capture=CaptureSpec((0, 1)))
    assert plain.captures is None and asked.captures is not None
    np.testing.assert_array_equal(plain.hidden_BLD, asked.hidden_BLD)
    assert (np.abs(np.asarray(asked.captures.hidden_PBLD)).max((1, 2, 3)) > 0).all()
    assert np.abs(asked.captures.hidden_PBLD[0] - asked.captures.hidden_PBLD[1]).max() > 0


@pytest.mark.parametrize("hidden", Hidden, ids=lambda kind: kind.name)
@pytest.mark.parametrize("maps", Maps, ids=lambda kind: kind.name)
def test_a_student_that_is_its_teacher_is_at_no_distance(hidden, maps):
    match = FeatureLossConfig(
        layer_mapping=[[0, 0], [1, 1]], hidden_loss=hidden, attention_loss=maps, attention_loss_weight=1.0
    )
    same = FrozenModel(PARAMS, make_apply(STUDENT), V)
    value = lambda params: run(match, batch(), params, same, alpha=1.0)[0].total
    total, grad = jax.value_and_grad(value)(PARAMS)
    assert float(total) == pytest.approx(0, abs=1e-3)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grad)) < 2e-3
    _, metrics = run(match, batch(), PARAMS, same)
    assert metrics["hidden_distance"].value() < 1e-6 and metrics["attention_distance"].value() < 1e-6


def test_the_loss_is_the_weighted_sum_and_what_is_masked_has_no_part():
    made, params = batch(), with_projection(MATCH)
    plain = DistillationConfig(teacher="t").build(None)
    teacher = FrozenModel(TAUGHT, make_apply(WIDE), V)
    without = plain.loss(make_apply(STUDENT), PARAMS, {TEACHER: teacher}, made, None)[0]
    found, metrics = run(MATCH, made, params)
    added = metrics["hidden_distance"].total + 0.5 * metrics["attention_distance"].total
    assert float(found.total) == pytest.approx(float(without.total + added), rel=1e-5)
    assert float(found.weight) == made.loss_mask.sum() == float(metrics["hidden_distance"].weight)
    # The tokens of a document that does not contribute to the loss are irrelevant.
    silent = made._replace(loss_mask=np.where(made.segment_ids == 2, 0, made.loss_mask).astype(np.float32))
    other = silent._replace(tokens=np.where(made.segment_ids == 2, 7, made.tokens).astype(np.int32))
    assert float(run(MATCH, silent, params)[0].total) == pytest.approx(
        float(run(MATCH, other, params)[0].total), rel=1e-6
    )


def test_the_projection_learns_and_microbatches_add_up():
    made, params = batch(8), with_projection(MATCH)
    objective, teacher = config().build(None), FrozenModel(TAUGHT, make_apply(WIDE), V)
    value = lambda params, made: objective.loss(make_apply(STUDENT), params, {TEACHER: teacher}, made, None)[0].total
    whole = jax.grad(value)(params, made)
    halves = [jax.grad(value)(params, type(made)(*(x[i::2] for x in made))) for i in range(2)]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, atol=2e-3, rtol=1e-4), whole, *halves)
    assert float(jnp.abs(whole[OBJECTIVE_PARAMS][PROJECTION]).max()) > 0


def test_a_mesh_changes_nothing():
    made, objective = batch(8), config().build(None)
    results = []
    for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        mesh, rules = make_mesh(mesh), ShardingRules()
        constrain, extras = make_constrain(mesh, rules), MATCH.extra_params(STUDENT)
        init = with_objective_params(extras, lambda key: init_params(STUDENT, key))
        axes = {**param_axes(STUDENT), **objective_param_axes(extras)}
        shardings = param_shardings(axes, jax.eval_shape(init, jax.random.key(0)), mesh, rules)
        state = init_sharded_state(init, adamw(1e-2), jax.random.key(0), param_shardings=shardings)
        apply, taught = make_apply(STUDENT, constrain), make_apply(WIDE, constrain)
        step = jax.jit(make_train_step(objective, apply, adamw(1e-2), num_microbatches=2))
        placed = jax.device_put(made, batch_sharding(mesh, rules))
        losses = []
        for _ in range(3):
            state, metrics = step(state, {TEACHER: FrozenModel(TAUGHT, taught, V)}, placed)
            losses.append(float(metrics["loss"]))
        results.append(losses)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"layer_mapping": [[0, 1, 2]]}, "is not a pair"),
        ({"hidden_loss_weight": -1.0}, "objective.feature_loss.hidden_loss_weight=-1.0: must be at least 0"),
        ({"hidden_loss_weight": 0.0, "attention_loss_weight": 0.0}, "both loss weights are 0"),
        ({"layer_mapping": []}, "objective.feature_loss.layer_mapping=.*no layers to compare; set pairs"),
    ],
)
def test_values_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check_ranges(config(dataclasses.replace(MATCH, **changes)), "objective")
        config(dataclasses.replace(MATCH, **changes)).build(None)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"teacher_dim": None}, "width 32 in the student and 48 in the teacher; set it to 48"),
        ({"layer_mapping": [[0, 4]]}, "the teacher has no layer 4; choose 0 to 3"),
        ({"layer_mapping": [[2, 1]]}, "the student has no layer 2"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        config(dataclasses.replace(MATCH, **changes)).check_frozen_model(TEACHER, STUDENT, WIDE)


@pytest.mark.parity
@pytest.mark.parametrize("kind", [*Hidden, *Maps], ids=lambda kind: f"{type(kind).__name__.lower()} {kind.name}")
def test_distances_equal_those_of_torch(kind, measured):
    torch = pytest.importorskip("torch")
    F, rng = torch.nn.functional, np.random.default_rng(0)
    if isinstance(kind, Hidden):
        student, teacher = rng.normal(size=(2, 3, 8, 16)), rng.normal(size=(2, 3, 8, 24))
        projection = rng.normal(size=(16, 24))
        ours = lambda x: hidden_distance(
            kind, x, jnp.asarray(teacher, jnp.float32), jnp.asarray(projection, jnp.float32)
        )
        theirs = lambda x: x @ torch.tensor(projection)
        mse = lambda x: F.mse_loss(theirs(x), torch.tensor(teacher), reduction="none").mean(-1).mean(0)
        cosine = lambda x: (1 - F.cosine_similarity(theirs(x), torch.tensor(teacher), dim=-1)).mean(0)
        want = mse if kind is Hidden.mse else cosine
    else:
        student, teacher = (rng.dirichlet(np.ones(8), (2, 3, 4, 8)) for _ in range(2))
        ours = lambda x: attention_distance(kind, x, jnp.asarray(teacher, jnp.float32))
        mse = lambda x: F.mse_loss(x, torch.tensor(teacher), reduction="none").sum(-1).mean(2).mean(0)
        kl = lambda x: F.kl_div(x.log(), torch.tensor(teacher), reduction="none").sum(-1).mean(2).mean(0)
        want = mse if kind is Maps.mse else kl
    given = torch.tensor(student, requires_grad=True)
    value = want(given).sum()
    value.backward()
    found, grad = jax.value_and_grad(lambda x: ours(x).sum())(jnp.asarray(student, jnp.float32))
    apart, scale = abs(float(found) / value.item() - 1), float(np.abs(given.grad.numpy()).max())
    far = float(np.abs(grad - given.grad.numpy()).max()) / scale
    assert apart < 1e-5 and far < 1e-4
    measured(
        "Hidden states and attention vs. torch",
        f"{type(kind).__name__.lower()}, {kind.name}",
        loss=apart,
        gradient=far,
    )
