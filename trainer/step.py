"""Train and eval steps as pure functions, independent of phase, model family and mesh."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models.transformer import Apply
from trainer.host_offload import on_device
from trainer.objective import Batch, Mean, Objective, Params
from trainer.reference_sync import reference_from_state
from trainer.schedule import Schedule
from trainer.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Mapping[str, Any], Batch], tuple[TrainState, Metrics]]  # with limits already bound
EvalStep = Callable[[Params, Mapping[str, Any], Batch], dict[str, Mean]]


def make_train_step(
    objective: Objective,
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    schedule: Schedule | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `train_step(state, frozen, batch, limits) -> (state, metrics)`; jit it once, with `state` donated.

    `limits` [2] f32: maximum loss and gradient norm. An update above them is dropped, and so is one with a non-finite
    loss, gradient norm or parameter norm.
    Metrics are f32 scalars: the means of the objective, `loss`, `tokens` (total weight of the loss), `grad_norm`
    (before clipping), `param_norm` (before the update), `dropped` (1 if the update was dropped, otherwise 0) and, with
    a schedule, `learning_rate`.
    """
    update = optax.with_extra_args_support(optimizer).update

    def loss_sum(params: Params, frozen: Mapping[str, Any], batch: Batch, rng: jax.Array):
        loss, metrics = objective.loss(apply, params, frozen, batch, rng)
        return loss.total, _f32({"loss": loss, **metrics})

    def train_step(
        state: TrainState, frozen: Mapping[str, Any], batch: Batch, limits: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        frozen = {**frozen, **reference_from_state(state.opt_state)}
        grads, means = _accumulate(loss_sum, state.params, frozen, batch, rng, num_microbatches)
        weight = means["loss"].weight
        # Normalize once by the total weight of the batch: exact for any split of tokens into microbatches. XLA fuses a
        # product into its consumer, but would materialize a quotient of arrays.
        scale = 1 / jnp.maximum(weight, 1e-9)
        grad_norm = scale * optax.global_norm(grads)  # norm of the sums: that of the means would materialize them
        grads = jax.tree.map(lambda g: g * scale, grads)
        param_norm = optax.global_norm(state.params)
        monitored = jnp.stack([means["loss"].value(), grad_norm])
        within_limits = jnp.isfinite(monitored) & (monitored <= (jnp.inf if limits is None else limits))
        # Depends on the parameter norm too, so all reads of the old weights precede the update; otherwise XLA copies
        # them.
        should_skip = (weight > 0) & ~(within_limits.all() & jnp.isfinite(param_norm))
        # Without any target token, moments must not decay and weights must not drift either.
        update_applied = (weight > 0) & ~should_skip
        old_opt_state = on_device(state.opt_state)
        extra = {"step": state.step, "grad_norm": grad_norm, "update_applied": update_applied}
        # No barrier delays the transfer of offloaded state: waiting for the gradients would load all of it at once.
        updates, opt_state = update(grads, old_opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = optax.tree.where(update_applied, (params, opt_state), (state.params, old_opt_state))
        metrics = {name: mean.value() for name, mean in means.items()}
        metrics |= {
            "tokens": weight,
            "grad_norm": monitored[1],
            "param_norm": param_norm,
            "dropped": should_skip.astype(jnp.float32),
        }
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def _accumulate(
    loss_sum: Callable[..., tuple[jax.Array, dict[str, Mean]]],
    params: Params,
    frozen: Mapping[str, Any],
    batch: Batch,
    rng: jax.Array,
    num_microbatches: int,
) -> tuple[Params, dict[str, Mean]]:
    """Returns the gradients of the summed loss and the summed means, both in f32."""

    def gradients(index: jax.Array | int, part: Batch) -> tuple[Params, dict[str, Mean]]:
        grads, means = jax.grad(loss_sum, has_aux=True)(params, frozen, part, jax.random.fold_in(rng, index))
        return _f32(grads), means

    if num_microbatches == 1:
        return gradients(0, batch)
    parts = jax.tree.map(lambda x: split_rows(x, num_microbatches), batch)

    def body(total: Any, indexed_part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(*indexed_part)), None

    shapes = jax.eval_shape(gradients, 0, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(num_microbatches), parts))
    return total


def split_rows(x: jax.Array, num_microbatches: int) -> jax.Array:
    """Reshapes [B, ...] to [M, B / M, ...]; microbatch m has the rows m, M + m, 2M + m, ...

    Rows of one device are consecutive, so every microbatch is still spread over all devices, without communication.
    """
    rows = x.shape[0]
    if rows % num_microbatches:
        below, above = (
            rows // num_microbatches * num_microbatches,
            (rows // num_microbatches + 1) * num_microbatches,
        )
        raise ValueError(
            f"task.gradient_accumulation_steps={num_microbatches}: does not divide the batch of {rows} rows; "
            f"nearest valid data.batch_size: {', '.join(str(v) for v in (below, above) if v)}"
        )
    return x.reshape(rows // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1)


def make_eval_step(objective: Objective, apply: Apply) -> EvalStep:
    """Returns `eval_step(params, frozen, batch)`, which returns the means of one batch, with `loss`; no dropout."""

    def eval_step(params: Params, frozen: Mapping[str, Any], batch: Batch) -> dict[str, Mean]:
        loss, metrics = objective.loss(apply, params, frozen, batch, None)
        return _f32({"loss": loss, **metrics})

    return eval_step


def _f32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
