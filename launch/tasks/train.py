"""`meshwright train`: the loop of any phase, with everything around it that a run folder promises."""

import json
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax

from configs.schema import RunConfig, to_plain
from configs.tasks import TrainConfig
from data.records.chat_encoding import chat_ids, text_after_turn
from data.records.encoding import DataFormat
from launch import distributed, exit_codes
from launch import rollbacks as incidents
from launch.build import (
    Core,
    Corpora,
    all_gather_values,
    build_evaluation,
    is_main_process,
    load_corpora,
    log,
    sync_processes,
)
from launch.generation import append_samples, generate_batches, unmasking_of
from launch.initial_state import Frozen, InitialState, build_run, check_resume, init_or_resume, restore_tokenizer
from launch.plotting import draw_loss
from launch.run_folder import RunFolder, environment, run_folder, write_whole
from launch.startup_timing import compile_watched, startup
from launch.weights_source import inherit_model_config, inherit_tokenizer, model_digest
from models.config import AttentionMask
from models.decode.sampling import SamplingConfig
from models.flops import flops_per_token, num_params
from models.pipeline_parallel import schedule_over
from trainer import hooks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.console import ConsoleTracker
from trainer.loop import DONE, Hook, fit
from trainer.mesh import describe_mesh
from trainer.metrics import TrainMetrics, peak
from trainer.objective import BatchSource, Params
from trainer.optimizers.optimizer import eval_params
from trainer.reference_sync import reference_from_state
from trainer.reliability.goodput import GoodputRecorder
from trainer.reliability.loss_spikes import NO_LIMITS, Rollback, SpikeWatch, TooManyRollbacks
from trainer.reliability.sdc_check import IntegrityWatch, SilentDataCorruption
from trainer.reliability.watchdog import Watchdog
from trainer.state import TrainState
from trainer.tracker import START, Trackers, build_trackers


def run(config: RunConfig, overrides: list[str]) -> int:
    """Trains until `task.num_steps`, or until there is a reason to end sooner. Returns the exit code."""
    code = _start(config, overrides)
    while code is None:  # the run went back, and begins again at its checkpoint
        startup.again()
        code = _start(config, overrides)
    return code


def _start(config: RunConfig, overrides: list[str]) -> int | None:
    """One start of a run, to its end; None where it is to be started again."""
    task = config.task
    assert isinstance(task, TrainConfig)
    folder = run_folder(config)
    config = inherit_model_config(config, overrides, folder, log)
    with ExitStack() as stack:
        checkpointer = stack.enter_context(folder.checkpointer(config.checkpoint, say=log))
        check_resume(config, folder, checkpointer)
        inherit_tokenizer(config, overrides, folder, log)
        restore_tokenizer(folder, checkpointer)
        ledger = GoodputRecorder(folder.path / "goodput.json" if is_main_process() else None)
        with ledger.phase("data_preparation"), startup.phase("data"):
            corpora = load_corpora(config, folder, log)
        with ledger.phase("start"), startup.phase("state"):
            config, core, base, frozen, source = build_run(config, corpora, checkpointer)
            stack.callback(source.close)
            start = init_or_resume(config, core, source, checkpointer, base)
            if is_main_process():
                folder.write_start(config, overrides)  # not before: a start that is refused changes nothing
                if "step" in start.reset:
                    folder.set_metrics_aside()
                folder.send()
            describe(config, core, start.line)
        session = Session(config, folder, corpora, core, source, checkpointer, ledger, frozen)
        return session.train(start)


def tokens_per_step(config: RunConfig, core: Core) -> int:
    """Of all rows, both sides of a pair included."""
    return math.prod(core.objective.batch_spec(core.batch_size, config.data.seq_len).tokens.shape)


def describe(config: RunConfig, core: Core, line: str) -> None:
    """What is about to run, in a few lines."""
    assert isinstance(config.task, TrainConfig)
    shape = describe_mesh(core.mesh.shape)
    tokens = tokens_per_step(config, core)
    parameters = num_params(core.model)["total"]
    kind = f"{jax.device_count()} {jax.devices()[0].platform} devices, {jax.process_count()} processes"
    log(line)
    if core.adaptation is not None:
        trained, a = core.adaptation.num_trainable, config.adapter
        kept = "" if a.quantize_base.name == "none" else f" on a base of {a.quantize_base.name}"
        share = f"{trained:,} trainable parameters, {trained / parameters:.2%} of the model"
        log(f"adapter: {a.method.name}, rank {a.rank}, scale {a.scale:g}{kept}: {share}")
    log(f"model: {parameters:,} parameters; {tokens:,} tokens a step; mesh: {shape} ({kind})")
    if shortened := config.schedule.shortened(config.task.num_steps):
        log(shortened)
    if schedule := schedule_over(core.model.pipeline, core.constrain):
        log(f"stages: {schedule.in_words}")


@dataclass
class Session:
    """One start of a run: its parts, and what they do together."""

    config: RunConfig
    folder: RunFolder
    corpora: Corpora
    core: Core
    source: BatchSource
    checkpointer: Checkpointer
    ledger: GoodputRecorder
    frozen: Frozen

    @property
    def task(self) -> TrainConfig:
        assert isinstance(self.config.task, TrainConfig)
        return self.config.task

    def train(self, start: InitialState) -> int | None:
        """Returns: the exit code, or None where the run went back."""
        state, first_step = start.state, int(start.state.step)
        self.ledger.resume(first_step)
        adapters = None if self.core.adaptation is None else self.core.adaptation.num_trainable
        metrics = TrainMetrics(
            tokens_per_step=tokens_per_step(self.config, self.core),
            flops_per_token=flops_per_token(self.core.model, self.config.data.seq_len, adapters),
            peak=peak(self.core.model.dtype.name),
        )
        log(metrics.peak.description)
        console = ConsoleTracker(
            self.config.run, num_steps=self.task.num_steps, start_step=first_step, log_every=self.task.log_every
        )
        trackers = build_trackers(
            self.config.trackers,
            run_folder=self.folder.path,
            run_name=self.config.run,
            always=[console],
            start_step=first_step,
            say=log,
        )
        code: int | None = 1
        try:
            trackers.log_config(to_plain(self.config))
            if self.ledger.starts > 1:  # where curves were broken
                trackers.log(first_step, {START: float(self.ledger.starts)})
            watch = SpikeWatch(self.config.loss_spikes, say=log, before=self.checkpointer.before)
            every_hook, stopper, saver = self.hooks(metrics, watch, trackers, start.hook_states)
            if "step" in start.reset:
                saver.save(first_step, state, self.source)  # those before it are set aside: a kill must find one
            with stopper:
                report = self.report(metrics, watch, trackers, first_step)
                state, reason = self.fit(state, watch, every_hook, report, saver.may_save)
            code = exit_codes.PREEMPTED if reason == hooks.PREEMPTED else 0
            self.finish(state, reason, trackers)
        except Rollback as rollback:
            code = self.handle_rollback(rollback)
            return code
        except SilentDataCorruption as error:
            code = self.handle_corruption(error)
            return code
        except jax.errors.JaxRuntimeError as error:
            distributed.exit_if_peer_lost(error)  # at once: what is being saved waits for the others
            raise
        except TooManyRollbacks as error:
            self.checkpointer.wait()
            log(f"meshwright: {error}")
            return exit_codes.FAILED
        finally:
            trackers.finish(code or 0)
        if code == 0 and is_main_process():
            print(print_next_steps(self.config, self.folder, reason))
        return code

    def handle_rollback(self, rollback: Rollback) -> int | None:
        """Writes what happened and sets aside the checkpoints since, so that the next start begins before it.

        Returns: None, or an exit code where that was done often enough.
        """
        limit, before = self.config.loss_spikes.max_rollbacks, len(incidents.of(self.folder))
        if before >= limit:
            log(
                f"meshwright: loss_spikes.max_rollbacks={limit}: the run went back so often; look at {self.folder.incidents}, and "
                "begin again with a smaller optimizer.learning_rate or other data"
            )
            return exit_codes.FAILED
        first_row = incidents.next_row(self.folder, rollback.to)
        if first_row is None:
            first_row = int(self.checkpointer.read_json(rollback.to, "source")["next_index"])
        told, arrays = incidents.describe(self.source, rollback, first_row)
        sync_processes("rollback")  # all have counted the incidents before
        if is_main_process():
            path = incidents.write(self.folder, before, told, arrays)
            self.folder.send()
            log(
                f"rollback {before + 1} of at most {limit}: from step {rollback.step} to the checkpoint of step "
                f"{rollback.to}; rows {told['rows'][0]} to {told['rows'][1]} of the data are left out; see {path}"
            )
        self.checkpointer.discard_after(rollback.to)
        return None

    def handle_corruption(self, error: SilentDataCorruption) -> int:
        """Sets aside the checkpoints since the last check that passed: nobody knows what they hold."""
        before = self.checkpointer.before(error.sound + 1)
        aside = self.checkpointer.discard_after(-1 if before is None else before)
        since = f"; checkpoints of steps {', '.join(map(str, aside))} are set aside" if aside else ""
        log(
            f"meshwright: before step {error.step}: {error}{since}; leaving with {exit_codes.PREEMPTED}, to go on from "
            f"{'the beginning' if before is None else f'step {before}'}: if it comes again, take that device out"
        )
        return exit_codes.PREEMPTED

    def fit(
        self,
        state: TrainState,
        watch: SpikeWatch,
        every_hook: list[Hook],
        report: Callable,
        may_save: Callable[[int], bool],
    ) -> tuple[TrainState, str]:
        # Compiling before the loop keeps its time out of the first step's, and the errors of shapes out of the loop.
        with self.ledger.phase("compile"), startup.phase("compile"):
            batch, frozen = self.core.batch_spec(self.config.data.seq_len), self.frozen.models
            lowered = self.core.train_step.lower(state, frozen, batch, NO_LIMITS)
            about = {
                "model": model_digest(self.core.model),
                "mesh": describe_mesh(self.core.mesh.shape),
                "rows": batch.tokens.shape,
            }
            compiled = compile_watched(lowered, about, report=is_main_process())
        watchdog = Watchdog(
            self.task.watchdog_timeout,
            on_hang=self.task.watchdog_action,
            doing=lambda: self.ledger.current_phase,
            say=lambda text: print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True),
            stacks=self.folder.path / "stacks" / f"process_{jax.process_index()}.txt",
            others=lambda: "" if distributed.peers is None else distributed.peers.compared(),
        )
        if distributed.peers is not None:
            distributed.peers.progress = watchdog.progress

        def beat(step: int, state: TrainState, source: BatchSource) -> None:
            watchdog.beat(step)

        first, checked, integrity = int(state.step), compiled, self.config.sdc_check
        if integrity.every:
            checked = IntegrityWatch(integrity, self.core.train_step, self.core.abstract).guard(compiled, first)
        try:
            with self.ledger.phase("step"), watchdog:
                return fit(
                    state,
                    frozen,
                    self.source,
                    watch.guard(checked, first),
                    num_steps=self.task.num_steps,
                    hooks=[each for hook in every_hook for each in (hook, beat)],
                    report=report,
                    may_save=may_save,
                )
        except ValueError as error:
            raise RuntimeError(f"training failed: {error}") from error  # past start-up, no input of the user's

    def report(self, metrics: TrainMetrics, watch: SpikeWatch, trackers: Trackers, first_step: int) -> Callable:
        def report(step: int, values: dict[str, float], timing: dict[str, float]) -> None:
            if step == first_step + 1:
                startup.first_step_done(sum(timing[part] for part in ("data_wait", "dispatch", "device_wait")))
                log(startup.summary(all_gather_values(list(startup.seconds.values()))))
            self.ledger.reassign("step", "data_wait", timing["data_wait"])
            self.ledger.at_step(step)
            trackers.log(step, metrics(step, values, timing))
            watch.observe(step, values)

        return report

    def hooks(
        self, metrics: TrainMetrics, watch: SpikeWatch, trackers: Trackers, remembered: dict[str, Any]
    ) -> tuple[list[Hook], hooks.StopOnSignal, hooks.SaveEvery]:
        """All hooks in the order that is their meaning; the one that holds the signal handlers; the one that saves."""
        task, ledger, num_steps = self.task, self.ledger, self.task.num_steps
        parts = self.config, self.corpora, self.core, self.frozen.models, self.frozen.tables.heldout
        compute = build_evaluation(*parts)
        average = jax.jit(eval_params)
        remembers: dict[str, hooks.Stateful] = {"metrics": metrics, "spikes": watch}
        every_hook: list[Hook] = []
        evaluation = None
        if self.corpora.heldout:
            evaluation = hooks.EvaluateEvery(
                task.eval_every,
                num_steps=num_steps,
                evaluate=lambda state: compute(average(state), reference_from_state(state.opt_state)),
                on_metrics=trackers.log,
                ledger=ledger,
            )
            every_hook.append(evaluation)
            remembers["evaluation"] = evaluation
        elif task.early_stopping_patience:
            raise ValueError(
                f"task.early_stopping_patience={task.early_stopping_patience}: no source holds out text to evaluate on"
            )
        writes = task.sample_tokens and not self.core.model.outputs
        encodes = self.core.model.attention.mask is AttentionMask.bidirectional
        if writes and encodes and unmasking_of(self.config, self.corpora.tokenizer) is None:
            log("samples: none; an encoder writes no text (task.sample_tokens=0 says so)")
        elif writes:
            sampler = hooks.SampleEvery(
                task.sample_every,
                num_steps=num_steps,
                params_of=average,
                sample=lambda step, params: self.sample(step, params, trackers),
                ledger=ledger,
            )
            every_hook.append(sampler)
            remembers["sample"] = sampler
        early = None
        if evaluation is not None and task.early_stopping_patience:
            early = hooks.EarlyStopping(
                evaluation,
                patience=task.early_stopping_patience,
                min_delta=task.early_stopping_min_delta,
                save=lambda step, state, source: saver.save(step, state, source),
            )
            remembers["early_stopping"] = early
        saver = hooks.SaveEvery(
            self.checkpointer,
            num_steps=num_steps,
            config={
                "run": to_plain(self.config),
                "environment": environment(),
                "mesh": dict(self.core.mesh.shape),
                **self.frozen.records,
            },
            tokenizer=self.corpora.tokenizer.files(),
            ledger=ledger,
            remembers=remembers,
            evaluation=evaluation,
            on_saved=lambda step, seconds: trackers.log(step, {"perf/checkpoint_wait": seconds}),
        )
        every_hook.append(saver)
        if early is not None:
            every_hook.append(early)
        stopper = hooks.StopOnSignal(saver.save)
        every_hook.append(stopper)
        if task.profile_steps:
            first, last = task.profile_steps
            every_hook.append(hooks.profile(first, last, self.folder.path / "profile"))
        hooks.restore_hook_states(remembered, remembers)
        return every_hook, stopper, saver

    def sample(self, step: int, params: Params, trackers: Trackers) -> None:
        """Writes a sample to samples.jsonl and to the trackers: what follows the prompt, or the answer to it."""
        task, tokenizer = self.task, self.corpora.tokenizer
        sampling = SamplingConfig(
            max_new_tokens=task.sample_tokens, temperature=task.sample_temperature, seed=self.config.seed
        )
        prompt, given, stop = task.sample_prompt, task.sample_prompt, None
        chats = self.config.data.format is not DataFormat.text and tokenizer.chat_template is not None
        if chats:
            prompt = prompt or "Hello"
            given, stop = chat_ids(tokenizer, [{"role": "user", "content": prompt}]), text_after_turn(tokenizer)
        [(text, _)] = generate_batches(
            self.core.merged_params(params, self.frozen.models),
            self.core.model,
            tokenizer,
            [given],
            sampling,
            stop=[] if stop is None else [stop],
            constrain=self.core.constrain,
            unmasking=unmasking_of(self.config, tokenizer),
        )
        if is_main_process():
            append_samples(self.folder.samples, step, [prompt], [text])
            trackers.log_text(step, "sample", f"{prompt}\n\n{text.strip()}" if chats else prompt + text)

    def finish(self, state: TrainState, reason: str, trackers: Trackers) -> None:
        """The last save is committed; the picture and the summary are written; how time was spent is told."""
        with self.ledger.phase("checkpoint"):
            self.checkpointer.wait()
        if not is_main_process():
            return
        if draw_loss(self.folder.metrics, self.folder.picture, title=self.config.run):
            trackers.log_image(int(state.step), "loss", self.folder.picture)
        self.ledger.write()
        summary = {
            "ended": reason,
            "step": int(state.step),
            "parameters": num_params(self.core.model)["total"],
            "evaluation": last_evaluation(self.folder),
            "goodput": self.ledger.summary(),
            "bad_records": self.corpora.bad_records,
        }
        write_whole(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        trackers.summary(summary)
        self.folder.send()
        print(self.ledger.table(), flush=True)


def last_evaluation(folder: RunFolder) -> dict[str, float]:
    """The newest `eval/...` values of the run."""
    from launch.tasks.runs import last_values

    return {
        name: value
        for name, value in last_values(folder.metrics).items()
        if name.startswith("eval/") and isinstance(value, float) and math.isfinite(value)
    }


def print_next_steps(config: RunConfig, folder: RunFolder, reason: str) -> str:
    """How it ended and the three commands to try next."""
    task = config.task
    assert isinstance(task, TrainConfig)
    how = "" if reason == DONE else f" ({reason})"
    given = (a.removeprefix("task.") for a in sys.argv[1:] if not a.startswith(("task=", "task.num_steps=")))
    resume = f"meshwright train {' '.join(given)}".rstrip() + f" num_steps={2 * task.num_steps}"
    prompt = task.sample_prompt.replace("\n", " ").strip() or "The"
    chats = config.tokenizer.chat_template is not None or config.data.format is DataFormat.chat
    use = "generate", "chat='Hello'" if chats else f"prompt='{prompt} '"
    if not config.objective.model_needs.is_token_level:
        use = "predict", "texts=['Hello']"
    elif config.objective.kind == "masked":  # an encoder writes nothing
        use = "evaluate", ""
    where = "" if config.output_dir == "runs" else f" output_dir={config.output_dir}"
    return (
        f"run {config.run!r} is in {folder.where}{how}; its loss curve: {folder.picture}\n"
        "next:\n"
        f"  {resume}\n"
        f"  meshwright {use[0]} run={config.run}{where} {use[1]}".rstrip()
        + "\n"
        "  meshwright train source=[text] data.sources.text.paths=[YOUR_FOLDER] run=mine"
    )
