"""`meshwright replay run=NAME`: repeats the updates before a rollback and finds the rows with the highest loss."""

import dataclasses
import json
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np

from configs.schema import RunConfig
from configs.tasks import Format, ReplayConfig
from launch import rollbacks
from launch.build import Core
from launch.corpora import load_corpora
from launch.initial_state import build_run
from launch.multihost import is_main_process, log
from launch.run_folder import RunFolder, run_folder
from trainer.objective import Params
from trainer.reliability.loss_spikes import NO_LIMITS, WATCHED

EXCERPT = 160  # characters of a row to print


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints loss and gradient norm of each update up to the incident, whether they match, and the worst rows.

    Raises: ValueError if the incident does not exist, or its checkpoint has been deleted.
    """
    task = config.task
    assert isinstance(task, ReplayConfig)
    folder = run_folder(config)
    saved = dataclasses.replace(folder.saved_config(), output_dir=config.output_dir, run=config.run)
    name, incident = select_incident(folder, task.rollback)
    with ExitStack() as stack:
        checkpointer = stack.enter_context(folder.checkpointer(read_only=True, say=log))
        first = incident["rolled_back_to"]
        if first not in checkpointer.steps():
            raise ValueError(
                f"task.rollback={name}: rolled back to step {first}, whose checkpoint has been deleted "
                f"(checkpoint.max_to_keep={saved.checkpoint.max_to_keep}); the batch is in "
                f"{folder.rollbacks / name}.npz"
            )
        corpora = load_corpora(saved, folder, log)
        saved, core, _, frozen, source = build_run(saved, corpora, checkpointer)
        stack.callback(source.close)
        state = checkpointer.restore(first, core.abstract).state
        source.set_state(checkpointer.read_json(first, "source"))
        source.skip_to(incident["rows"][0])
        values: dict[str, float] = {}
        updates, params, batch = [], state.params, None
        for step in range(first + 1, incident["step"] + 1):
            batch = source.next_batch(state)
            params = jax.tree.map(lambda leaf: leaf.copy(), state.params) if step == incident["step"] else None
            state, metrics = core.train_step(state, frozen.models, batch, NO_LIMITS)
            values = {key: float(jax.device_get(metrics[key])) for key in WATCHED}
            updates.append({"step": step, **values})
            if task.format is not Format.json:
                log(f"step {step}: " + ", ".join(f"{key} {value:.6g}" for key, value in values.items()))
    same = {key: str(value) for key, value in values.items()} == incident["values"]
    by_token = saved.objective.model_needs.is_token_level
    rows = worst_rows(core, params, frozen.models, batch, task.rows) if by_token else []
    start = incident["batch_rows"][0]
    shown = [{"row": start + row, "loss": loss, "text": text_of(corpora.tokenizer, batch, row)} for row, loss in rows]
    if is_main_process():
        if task.format is Format.json:
            print(json.dumps({"incident": name, "same": same, "updates": updates, "rows": shown}, indent=2))
        else:
            recorded = ", ".join(f"{key} {value}" for key, value in incident["values"].items())
            print(
                f"bit-identical to the recorded values ({recorded})"
                if same
                else f"differs from the recorded values: {recorded}; another mesh or machine rounds differently"
            )
            for row in shown:
                print(f"row {row['row']}: loss {row['loss']:.4f}  {row['text']!r}")
    return 0


def select_incident(folder: RunFolder, name: str | None) -> tuple[str, dict[str, Any]]:
    """Returns an incident by name, STEP-N; None: the newest. Raises: ValueError if it does not exist."""
    known = rollbacks.by_name(folder)
    if not known:
        raise ValueError(f"run={folder.name}: has no rollbacks; {folder.rollbacks} is empty")
    if name is not None and name not in known:
        raise ValueError(f"task.rollback={name}: no such incident of {folder.name}; known: {', '.join(known)}")
    name = name or [*known][-1]
    return name, known[name]


def worst_rows(core: Core, params: Params, frozen: Any, batch: Any, count: int) -> list[tuple[int, float]]:
    """Returns (row, loss) of the rows with the highest individual loss, non-finite ones first."""
    loss_of = jax.jit(
        lambda mask, params, frozen, batch: core.eval_step(
            params, frozen, batch._replace(loss_mask=batch.loss_mask * mask)
        )["loss"].value()
    )
    size = batch.loss_mask.shape[0]
    losses = []
    for row in range(size):
        mask = np.zeros((size, *[1] * (batch.loss_mask.ndim - 1)), np.float32)
        mask[row] = 1
        losses.append(float(jax.device_get(loss_of(mask, params, frozen, batch))))
    order = sorted(range(size), key=lambda row: (np.isfinite(losses[row]), -losses[row]))
    return [(row, losses[row]) for row in order[:count]]


def text_of(tokenizer: Any, batch: Any, row: int) -> str:
    """Decodes the start of a row; returns "" if another process holds it."""
    for shard in batch.tokens.addressable_shards:
        first = shard.index[0].start or 0
        if first <= row < first + shard.data.shape[0]:
            return tokenizer.decode(np.asarray(shard.data)[row - first].tolist())[:EXCERPT]
    return ""
