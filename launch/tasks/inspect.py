"""`meshwright inspect run=NAME [step=K]`: prints the contents of a checkpoint, with hashes for comparison."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from configs.schema import RunConfig
from configs.tasks import Format, InspectConfig
from data.batch import ColumnBatch, TokenBatch, flat_rows
from data.loader import batch_hash
from data.records.encoding import DataFormat, marked_text
from data.tokenizers.tokenizer import Tokenizer
from launch.build import build_source
from launch.corpora import load_corpora
from launch.load_run import SavedRun, open_run
from launch.multihost import is_main_process
from models.flops import num_params, params_bytes
from trainer.checkpoint.checksums import state_hash


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints step, sizes, hashes and data position of one checkpoint; `format=json` prints JSON."""
    task = config.task
    assert isinstance(task, InspectConfig)
    saved = open_run(config, overrides)
    state = saved.state()
    found: dict[str, Any] = {
        "run": saved.folder.name,
        "step": int(state.step),
        "checkpoints": saved.checkpointer.steps(),
        "parameters": num_params(saved.core.model)["total"],
        "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(saved.trained.abstract.params)),
        "parameter_bytes": params_bytes(saved.core.abstract.params),
        "saved_on": saved.checkpointer.read_json(saved.step, "config")["mesh"],
        "params_sha256": state_hash(state.params),
        "optimizer_sha256": state_hash(state.opt_state),
    }
    if saved.config.data.sources:
        found |= next_batch(saved)
    if not is_main_process():
        return 0
    if task.format is Format.json:
        print(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            value = str(value).replace("\n", "\n" + " " * (width + 2)) if name == "next_example" else value
            print(f"{name:<{width}}  {f'{value:,}' if isinstance(value, int) else value}")
    return 0


def next_batch(saved: SavedRun) -> dict[str, Any]:
    """Returns the data position, the hash of the next global batch, and its first example."""
    position = saved.checkpointer.read_json(saved.step, "source")
    original = saved.folder.saved_config()
    merged = dataclasses.replace(saved.config, data=original.data)
    corpora = load_corpora(merged, saved.folder, lambda text: None)
    source = build_source(merged, corpora, saved.core)
    source.batch_size = original.data.batch_size
    source.set_state(position)
    batch = source.global_batch()
    found = {"data_position": position["next_index"], "next_batch_sha256": batch_hash(batch)}
    transform = original.data.transform.build(corpora.tokenizer, original.data.seq_len)
    if original.data.format is not DataFormat.text or transform is not None:
        in_place = transform is not None and transform.same_place
        found["next_example"] = first_example(corpora.tokenizer, batch, in_place=in_place)
    return found


def first_example(tokenizer: Tokenizer, batch: TokenBatch | ColumnBatch, *, in_place: bool) -> str:
    """Renders the first example of a batch, of a pair the chosen one; tokens in the loss are between ⟦ and ⟧.

    `in_place`: targets belong to the positions of their tokens, and are printed after them.
    """
    batch = flat_rows(batch)
    size = int((batch.segment_ids[0] == 1).sum())
    if in_place:
        interleaved = np.stack([batch.tokens[0, :size], batch.targets[0, :size]], 1).reshape(
            -1
        )  # each token, then its target
        hidden = batch.loss_mask[0, :size] > 0
        shown = np.stack([np.ones(size, bool), hidden], 1).reshape(-1)
        return marked_text(tokenizer, interleaved[shown].tolist(), (np.arange(2 * size) % 2 == 1)[shown].tolist())
    trained = [False, *(batch.loss_mask[0, : size - 1] > 0).tolist()]  # shifted: the mask is of targets
    return marked_text(tokenizer, batch.tokens[0, :size].tolist(), trained)
