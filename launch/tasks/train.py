"""`meshwright train`: the loop of any phase, with everything around it that a run folder promises."""

import dataclasses
import json
from contextlib import ExitStack
from typing import Any

import jax

from configs.schema import Resume, RunConfig, TrainConfig, to_plain
from launch.assemble import Core, Corpora, build_core, build_evaluation, build_source, load_corpora
from launch.run_folder import RunFolder, environment, refuse_drift, run_folder, write_whole
from launch.writing import write_samples
from trainer import hooks
from trainer.checkpoint import Checkpointer
from trainer.goodput import Ledger
from trainer.loop import DONE, Hook, fit
from trainer.metrics import TrainMetrics
from trainer.optimizer import eval_params
from trainer.plot import draw_loss
from trainer.state import TrainState
from trainer.tracker import Trackers, build_trackers

EXIT_PREEMPTED = 75


def say(text: str) -> None:
    """One line to the user, from process 0 alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


def check_resume(config: RunConfig, folder: RunFolder, steps: list[int]) -> None:
    """Raises: ValueError where `resume` forbids what there is, or a key changed that the checkpoints depend on."""
    if not steps and config.resume is Resume.must:
        raise ValueError(f"resume=must: {folder.checkpoints} holds no checkpoint; resume=auto begins afresh")
    if steps and config.resume is Resume.never:
        raise ValueError(
            f"resume=never: the run {folder.name!r} has checkpoints up to step {steps[-1]}; give another run=NAME, "
            "or resume=auto to go on with it"
        )
    if steps and folder.config.exists():
        refuse_drift(folder.saved_config(), config, folder.name)


def initial_state(config: RunConfig, core: Core, checkpointer: Checkpointer) -> tuple[TrainState, int | None, str]:
    """The state to begin with, the checkpoint that it came from, and one line that says what was done."""
    step = checkpointer.latest_whole()
    if step is None:
        state = core.init_state()
        if config.init_from is None:
            return state, None, f"beginning run {config.run!r}"
        params, origin = core.load_params(config.init_from)
        return dataclasses.replace(state, params=params), None, f"beginning run {config.run!r} with the weights of {origin}"
    if "optimizer" in config.reset:
        fresh = core.init_state()
        params = checkpointer.restore_params(step, core.abstract.params)
        state = dataclasses.replace(fresh, params=params, step=fresh.step + step)
    else:
        state = checkpointer.restore(step, core.abstract).state
    if "step" in config.reset:
        state = dataclasses.replace(state, step=state.step * 0)
    forgotten = f", without its {' and '.join(config.reset)}" if config.reset else ""
    return state, step, f"resuming run {config.run!r} at step {step}{forgotten}"
