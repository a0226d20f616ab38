"""Configs and synthetic batches for benchmarks."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def composed(overrides: Iterable[str]) -> Any:
    """Returns the `RunConfig` of command-line overrides."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from configs.schema import register, to_typed

    register()
    GlobalHydra.instance().clear()
    with initialize_config_module(config_module="configs", version_base="1.3"):
        return to_typed(compose("root", overrides=list(overrides)))


def one_document(tokens: np.ndarray) -> Any:
    """The `TokenBatch` of ids [B, L + 1], each row a document."""
    from data.batch import TokenBatch

    ids = tokens.astype(np.int32)
    ones = np.ones((len(ids), ids.shape[1] - 1), np.int32)
    positions = np.broadcast_to(np.arange(ones.shape[1], dtype=np.int32), ones.shape)
    return TokenBatch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)


def drawn(vocab: int, batch: int, length: int, seed: int = 1):
    """Ids [batch, length + 1] without end, as frequent as words are (Zipf)."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, vocab + 1)
    while True:
        yield rng.choice(vocab, (batch, length + 1), p=share / share.sum()).astype(np.int64)


def built(overrides: Iterable[str]) -> tuple[Any, Any]:
    """The core of a command line, and a batch on its devices."""
    from launch.build import build_core

    config = composed(overrides)
    core = build_core(config, None)
    ids = next(drawn(core.model.vocab_size, core.batch_size, config.data.seq_len))
    return core, core.place(one_document(ids))
