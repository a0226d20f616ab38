"""muP coordinate check: per-layer activation change over the first training steps.

Yang, Hu et al. 2022 [2203.03466], appendix D.1: under muP, one step changes each activation coordinate by the same
amount at every width; under the standard parametrization, the change grows with the width.

Shape letters: P layers, B batch, L length, D model, V vocab.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.captures import CaptureSpec
from models.transformer import Apply, logits
from trainer.objective import Batch, Params
from trainer.reliability.loss_spikes import NO_LIMITS
from trainer.state import TrainState

LOGITS = "logits"


def activation_changes(
    apply: Apply, train_step: Any, state: TrainState, batches: Iterable[Batch], probe: Batch, num_layers: int
) -> list[dict[str, float]]:
    """Returns the mean absolute activation change since initialization on `probe`, after a step on each batch.

    Keys: `layer 1`, `layer 2`, ... for the layer outputs, and `LOGITS`.
    """
    activations = jax.jit(partial(_activations, apply, num_layers))
    first = activations(state.params, probe)
    real_BL = (probe.segment_ids > 0).astype(jnp.float32)

    @jax.jit
    def mean_change(now: jax.Array, first: jax.Array) -> jax.Array:
        change_BL = jnp.abs(now.astype(jnp.float32) - first.astype(jnp.float32)).mean(-1)
        return (change_BL * real_BL).sum() / real_BL.sum()

    found = []
    for batch in batches:
        state, _ = train_step(state, {}, batch, NO_LIMITS)
        now = activations(state.params, probe)
        changes = {f"layer {i + 1}": mean_change(now[0][i], first[0][i]) for i in range(num_layers)}
        changes[LOGITS] = mean_change(now[1], first[1])
        found.append({name: float(value) for name, value in changes.items()})
    return found


def _activations(apply: Apply, num_layers: int, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs of all layers [P, B, L, D] and the logits [B, L, V]."""
    rows = {"positions_BL": batch.positions, "segment_ids_BL": batch.segment_ids}
    output = apply(params, batch.tokens, **rows, capture=CaptureSpec(tuple(range(num_layers))))
    assert output.captures is not None
    return output.captures.hidden_PBLD, logits(output)


def slope(widths: Iterable[float], sizes: Iterable[float]) -> float:
    """Returns the slope of log(size) over log(width): 0 if independent of width, 1 if proportional to it."""
    return float(np.polyfit(np.log(list(widths)), np.log(list(sizes)), 1)[0])
