import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ranges import check_ranges
from data.batch import ColumnBatch, TokenBatch
from models.config import Dtype, ModelConfig
from models.transformer import init_params, make_apply
from trainer.objective import TEACHER, FrozenModel
from trainer.objectives.distillation import CacheDtype, Distillation, DistillationConfig, Divergence, divergence
from trainer.objectives.feature_distillation import FeatureLossConfig
from trainer.objectives.next_token import NextTokenConfig

V, L = 40, 24
STUDENT = ModelConfig(num_layers=1, embed_dim=32, vocab_size=V, dtype=Dtype.float32)
OTHER = ModelConfig(num_layers=2, embed_dim=48, vocab_size=V + 8, dtype=Dtype.float32)  # wider, deeper, and padded
PARAMS, TAUGHT = init_params(STUDENT, jax.random.key(0)), init_params(OTHER, jax.random.key(1))
APPLY = make_apply(STUDENT)
TEACHERS = {
    "other": FrozenModel(TAUGHT, make_apply(OTHER), V),
    "itself": FrozenModel(PARAMS, APPLY, V),
}
S, T = jnp.array([[[1.0, 2.0, 0.5]]]), jnp.array([[[2.0, 1.0, 0.0]]])


def config(**changes) -> DistillationConfig:
    return dataclasses.replace(DistillationConfig(teacher="t", alpha=1.0), **changes)


def batch(rows: int = 4) -> TokenBatch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (rows, L)).astype(np.int32)
    mask = (rng.random((rows, L)) < 0.7).astype(np.float32)
    segments = np.repeat([[1] * (L // 2) + [2] * (L - L // 2)], rows, 0).astype(np.int32)
    positions = np.tile(np.arange(L, dtype=np.int32) % (L // 2), (rows, 1))
    return TokenBatch(tokens, np.roll(tokens, -1, 1), mask, segments, positions)


def run(objective: Distillation, made: TokenBatch, params=PARAMS, teacher: str = "other"):
    return objective.loss(APPLY, params, {TEACHER: TEACHERS[teacher]}, made, None)


GOLDEN = [
    (dict(divergence=Divergence.forward), 0.43226),
    (dict(divergence=Divergence.reverse), 0.41067),
    (dict(divergence=Divergence.jensen_shannon, beta=0.1), 0.03810),
    (dict(divergence=Divergence.jensen_shannon, beta=0.5), 0.10121),
    (dict(divergence=Divergence.jensen_shannon, beta=0.9), 0.03662),
    (dict(temperature=2.0), 0.10462922),
]


@pytest.mark.parametrize("changes,want", GOLDEN, ids=str)
def test_divergences_equal_their_golden_values(changes, want):
    assert float(divergence(T, S, config(**changes))[0, 0]) == pytest.approx(want, abs=6e-6)


@pytest.mark.parametrize("kind", Divergence, ids=lambda kind: kind.name)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    objective = config(divergence=kind, temperature=2.0).build(None)
    grad = jax.grad(lambda params: run(objective, batch(), params, "itself")[0].total)(PARAMS)
    assert float(run(objective, batch(), teacher="itself")[0].value()) == pytest.approx(0, abs=1e-6)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grad)) < 1e-4


def test_without_weight_it_is_cross_entropy():
    want, metrics = NextTokenConfig().build(None).loss(APPLY, PARAMS, {}, batch(), None)
    found, ours = run(config(alpha=0.0).build(None), batch())
    assert float(found.value()) == pytest.approx(float(want.value()), rel=1e-6)
    assert float(ours["nll"].value()) == pytest.approx(float(metrics["nll"].value()), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 24, 100])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    value = lambda size: jax.value_and_grad(
        lambda params: (
            run(config(loss_chunk_size=size, alpha=0.4, temperature=2.0).build(None), batch(), params)[0].total
        )
    )(PARAMS)
    (one, grads), (other, others) = value(chunk), value(12)
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, others)


def test_what_is_masked_is_not_read():
    made = batch()
    other = made._replace(targets=np.where(made.loss_mask > 0, made.targets, 3))
    objective = config(alpha=0.5).build(None)
    assert float(run(objective, made)[0].total) == float(run(objective, other)[0].total)
    assert float(run(objective, made)[0].weight) == made.loss_mask.sum()


def test_rows_add_up_over_microbatches():
    objective, made = config(alpha=0.5).build(None), batch()
    parts = [TokenBatch(*(field[i : i + 2] for field in made)) for i in (0, 2)]
    total = sum(float(run(objective, part)[0].total) for part in parts)
    assert total == pytest.approx(float(run(objective, made)[0].total), rel=1e-6)


def test_padding_of_the_vocabulary_has_no_part():
    """The teacher's vocabulary padding is ignored."""
    filled = {**TAUGHT, "embedding": TAUGHT["embedding"].at[V:].set(50.0)}
    if "head" in TAUGHT:
        filled["head"] = TAUGHT["head"].at[:, V:].set(50.0)
    objective = config().build(None)
    plain = run(objective, batch())[0].total
    changed = objective.loss(APPLY, PARAMS, {TEACHER: FrozenModel(filled, make_apply(OTHER), V)}, batch(), None)[
        0
    ].total
    assert float(plain) == float(changed)


@pytest.mark.parametrize("kind", Divergence, ids=lambda kind: kind.name)
def test_buckets_of_more_tokens_see_more_and_all_of_them_see_all(kind):
    rng = np.random.default_rng(1)
    student, teacher = (jnp.asarray(rng.normal(0, 3, (2, 6, V)), jnp.float32) for _ in range(2))
    value = lambda k: np.asarray(divergence(teacher, student, config(divergence=kind, temperature=1.5, top_k=k)))
    found = [value(k) for k in (1, 2, 8, V - 1, V)]
    for less, more in itertools.pairwise(found):
        assert (less <= more + 1e-6).all()
    np.testing.assert_allclose(found[-1], value(0), rtol=1e-5, atol=1e-6)
    assert found[0].min() > 0  # one token, renormalised, would see nothing


def test_the_gradient_of_buckets_of_all_tokens_is_that_of_the_whole():
    grad = lambda k: jax.grad(lambda p: run(config(top_k=k).build(None), batch(), p)[0].total)(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), grad(V), grad(0))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grad(3)))


@pytest.mark.parametrize(("dtype", "near"), [(CacheDtype.float32, 1e-6), (CacheDtype.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("kind", Divergence, ids=lambda kind: kind.name)
def test_what_a_teacher_said_before_is_what_it_says(kind, dtype, near):
    """Equal up to the rounding of the cache, including gradients and chunking."""
    made = batch()
    stored = dict(top_k=6, cache_teacher_logits=True, cache_dtype=dtype)
    objective = config(divergence=kind, temperature=2.0, alpha=0.7, loss_chunk_size=7, **stored).build(None)
    columns = objective.columns(APPLY, {TEACHER: TEACHERS["other"]}, made)
    spec = objective.batch_spec(4, L)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), columns) == jax.tree.map(
        lambda x: (x.shape, x.dtype), spec.columns
    )
    kept, gone = ColumnBatch(*made, columns), {TEACHER: FrozenModel({}, APPLY, V)}
    online = jax.value_and_grad(lambda p: run(objective, made, p)[0].total)(PARAMS)
    later = jax.value_and_grad(lambda p: objective.loss(APPLY, p, gone, kept, None)[0].total)(PARAMS)
    assert float(later[0]) == pytest.approx(float(online[0]), rel=near)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(online[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5 * near * scale), later[1], online[1])


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"cache_teacher_logits": True}, "objective.cache_teacher_logits=true: caches the top-k tokens"),
        ({"top_k": -1}, "objective.top_k=-1: must be at least 0"),
        (
            {"cache_teacher_logits": True, "top_k": 2, "feature_loss": FeatureLossConfig([[0, 0]])},
            "remove objective.feature_loss.layer_mapping",
        ),
        ({"teacher": None}, "objective.teacher=null"),
        ({"temperature": 0.0}, "objective.temperature=0.0: must be above 0"),
        ({"beta": 1.0}, "objective.beta=1.0: must be above 0 and below 1.*objective.divergence=forward or reverse"),
        ({"alpha": 2.0}, "objective.alpha=2.0: must be from 0 to 1"),
    ],
)
def test_values_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check_ranges(config(**changes), "objective")
        config(**changes).build(None)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_divergences_equal_those_of_trl(beta, measured):
    torch = pytest.importorskip("torch")
    gkd = pytest.importorskip("trl.experimental.gkd")
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(0, 2, (3, 8, 50)).astype(np.float32) for _ in range(2))
    given = torch.tensor(student, requires_grad=True)
    loss = gkd.GKDTrainer.generalized_jsd_loss
    want = loss(given, torch.tensor(teacher), beta=beta, temperature=1.5, reduction="sum")
    want.backward()
    kinds = {0.0: dict(divergence=Divergence.forward), 1.0: dict(divergence=Divergence.reverse)}
    settings = config(temperature=1.5, **kinds.get(beta, dict(divergence=Divergence.jensen_shannon, beta=beta)))
    found, grad = jax.value_and_grad(lambda x: divergence(jnp.asarray(teacher), x, settings).sum())(
        jnp.asarray(student)
    )
    apart, far = abs(float(found) / float(want) - 1), float(np.abs(grad - given.grad.numpy()).max())
    far /= float(np.abs(given.grad.numpy()).max())
    assert apart < 1e-5 and far < 1e-4
    name = settings.divergence.name + (f", beta {beta}" if 0 < beta < 1 else "")
    measured("Divergences of distillation vs. TRL", name, loss=apart, gradient=far)
