"""Loop, hooks, checkpoints and trackers together: an interrupted run equals an uninterrupted one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.checkpoint.checkpointer import CheckpointConfig, Checkpointer
from trainer.checkpoint.checksums import state_hash
from trainer.hooks import EarlyStopping, EvaluateEvery, SaveEvery, StopOnSignal, restore_hook_states
from trainer.loop import StopTraining, fit
from trainer.metrics import Peak, TrainMetrics
from trainer.reliability.goodput import GoodputRecorder
from trainer.state import TrainState, make_state
from trainer.tracker import JsonlTracker, Trackers, read_rows

NUM_STEPS = 9
OPTIMIZER = optax.adam(0.05)


class Counting:
    """A data source whose batch i is a function of i."""

    def __init__(self) -> None:
        self.index = 0

    def next_batch(self, state: Any) -> np.ndarray:
        self.index += 1
        return np.random.default_rng(self.index).normal(size=(4, 3)).astype(np.float32)

    def get_state(self) -> dict[str, Any]:
        return {"index": self.index}

    def set_state(self, saved: dict[str, Any]) -> None:
        self.index = saved["index"]


def loss_of(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.mean((batch @ params["w"] - 1.0 + 0.01 * jax.random.normal(key, (4, 1))) ** 2)


def train_step(state: TrainState, frozen: Any, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(state.rng, state.step)
    loss, grads = jax.value_and_grad(loss_of)(state.params, batch, key)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state, state.rng), {"loss": loss, "tokens": jnp.float32(12)}


STEP = jax.jit(train_step, donate_argnums=0)


def fresh() -> TrainState:
    return make_state(lambda key: {"w": jax.random.normal(key, (3, 1))}, OPTIMIZER, jax.random.key(3))


def run(folder: Path, *, cut_at: int | None = None) -> tuple[str, str]:
    """Starts or resumes the run in `folder`. Returns the reason for its end and the hash of its state."""
    with Checkpointer(folder / "checkpoints", CheckpointConfig(save_interval_steps=2, max_to_keep=2)) as checkpointer:
        initial, source, start = fresh(), Counting(), 0
        ledger = GoodputRecorder(folder / "goodput.json")
        name = TrainMetrics(tokens_per_step=12, flops_per_token=1.0, peak=Peak(0.0, ""))
        losses = lambda state: {"eval/loss": float(jnp.sum(state.params["w"] ** 2))}
        latest = checkpointer.latest_valid_step()
        start = latest or 0
        tracker = Trackers([JsonlTracker(folder / "metrics.jsonl", start_step=start)])
        found = EvaluateEvery(3, num_steps=NUM_STEPS, evaluate=losses, on_metrics=tracker.log, ledger=ledger)
        remembers: dict[str, Any] = {"evaluation": found, "tokens": name}
        save = SaveEvery(
            checkpointer,
            num_steps=NUM_STEPS,
            config={},
            tokenizer={},
            ledger=ledger,
            remembers=remembers,
            evaluation=found,
        )
        patience = EarlyStopping(found, patience=50, save=save.save)
        remembers["patience"] = patience
        if latest is not None:
            initial = checkpointer.restore(latest, initial).state
            source.set_state(checkpointer.read_json(latest, "source"))
            restore_hook_states(checkpointer.read_json(latest, "extra"), remembers)

        def cut(step: int, state: Any, source: Any) -> None:
            if step == cut_at:
                save.save(step, state, source)
                raise StopTraining("cut")

        def report(step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
            tracker.log(step, name(step, metrics, timing))

        with StopOnSignal(save.save) as signals, ledger.phase("step"):
            hooks = [found, save, patience, signals, cut]
            state, reason = fit(initial, {}, source, STEP, num_steps=NUM_STEPS, hooks=hooks, report=report)
        tracker.finish()
        return reason, state_hash(state)


def values(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in read_rows(folder / "metrics.jsonl") if name in row]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    reason, found = run(folder)
    assert reason == "done" and len(values(folder, "train/loss")) == NUM_STEPS
    assert [step for step, _ in values(folder, "eval/loss")] == [3, 6, 9]
    return folder, found


@pytest.mark.parametrize("cuts", [[1], [3], [4, 6], [2, 5, 7, 8], [NUM_STEPS]])
def test_interrupted_run_equals_the_uninterrupted_run(tmp_path, uninterrupted, cuts):
    for step in cuts:
        assert run(tmp_path, cut_at=step)[0] == "cut"
    reason, found = run(tmp_path)
    assert (reason, found) == ("done", uninterrupted[1])
    for name in ("train/loss", "eval/loss", "train/tokens"):  # each row exactly once, with the same value
        assert values(tmp_path, name) == values(uninterrupted[0], name)


def test_restarting_a_finished_run_changes_nothing(tmp_path):
    first = run(tmp_path)
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert run(tmp_path) == first
    assert (tmp_path / "metrics.jsonl").read_text() == rows
