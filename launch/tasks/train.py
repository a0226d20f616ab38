"""`meshwright train`: one training run of any phase, in the order in which it happens (`train_once`).

    config and tokenizer > data > mesh, model, optimizer > frozen models > state > hooks > loop > summary

Hooks and text samples are built in `launch/train_hooks.py`, recovery after spikes and corruption in
`launch/rollbacks.py`.
"""

import json
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack

import jax

from configs.schema import RunConfig, to_plain
from configs.tasks import TrainConfig
from data.records.encoding import DataFormat
from launch import distributed, exit_codes, rollbacks
from launch.build import Core
from launch.corpora import Corpora, load_corpora
from launch.inherit_config import inherit_model_config, inherit_tokenizer
from launch.initial_state import RunParts, build_run, check_resume, init_or_resume, restore_tokenizer
from launch.multihost import all_gather_values, is_main_process, log
from launch.plotting import draw_loss
from launch.run_folder import RunFolder, run_folder, write_whole
from launch.startup_timing import compile_watched, startup
from launch.train_hooks import Hooks, build_hooks
from launch.weights_source import model_digest
from models.flops import flops_per_token, num_params
from models.pipeline_parallel import schedule_over
from trainer.console import ConsoleTracker
from trainer.hooks import PREEMPTED
from trainer.loop import DONE, fit
from trainer.mesh import describe_mesh
from trainer.metrics import TrainMetrics, peak
from trainer.objective import BatchSource
from trainer.reliability.goodput import GoodputRecorder
from trainer.reliability.loss_spikes import NO_LIMITS, LossSpikeDetector, Rollback, TooManyRollbacks
from trainer.reliability.sdc_check import SDCChecker, SilentDataCorruption
from trainer.reliability.watchdog import Watchdog
from trainer.state import TrainState
from trainer.tracker import START, Trackers, build_trackers


def run(config: RunConfig, overrides: list[str]) -> int:
    """Trains until `num_steps` or an earlier end, and returns the exit code. After a rollback it starts again."""
    code = train_once(config, overrides)
    while code is None:
        startup.again()
        code = train_once(config, overrides)
    return code


def train_once(config: RunConfig, overrides: list[str]) -> int | None:
    """One start of a run, from its config to its summary. Returns the exit code; None after a rollback."""
    folder = run_folder(config)
    config = inherit_model_config(config, overrides, folder, log)
    with ExitStack() as stack:
        checkpointer = stack.enter_context(folder.checkpointer(config.checkpoint, say=log))
        check_resume(config, folder, checkpointer)
        inherit_tokenizer(config, overrides, folder, log)
        restore_tokenizer(folder, checkpointer)
        recorder = GoodputRecorder(folder.path / "goodput.json" if is_main_process() else None)

        # Data: tokenized shards of every source.
        with recorder.phase("data_preparation"), startup.phase("data"):
            corpora = load_corpora(config, folder, log)

        # Mesh, model, objective, optimizer, frozen models, batches; then the state, new or restored.
        with recorder.phase("start"), startup.phase("state"):
            parts = build_run(config, corpora, checkpointer)
            config, core, source = parts.config, parts.core, parts.source
            stack.callback(source.close)
            initial = init_or_resume(config, core, source, checkpointer, parts.base)
            if is_main_process():
                folder.write_start(config, overrides)  # only now: a refused start changes nothing
                if "step" in initial.reset:
                    folder.set_metrics_aside()
                folder.send()
            describe(config, core, initial.line)

        # Metrics, trackers and hooks.
        first_step = int(initial.state.step)
        recorder.resume(first_step)
        metrics = build_metrics(config, core)
        trackers = start_trackers(config, folder, first_step)
        code: int | None = exit_codes.FAILED
        try:
            trackers.log_config(to_plain(config))
            if recorder.starts > 1:  # marks the restart in curves
                trackers.log(first_step, {START: float(recorder.starts)})
            spikes = LossSpikeDetector(config.loss_spikes, say=log, before=checkpointer.latest_before)
            hooks = build_hooks(
                parts, corpora, folder, checkpointer, recorder, trackers, {"metrics": metrics, "spikes": spikes}
            )
            hooks.restore(initial.hook_states)
            if "step" in initial.reset:
                hooks.saver.save(first_step, initial.state, source)  # a kill must find a checkpoint of the new steps

            # The loop.
            report = build_report(metrics, spikes, trackers, recorder, first_step)
            with hooks.stop_on_signal:
                state, reason = run_loop(config, folder, parts, initial.state, spikes, hooks, report, recorder)
            code = exit_codes.PREEMPTED if reason == PREEMPTED else exit_codes.DONE
            with recorder.phase("checkpoint"):
                checkpointer.wait()
            if is_main_process():
                write_summary(config, folder, core, corpora, recorder, trackers, state, reason)
        except Rollback as rollback:
            code = rollbacks.handle_rollback(config, folder, source, checkpointer, rollback)
            return code
        except SilentDataCorruption as error:
            code = rollbacks.handle_corruption(checkpointer, error)
            return code
        except jax.errors.JaxRuntimeError as error:
            distributed.exit_if_peer_lost(error)  # before anything else: a pending save waits for the lost process
            raise
        except TooManyRollbacks as error:
            checkpointer.wait()
            log(f"meshwright: {error}")
            return exit_codes.FAILED
        finally:
            trackers.finish(code or 0)
        if code == exit_codes.DONE and is_main_process():
            print(next_steps(config, folder, reason))
        return code


def tokens_per_step(config: RunConfig, core: Core) -> int:
    """Returns the tokens of a global batch, with both sides of each pair."""
    return math.prod(core.objective.batch_spec(core.batch_size, config.data.seq_len).tokens.shape)


def describe(config: RunConfig, core: Core, line: str) -> None:
    """Logs how the run starts, its adapters, model, mesh, pipeline stages and schedule, in a few lines."""
    assert isinstance(config.task, TrainConfig)
    parameters = num_params(core.model)["total"]
    devices = f"{jax.device_count()} {jax.devices()[0].platform} devices, {jax.process_count()} processes"
    log(line)
    if core.adaptation is not None:
        trained, a = core.adaptation.num_trainable, config.adapter
        base = "" if a.quantize_base.name == "none" else f" on a base of {a.quantize_base.name}"
        share = f"{trained:,} trainable parameters, {trained / parameters:.2%} of the model"
        log(f"adapter: {a.method.name}, rank {a.rank}, scale {a.scale:g}{base}: {share}")
    tokens, mesh = tokens_per_step(config, core), describe_mesh(core.mesh.shape)
    log(f"model: {parameters:,} parameters; {tokens:,} tokens a step; mesh: {mesh} ({devices})")
    if schedule := schedule_over(core.model.pipeline, core.constrain):
        log(f"stages: {schedule.description}")
    if shortened := config.schedule.shortened(config.task.num_steps):
        log(shortened)


def build_metrics(config: RunConfig, core: Core) -> TrainMetrics:
    """Builds the training metrics, and logs the peak that MFU refers to."""
    trainable = None if core.adaptation is None else core.adaptation.num_trainable
    metrics = TrainMetrics(
        tokens_per_step=tokens_per_step(config, core),
        flops_per_token=flops_per_token(core.model, config.data.seq_len, trainable),
        peak=peak(core.model.dtype.name),
    )
    log(metrics.peak.description)
    return metrics


def start_trackers(config: RunConfig, folder: RunFolder, first_step: int) -> Trackers:
    """Opens the console and all configured trackers."""
    task = config.task
    assert isinstance(task, TrainConfig)
    console = ConsoleTracker(config.run, num_steps=task.num_steps, start_step=first_step, log_every=task.log_every)
    return build_trackers(
        config.trackers,
        run_folder=folder.path,
        run_name=config.run,
        always=[console],
        start_step=first_step,
        say=log,
    )


def build_report(
    metrics: TrainMetrics, spikes: LossSpikeDetector, trackers: Trackers, recorder: GoodputRecorder, first_step: int
) -> Callable[..., None]:
    """Returns the loop's `report(step, values, timing)`: it logs metrics, books time and watches for spikes."""

    def report(step: int, values: dict[str, float], timing: dict[str, float]) -> None:
        if step == first_step + 1:
            startup.first_step_done(sum(timing[part] for part in ("data_wait", "dispatch", "device_wait")))
            log(startup.summary(all_gather_values(list(startup.seconds.values()))))
        recorder.reassign("step", "data_wait", timing["data_wait"])
        recorder.at_step(step)
        trackers.log(step, metrics(step, values, timing))
        spikes.observe(step, values)

    return report


def run_loop(
    config: RunConfig,
    folder: RunFolder,
    parts: RunParts,
    state: TrainState,
    spikes: LossSpikeDetector,
    hooks: Hooks,
    report: Callable[..., None],
    recorder: GoodputRecorder,
) -> tuple[TrainState, str]:
    """Compiles the step and runs the loop under the watchdog. Returns the last state and why the loop ended."""
    task, core, frozen = config.task, parts.core, parts.frozen.models
    assert isinstance(task, TrainConfig)
    # Compiled ahead of the loop: its time is not the first step's, and errors of shapes come before the loop.
    with recorder.phase("compile"), startup.phase("compile"):
        batch = core.batch_spec(config.data.seq_len)
        lowered = core.train_step.lower(state, frozen, batch, NO_LIMITS)
        program = {
            "model": model_digest(core.model),
            "mesh": describe_mesh(core.mesh.shape),
            "rows": batch.tokens.shape,
        }
        step = compile_watched(lowered, program, report=is_main_process())
    watchdog = Watchdog(
        task.watchdog_timeout,
        on_hang=task.watchdog_action,
        doing=lambda: recorder.current_phase,
        say=lambda text: print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True),
        stacks=folder.path / "stacks" / f"process_{jax.process_index()}.txt",
        others=lambda: "" if distributed.peers is None else distributed.peers.compared(),
    )
    if distributed.peers is not None:
        distributed.peers.progress = watchdog.progress

    def beat(step: int, state: TrainState, source: BatchSource) -> None:
        watchdog.beat(step)

    first_step = int(state.step)
    if config.sdc_check.every:
        step = SDCChecker(config.sdc_check, core.train_step, core.abstract).guard(step, first_step)
    try:
        with recorder.phase("step"), watchdog:
            return fit(
                state,
                frozen,
                parts.source,
                spikes.guard(step, first_step),
                num_steps=task.num_steps,
                hooks=[each for hook in hooks.ordered for each in (hook, beat)],
                report=report,
                may_save=hooks.saver.may_save,
            )
    except ValueError as error:
        raise RuntimeError(f"training failed: {error}") from error  # start-up is over: not an input error


def write_summary(
    config: RunConfig,
    folder: RunFolder,
    core: Core,
    corpora: Corpora,
    recorder: GoodputRecorder,
    trackers: Trackers,
    state: TrainState,
    reason: str,
) -> None:
    """Writes the loss curve and summary.json, and prints how time was spent. Process 0 only."""
    if draw_loss(folder.metrics, folder.picture, title=config.run):
        trackers.log_image(int(state.step), "loss", folder.picture)
    recorder.write()
    summary = {
        "ended": reason,
        "step": int(state.step),
        "parameters": num_params(core.model)["total"],
        "evaluation": last_evaluation(folder),
        "goodput": recorder.summary(),
        "bad_records": corpora.bad_records,
    }
    write_whole(folder.summary, json.dumps(summary, indent=2) + "\n")
    trackers.summary(summary)
    folder.send()
    print(recorder.table(), flush=True)


def last_evaluation(folder: RunFolder) -> dict[str, float]:
    """Returns the newest `eval/...` values of the run."""
    from launch.tasks.runs import last_values

    return {
        name: value
        for name, value in last_values(folder.metrics).items()
        if name.startswith("eval/") and isinstance(value, float) and math.isfinite(value)
    }


def next_steps(config: RunConfig, folder: RunFolder, reason: str) -> str:
    """Returns how the run ended and three commands to try next."""
    task = config.task
    assert isinstance(task, TrainConfig)
    ended = "" if reason == DONE else f" ({reason})"
    given = (a.removeprefix("task.") for a in sys.argv[1:] if not a.startswith(("task=", "task.num_steps=")))
    resume = f"meshwright train {' '.join(given)}".rstrip() + f" num_steps={2 * task.num_steps}"
    prompt = task.sample_prompt.replace("\n", " ").strip() or "The"
    chats = config.tokenizer.chat_template is not None or config.data.format is DataFormat.chat
    use = "generate", "chat='Hello'" if chats else f"prompt='{prompt} '"
    if not config.objective.model_needs.is_token_level:
        use = "predict", "texts=['Hello']"
    elif config.objective.kind == "masked":  # an encoder generates no text
        use = "evaluate", ""
    output_dir = "" if config.output_dir == "runs" else f" output_dir={config.output_dir}"
    return (
        f"run {config.run!r} is in {folder.where}{ended}; its loss curve: {folder.picture}\n"
        "next:\n"
        f"  {resume}\n"
        f"  meshwright {use[0]} run={config.run}{output_dir} {use[1]}".rstrip()
        + "\n"
        "  meshwright train source=[text] data.sources.text.paths=[YOUR_FOLDER] run=mine"
    )
