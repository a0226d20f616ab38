"""All optimizers in shared tests, then tests of each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from omegaconf import OmegaConf

from configs.ranges import check_ranges
from trainer.mesh import MeshConfig, make_mesh
from trainer.optimizers.adafactor import AdafactorConfig
from trainer.optimizers.adamw import AdamWConfig, scale_by_adam
from trainer.optimizers.eval_params import eval_params
from trainer.optimizers.lion import LionConfig
from trainer.optimizers.muon import MuonConfig
from trainer.optimizers.optimizer import OptimizerConfig, clip_by_global_norm
from trainer.optimizers.param_groups import ParamGroup, matrix_dims, param_groups
from trainer.optimizers.schedule_free import ScheduleFreeConfig
from trainer.optimizers.sgd import SgdConfig
from trainer.optimizers.soap import SoapConfig
from trainer.schedule import ConstantConfig
from trainer.sharding import ShardingRules, param_shardings
from trainer.state import TrainState, abstract_state, init_sharded_state

ALL: dict[type[OptimizerConfig], float] = {  # optimizer -> learning rate that makes progress in 40 updates
    AdamWConfig: 0.05,
    LionConfig: 0.05,
    SgdConfig: 0.02,
    AdafactorConfig: 0.1,
    MuonConfig: 0.2,
    SoapConfig: 0.05,
    ScheduleFreeConfig: 0.1,
}
EACH = pytest.mark.parametrize("cls", ALL)

AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "layers": {
        "query": {
            "kernel": ("layers", "embed", "heads", "head_dim"),
            "bias": ("layers", "heads", "head_dim"),
        },
        "out": ("layers", "heads", "head_dim", "embed"),
        "norm_scale": ("layers", "embed"),
    },
}
SHAPES = {
    "embedding": (16, 8),
    "head": (8, 16),
    "layers": {
        "query": {"kernel": (3, 8, 2, 4), "bias": (3, 2, 4)},
        "out": (3, 2, 4, 8),
        "norm_scale": (3, 8),
    },
}


def tree_of(make, shapes=SHAPES):
    count = iter(range(100))
    return jax.tree.map(lambda shape: make(next(count), shape), shapes, is_leaf=lambda x: isinstance(x, tuple))


def init_params(key: jax.Array) -> dict:
    return tree_of(lambda i, shape: jax.random.normal(jax.random.fold_in(key, i), shape))


PARAMS = init_params(jax.random.key(0))
GRADS = [init_params(jax.random.key(i)) for i in range(1, 6)]


def build(config: OptimizerConfig, axes=AXES, learning_rate: float | None = None):
    rate = config.learning_rate if learning_rate is None else learning_rate
    return config.build(ConstantConfig(warmup_steps=0).build(rate, 100), axes)


def plain(cls: type[OptimizerConfig], **values) -> OptimizerConfig:
    if cls is AdafactorConfig:
        values.setdefault("min_dim_to_factor", 2)
    if cls is SoapConfig:
        values.setdefault("precondition_frequency", 2)
    return cls(**{"weight_decay": 0.0, "max_grad_norm": None, **values})


def run(optimizer, params, grads: list, jit: bool = True, state=None):
    """Applies one update per gradient; returns the parameters and the optimizer state."""

    def step(i, params, state, grad):
        updates, state = optimizer.update(grad, state, params, step=i)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    if state is None:
        state = jax.jit(optimizer.init)(params)
    for i, grad in enumerate(grads):
        params, state = step(jnp.asarray(i), params, state, grad)
    return params, state


def assert_close(a, b, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# Shared tests ------------------------------------------------------------------


@EACH
def test_optimizer_minimizes_a_quadratic(cls: type[OptimizerConfig]) -> None:
    optimizer = build(plain(cls), learning_rate=ALL[cls])
    target = init_params(jax.random.key(9))
    loss = lambda params: sum(
        jnp.sum((p - t) ** 2) for p, t in zip(*map(jax.tree.leaves, (params, target)), strict=True)
    )

    @jax.jit
    def step(carry, i):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, step=i)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (PARAMS, optimizer.init(PARAMS)), jnp.arange(40))
    assert float(loss(carry[0])) < 0.3 * float(loss(PARAMS))


@EACH
def test_jit_and_eager_updates_match(cls: type[OptimizerConfig]) -> None:
    optimizer = build(plain(cls, weight_decay=0.1, max_grad_norm=1.0))
    grads = GRADS[:2] if cls is SoapConfig else GRADS[:1]
    assert_close(run(optimizer, PARAMS, grads)[0], run(optimizer, PARAMS, grads, jit=False)[0], 1e-4)


@EACH
def test_stacked_layers_are_updated_independently(cls: type[OptimizerConfig]) -> None:
    config = plain(cls, weight_decay=0.1)
    stacked, _ = run(build(config), PARAMS, GRADS)
    layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree["layers"])
    axes = jax.tree.map(lambda a: a[1:], AXES["layers"], is_leaf=lambda x: isinstance(x, tuple))
    alone = build(config, axes)
    for i in (0, 2):
        found, _ = run(alone, layer(PARAMS, i), [layer(g, i) for g in GRADS])
        assert_close(found, layer(stacked, i), 2e-4)


@EACH
def test_state_is_sharded_like_its_parameters(cls: type[OptimizerConfig]) -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    shardings = param_shardings(AXES, shapes, mesh, ShardingRules())
    abstract = abstract_state(init_params, build(plain(cls, **_averaged(cls))), param_shardings=shardings)
    by_shape = {s.shape: s.sharding.spec for s in jax.tree.leaves(abstract.params)}
    seen = 0
    for leaf in jax.tree.leaves(abstract.opt_state):
        if leaf.shape in by_shape:
            assert leaf.sharding.spec == by_shape[leaf.shape]
            seen += 1
        elif leaf.size > 8:  # factors and preconditioners keep the sharding of the remaining dims
            assert leaf.sharding.spec != PartitionSpec(), leaf.shape
    assert seen >= len(by_shape)


def _averaged(cls: type[OptimizerConfig]) -> dict:
    return {} if cls is ScheduleFreeConfig else {"ema_decay": 0.9}


@pytest.mark.parametrize("cls", [AdamWConfig, AdafactorConfig, MuonConfig, SoapConfig])
def test_sharded_update_matches_one_device(cls: type[OptimizerConfig]) -> None:
    optimizer = build(plain(cls))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    shardings = param_shardings(AXES, shapes, mesh, ShardingRules())
    state = init_sharded_state(init_params, optimizer, jax.random.key(0), param_shardings=shardings)
    grads = [jax.device_put(g, shardings) for g in GRADS[:3]]
    expected, _ = run(optimizer, jax.device_get(state.params), GRADS[:3])
    found, _ = run(optimizer, state.params, grads, state=state.opt_state)
    assert_close(jax.device_get(found), expected, 1e-4)


@EACH
def test_configs_are_structured_and_keep_their_kind(cls: type[OptimizerConfig]) -> None:
    config = OmegaConf.to_object(OmegaConf.structured(cls))
    assert config == cls()
    assert isinstance(config, OptimizerConfig)
    assert config.kind


# Shared transformations -------------------------------------------------------------


def test_param_groups_follow_axes_and_names() -> None:
    assert param_groups(AXES) == {
        "embedding": ParamGroup.embedding,
        "head": ParamGroup.head,
        "layers": {
            "query": {"kernel": ParamGroup.matrix, "bias": ParamGroup.vector},
            "out": ParamGroup.matrix,
            "norm_scale": ParamGroup.vector,
        },
    }
    assert param_groups({"position_embedding": ("positions", "embed")}) == {"position_embedding": ParamGroup.embedding}


def test_heads_and_head_dim_are_one_side_of_a_matrix() -> None:
    assert matrix_dims(AXES["layers"]["query"]["kernel"]).matrix_shape((3, 8, 2, 4)) == (3, 8, 8)
    assert matrix_dims(AXES["layers"]["out"]).matrix_shape((3, 2, 4, 8)) == (3, 8, 8)
    assert matrix_dims(("embed", "mlp")).matrix_shape((8, 32)) == (1, 8, 32)


def test_weight_decay_excludes_biases_and_norms() -> None:
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    after, _ = run(build(AdamWConfig(weight_decay=0.5), learning_rate=0.1), PARAMS, [zero])
    decayed = jax.tree.map(
        lambda role, p: p if role is ParamGroup.vector else p * (1 - 0.05), param_groups(AXES), PARAMS
    )
    assert_close(after, decayed)


def test_param_groups_have_learning_rate_multipliers() -> None:
    rates = {"embedding": 0.5, "vector": 0.0}
    once, _ = run(build(plain(SgdConfig, lr_multipliers=rates), learning_rate=0.1), PARAMS, GRADS[:1])
    factors = {ParamGroup.embedding: 0.5, ParamGroup.vector: 0.0}
    expected = jax.tree.map(lambda r, p, g: p - 0.1 * factors.get(r, 1) * g, param_groups(AXES), PARAMS, GRADS[0])
    assert_close(once, expected)


def test_clipping_scales_all_gradients_together() -> None:
    once, _ = run(build(plain(SgdConfig, max_grad_norm=1e-2), learning_rate=1.0), PARAMS, GRADS[:1])
    moved = jax.tree.map(lambda a, b: a - b, PARAMS, once)
    np.testing.assert_allclose(optax.global_norm(moved), 1e-2, rtol=1e-3)


@pytest.mark.parametrize("limit", [1e-2, 1e3])
def test_clipping_matches_optax(limit: float) -> None:
    ours, theirs = (make(limit) for make in (clip_by_global_norm, optax.clip_by_global_norm))
    found, wanted = (each.update(GRADS[0], each.init(PARAMS))[0] for each in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


def test_parameter_average_follows_its_formula() -> None:
    params, average = PARAMS, PARAMS
    optimizer = build(plain(SgdConfig, ema_decay=0.25, momentum=0.0), learning_rate=0.1)
    for t, grad in enumerate(GRADS[:3]):
        decay = min(0.25, (1 + t) / (10 + t))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grad)
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, params)
    found, opt_state = run(optimizer, PARAMS, GRADS[:3])
    state = TrainState(jnp.asarray(3), found, opt_state, jax.random.key(0))
    assert_close(found, params)
    assert_close(eval_params(state), average)


def test_without_an_average_the_parameters_are_evaluated() -> None:
    params, opt_state = run(build(AdamWConfig()), PARAMS, GRADS[:1])
    assert eval_params(TrainState(jnp.asarray(1), params, opt_state, jax.random.key(0))) is params


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AdamWConfig(lr_multipliers={"heads": 1.0}),
            r"lr_multipliers\.heads=1\.0: .*valid: embedding, head",
        ),
        (AdamWConfig(max_grad_norm=0.0), r"optimizer\.max_grad_norm=0\.0: .*null"),
        (AdamWConfig(ema_decay=1.0), r"optimizer\.ema_decay=1\.0: "),
        (ScheduleFreeConfig(ema_decay=0.9), r"optimizer\.ema_decay=0\.9: .*ema_decay=null"),
        (SoapConfig(precondition_frequency=0), r"optimizer\.precondition_frequency=0: .*nearest valid: 1"),
    ],
)
def test_invalid_values_are_refused_by_name(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ranges(config, "optimizer")
        build(config)


# Against other implementations ----------------------------------------------


@pytest.mark.parametrize("update_applied", [True, False])
def test_adam_matches_optax(update_applied: bool) -> None:
    """Bit for bit. The state of a dropped update also matches that of optax, because the step discards it."""
    ours, theirs = scale_by_adam(b1=0.8, b2=0.9, eps=1e-3), optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3)
    params = init_params(jax.random.key(0))
    state = ours.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(theirs.init(params))
    for seed in range(3):
        grads = jax.tree.map(lambda p, seed=seed: jnp.cos(p * (seed + 1)), params)
        expected, expected_state = theirs.update(grads, state)
        updates, state = ours.update(grads, state, update_applied=jnp.asarray(update_applied))
        jax.tree.map(np.testing.assert_array_equal, state, expected_state)
        if update_applied:
            jax.tree.map(np.testing.assert_array_equal, updates, expected)
        assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_schedule_free_matches_optax() -> None:
    config = ScheduleFreeConfig(weight_decay=0.0, max_grad_norm=None, learning_rate=0.1)
    theirs = optax.contrib.schedule_free_adamw(0.1, b1=config.b1, b2=config.b2, eps=config.eps)
    params, state = PARAMS, theirs.init(PARAMS)
    update = jax.jit(theirs.update)
    for grad in GRADS:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    found, opt_state = run(build(config), PARAMS, GRADS)
    assert_close(found, params)
    average = eval_params(TrainState(jnp.asarray(5), found, opt_state, jax.random.key(0)))
    assert_close(average, optax.contrib.schedule_free_eval_params(state, params))


@pytest.mark.parametrize("min_dim", [2, 128])
def test_adafactor_of_one_matrix_matches_optax(min_dim: int) -> None:
    params, grads = PARAMS["embedding"], [g["embedding"] for g in GRADS]
    theirs = optax.adafactor(0.1, min_dim_size_to_factor=min_dim)
    state, expected = theirs.init(params), params
    for grad in grads:
        updates, state = theirs.update(grad, state, expected)
        expected = optax.apply_updates(expected, updates)
    config = plain(AdafactorConfig, min_dim_to_factor=min_dim)
    found, _ = run(build(config, {"w": ("vocab", "embed")}, 0.1), {"w": params}, [{"w": g} for g in grads])
    assert_close(found["w"], expected)


def test_muon_orthogonalizes_matrices_and_uses_adam_for_the_rest() -> None:
    after, _ = run(build(plain(MuonConfig, consistent_rms=None), learning_rate=1.0), PARAMS, GRADS[:1])
    adam, _ = run(build(plain(AdamWConfig), learning_rate=1.0), PARAMS, GRADS[:1])
    assert_close(after["embedding"], adam["embedding"])
    assert_close(after["layers"]["norm_scale"], adam["layers"]["norm_scale"])
    moved = np.asarray(PARAMS["layers"]["out"] - after["layers"]["out"]).reshape(3, 8, 8)
    singular = np.linalg.svd(moved, compute_uv=False)
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_muon_update_rms_matches_adam() -> None:
    after, _ = run(build(plain(MuonConfig), learning_rate=1.0), PARAMS, GRADS[:1])
    moved = np.asarray(PARAMS["layers"]["query"]["kernel"] - after["layers"]["query"]["kernel"])
    assert 0.1 < np.sqrt((moved**2).mean()) < 0.3


def soap_reference(grads: list[np.ndarray], config: SoapConfig) -> np.ndarray:
    """Returns the sum of directions for one matrix, in float64, by algorithm 3 of the paper."""
    rows, cols = grads[0].shape
    sides = [size <= config.max_precond_dim for size in (rows, cols)]
    gram = [(1 - config.b2) * grads[0] @ grads[0].T, (1 - config.b2) * grads[0].T @ grads[0]]
    basis = [np.linalg.eigh(g)[1][:, ::-1] if use else np.eye(len(g)) for g, use in zip(gram, sides, strict=True)]
    mu, nu, total = np.zeros((rows, cols)), np.zeros((rows, cols)), np.zeros((rows, cols))
    for t, grad in enumerate(grads[1:], start=1):
        projected = basis[0].T @ grad @ basis[1]
        mu = config.b1 * mu + (1 - config.b1) * grad
        nu = config.b2 * nu + (1 - config.b2) * projected**2
        numerator = basis[0].T @ mu @ basis[1] / (1 - config.b1**t)
        direction = numerator / (np.sqrt(nu / (1 - config.b2**t)) + config.eps)
        total += basis[0] @ direction @ basis[1].T
        for side, outer in enumerate((grad @ grad.T, grad.T @ grad)):
            gram[side] = config.b2 * gram[side] + (1 - config.b2) * outer
            if not sides[side] or t % config.precondition_frequency:
                continue
            eigenvalues = np.diag(basis[side].T @ gram[side] @ basis[side])
            order = np.argsort(-eigenvalues)
            nu = np.take(nu, order, axis=side)
            basis[side] = np.linalg.qr(gram[side] @ basis[side][:, order])[0]
    return total


# For 4 x 6, precondition only the shorter side: one gradient does not determine the basis of the longer one.
@pytest.mark.parametrize(("frequency", "max_dim", "rows"), [(1, 100, 6), (3, 100, 6), (2, 6, 8), (2, 4, 4), (2, 3, 4)])
def test_soap_matches_the_algorithm_of_the_paper(frequency: int, max_dim: int, rows: int) -> None:
    config = plain(SoapConfig, precondition_frequency=frequency, max_precond_dim=max_dim)
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=(2, rows, 2, 3)) for _ in range(8)]  # two layers
    axes = {"w": ("layers", "embed", "heads", "head_dim")}
    zeros = {"w": jnp.zeros((2, rows, 2, 3))}
    found, _ = run(build(config, axes, 1.0), zeros, [{"w": jnp.asarray(g, jnp.float32)} for g in grads])
    for layer in range(2):
        expected = soap_reference([g[layer].reshape(rows, 6) for g in grads], config)
        np.testing.assert_allclose(-found["w"][layer].reshape(rows, 6), expected, rtol=2e-3, atol=2e-3)
