"""The hooks of a training run, in the order in which the loop calls them, and the text samples."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from configs.schema import to_plain
from configs.tasks import TrainConfig
from data.records.chat_encoding import chat_ids, text_after_turn
from data.records.encoding import DataFormat
from launch.build import build_evaluation
from launch.corpora import Corpora
from launch.generation import append_samples, generate_batches, unmasking_of
from launch.initial_state import RunParts
from launch.multihost import is_main_process, log
from launch.run_folder import RunFolder, environment
from models.config import AttentionMask
from models.decode.sampling import SamplingConfig
from trainer import hooks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.loop import Hook
from trainer.objective import Params
from trainer.optimizers.eval_params import eval_params
from trainer.reference_sync import reference_from_state
from trainer.reliability.goodput import GoodputRecorder
from trainer.tracker import Trackers


@dataclass(frozen=True)
class Hooks:
    """All hooks of a run, and those that the run also calls itself."""

    ordered: list[Hook]
    saver: hooks.SaveEvery
    stop_on_signal: hooks.StopOnSignal
    stateful: Mapping[str, hooks.Stateful]  # whose state is saved in checkpoints, by name

    def restore(self, hook_states: dict[str, Any]) -> None:
        """Restores the saved state of all hooks."""
        hooks.restore_hook_states(hook_states, self.stateful)


def build_hooks(
    parts: RunParts,
    corpora: Corpora,
    folder: RunFolder,
    checkpointer: Checkpointer,
    recorder: GoodputRecorder,
    trackers: Trackers,
    stateful: dict[str, hooks.Stateful],
) -> Hooks:
    """Builds: evaluate > sample > save > early stopping > stop on a signal > profile.

    An evaluation comes before the save, which records its loss, and both before a stop, which may save once more.
    `stateful`: what else checkpoints save. Raises: ValueError if early stopping has no validation data.
    """
    config, core = parts.config, parts.core
    task, num_steps = config.task, config.task.num_steps  # type: ignore[attr-defined]
    assert isinstance(task, TrainConfig)
    stateful, ordered, average = dict(stateful), [], jax.jit(eval_params)

    evaluation = None
    if corpora.validation:
        compute = build_evaluation(config, corpora, core, parts.frozen.models, parts.frozen.tables.validation)
        evaluation = hooks.EvaluateEvery(
            task.eval_every,
            num_steps=num_steps,
            evaluate=lambda state: compute(average(state), reference_from_state(state.opt_state)),
            on_metrics=trackers.log,
            ledger=recorder,
        )
        stateful["evaluation"] = evaluation
        ordered.append(evaluation)
    elif task.early_stopping_patience:
        raise ValueError(
            f"task.early_stopping_patience={task.early_stopping_patience}: no source has validation data; set "
            "data.sources.NAME.validation_fraction"
        )

    if generates(parts, corpora):
        sampler = hooks.SampleEvery(
            task.sample_every,
            num_steps=num_steps,
            params_of=average,
            sample=lambda step, params: log_sample(parts, corpora, folder, trackers, step, params),
            ledger=recorder,
        )
        stateful["sample"] = sampler
        ordered.append(sampler)

    early_stopping = None
    if evaluation is not None and task.early_stopping_patience:
        early_stopping = hooks.EarlyStopping(
            evaluation,
            patience=task.early_stopping_patience,
            min_delta=task.early_stopping_min_delta,
            save=lambda step, state, source: saver.save(step, state, source),
        )
        stateful["early_stopping"] = early_stopping
    saver = hooks.SaveEvery(
        checkpointer,
        num_steps=num_steps,
        config={
            "run": to_plain(config),
            "environment": environment(),
            "mesh": dict(core.mesh.shape),
            **parts.frozen.records,
        },
        tokenizer=corpora.tokenizer.files(),
        ledger=recorder,
        remembers=stateful,
        evaluation=evaluation,
        on_saved=lambda step, seconds: trackers.log(step, {"perf/checkpoint_wait": seconds}),
    )
    stop_on_signal = hooks.StopOnSignal(saver.save)
    ordered += [saver, *([] if early_stopping is None else [early_stopping]), stop_on_signal]
    if task.profile_steps:
        first, last = task.profile_steps
        ordered.append(hooks.profile(first, last, folder.path / "profile"))
    return Hooks(ordered, saver, stop_on_signal, stateful)


def generates(parts: RunParts, corpora: Corpora) -> bool:
    """Returns whether text samples are wanted and the model can generate them; logs it if it cannot."""
    config, model = parts.config, parts.core.model
    assert isinstance(config.task, TrainConfig)
    if not config.task.sample_tokens or model.num_labels:
        return False
    is_encoder = model.attention.mask is AttentionMask.bidirectional
    if is_encoder and unmasking_of(config, corpora.tokenizer) is None:
        log("samples: none; an encoder generates no text (sample_tokens=0 turns this message off)")
        return False
    return True


def log_sample(
    parts: RunParts, corpora: Corpora, folder: RunFolder, trackers: Trackers, step: int, params: Params
) -> None:
    """Generates a completion of the sample prompt, or an answer to it, for samples.jsonl and the trackers."""
    config, tokenizer = parts.config, corpora.tokenizer
    task = config.task
    assert isinstance(task, TrainConfig)
    sampling = SamplingConfig(max_new_tokens=task.sample_tokens, temperature=task.sample_temperature, seed=config.seed)
    prompt, encoded, stop = task.sample_prompt, task.sample_prompt, None
    chats = config.data.format is not DataFormat.text and tokenizer.chat_template is not None
    if chats:
        prompt = prompt or "Hello"
        encoded, stop = chat_ids(tokenizer, [{"role": "user", "content": prompt}]), text_after_turn(tokenizer)
    [(text, _)] = generate_batches(
        parts.core.merged_params(params, parts.frozen.models),
        parts.core.model,
        tokenizer,
        [encoded],
        sampling,
        stop=[] if stop is None else [stop],
        constrain=parts.core.constrain,
        unmasking=unmasking_of(config, tokenizer),
    )
    if is_main_process():
        append_samples(folder.samples, step, [prompt], [text])
        trackers.log_text(step, "sample", f"{prompt}\n\n{text.strip()}" if chats else prompt + text)
