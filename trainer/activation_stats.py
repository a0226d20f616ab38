"""How far activations move in the first steps of training, by layer: the coordinate check of width transfer.

Yang, Hu et al. 2022 [2203.03466], appendix D.1: where rates and initialisation follow from the width, a step moves each
coordinate of the activations by as much at every width; where they do not, by more the wider the model is.

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
    """After a step on each batch, mean |change since the start| of a number of what each layer gives of `probe`, under
    `layer 1` and so on, and of the logits.
    """
    look = jax.jit(partial(_activations, apply, num_layers))
    first = look(state.params, probe)
    real_BL = (probe.segment_ids > 0).astype(jnp.float32)

    @jax.jit
    def moved(now: jax.Array, first: jax.Array) -> jax.Array:
        change_BL = jnp.abs(now.astype(jnp.float32) - first.astype(jnp.float32)).mean(-1)
        return (change_BL * real_BL).sum() / real_BL.sum()

    found = []
    for batch in batches:
        state, _ = train_step(state, {}, batch, NO_LIMITS)
        now = look(state.params, probe)
        layers = {f"layer {i + 1}": moved(now[0][i], first[0][i]) for i in range(num_layers)}
        found.append({name: float(value) for name, value in (layers | {LOGITS: moved(now[1], first[1])}).items()})
    return found


def _activations(apply: Apply, num_layers: int, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """[P, B, L, D] of all layers, and the logits [B, L, V]."""
    rows = {"positions_BL": batch.positions, "segment_ids_BL": batch.segment_ids}
    output = apply(params, batch.tokens, **rows, asked=CaptureSpec(tuple(range(num_layers))))
    assert output.inside is not None
    return output.inside.hidden_PBLD, logits(output)


def slope(widths: Iterable[float], sizes: Iterable[float]) -> float:
    """Of log size over log width: 0 where the width does not matter, 1 where twice as wide moves twice as far."""
    return float(np.polyfit(np.log(list(widths)), np.log(list(sizes)), 1)[0])
