"""`meshwright scaling_ladder`: trains several model sizes and lengths, and fits a scaling law."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax

from configs.schema import RunConfig
from configs.tasks import Format, ScalingLadderConfig, TrainConfig
from data.tokenizers.kinds import load_tokenizer
from launch import exit_codes
from launch.build import model_config
from launch.config_errors import named_keys
from launch.launchers.job import python_path
from launch.plotting import draw_law
from launch.reports import make_table, open_console, write_report
from launch.run_folder import RunFolder, write_whole
from launch.scaling.law import Law, Point, fit_law, leave_one_out_fits, spread
from launch.scaling.rungs import Recommendation, Rung, recommend, rungs, sizes, with_keys
from models.config import ModelConfig
from models.flops import flops_per_token
from trainer.loop import DONE

METRIC = "eval/loss"
DEFAULT_BUDGET = 100.0  # compute budget if none is given, in multiples of the FLOPs of the largest run
NOTE = "rung.json"  # in each rung's folder: its overrides


def run(config: RunConfig, overrides: list[str]) -> int:
    """Trains missing rungs, prints rungs, law and recommendation, and writes them with a plot to `task.output`.

    Returns the exit code of the first failed rung, or 0.
    """
    task = config.task
    assert isinstance(task, ScalingLadderConfig)
    jax.config.update("jax_platforms", "cpu")  # leave the devices to the rungs
    _check(config, task)
    points: list[Point] = []
    climbed = rungs(config)
    model = config.model
    for number, rung in enumerate(climbed, 1):
        folder, start = RunFolder(Path(config.output_dir) / rung.run), time.monotonic()
        given = arguments(config, overrides, rung)
        _check_same_keys(folder, given)
        finished = _finished(folder, rung)
        code = 0 if finished else _train(given, rung, folder)
        if code:
            return code
        model = model_config(config, load_tokenizer(folder.tokenizer))
        point = _point(rung, folder, with_keys(model, rung.keys), config.data.seq_len)
        points.append(point)
        took = "already trained" if finished else f"{time.monotonic() - start:,.0f} s"
        _say(
            task,
            f"{number} of {len(climbed)}: {rung.run}: {point.parameters:,.0f} parameters, {point.tokens:,.0f} tokens, "
            f"{point.flops:.2e} FLOPs: loss {point.loss:.4f} ({took})",
        )
    law = fit_law(points)
    others = leave_one_out_fits(points, law)
    budget = task.compute_budget or DEFAULT_BUDGET * max(point.flops for point in points)
    family = sizes(config, model, budget)
    ratio = points[0].tokens / points[0].parameters if law.is_compute_law else None
    best = recommend(law, others, family, budget, ratio)
    found = _describe(config, climbed, points, law, others, best)
    folder = Path(task.output or Path(config.output_dir) / "ladders")
    draw = lambda path: draw_law(points, law, others, family, best, ratio, path, config.run)
    write_report(config, folder, config.run, found, draw, lambda: _print(found))
    return 0


def _check(config: RunConfig, task: ScalingLadderConfig) -> None:
    for key in ("widths", "tokens_per_param"):
        values = getattr(task, key)
        if not values or min(values) <= 0 or len(set(values)) < len(values):
            raise ValueError(f"task.{key}={values}: must be a list of distinct values above 0, at least one")
    if task.aspect_ratio is not None and task.aspect_ratio <= 0:
        raise ValueError(f"task.aspect_ratio={task.aspect_ratio}: must be above 0; null: keep the depth of the model")
    if task.compute_budget is not None and task.compute_budget <= 0:
        raise ValueError(f"task.compute_budget={task.compute_budget:g}: training FLOPs must be above 0, such as 1e20")
    if config.init_from is not None or config.adapter.active:
        raise ValueError(
            "scaling_ladder: scaling laws need models trained from random initialization; remove init_from and adapter"
        )
    if not config.objective.model_needs.is_token_level:
        raise ValueError(
            f"scaling_ladder: scaling laws need a per-token loss, which objective={config.objective.kind} does not have"
        )


def arguments(config: RunConfig, overrides: list[str], rung: Rung) -> list[str]:
    """Returns the overrides of `train` for a rung: those of the command without ladder keys, and the rung's own."""
    known = {f"task.{f.name}" for f in fields(TrainConfig)} - {"task.num_steps", "task.kind"}
    given = [o for o in overrides if not _own(o.partition("=")[0], known)]
    if "task.sample_tokens" not in named_keys(overrides):
        given.append("task.sample_tokens=0")
    rung_keys = {f"model.{key}": value for key, value in rung.keys.items()} | {"task.num_steps": rung.num_steps}
    return [*given, *(f"{key}={value}" for key, value in rung_keys.items()), f"run={rung.run}"]


def _own(key: str, of_train: set[str]) -> bool:
    return key in ("task", "run") or (key.startswith("task.") and key not in of_train)


def _finished(folder: RunFolder, rung: Rung) -> bool:
    if not folder.summary.exists():
        return False
    summary = json.loads(folder.summary.read_text())
    return summary["step"] == rung.num_steps and summary["ended"] == DONE


def _check_same_keys(folder: RunFolder, given: list[str]) -> None:
    """Raises: ValueError if the rung was started with different keys, since its loss would not be comparable."""
    note = folder.path / NOTE
    before = json.loads(note.read_text()) if note.exists() else given
    if differing := sorted(set(before) ^ set(given)):
        raise ValueError(
            f"{differing[0]}: {folder.path} was started with different keys: this one is in only one of the two "
            "commands; restore the original keys, or start another ladder with run=NAME"
        )


def _train(given: list[str], rung: Rung, folder: RunFolder) -> int:
    """Runs the rung in a child process and returns its exit code."""
    folder.path.mkdir(parents=True, exist_ok=True)
    write_whole(folder.path / NOTE, json.dumps(given, indent=1) + "\n")
    log = folder.path / "rung.log"
    command = [sys.executable, "-P", "-m", "launch.cli", "train", *given]
    with log.open("ab") as output:
        env = os.environ | {"PYTHONPATH": python_path()}
        child = subprocess.Popen(command, stdout=output, stderr=output, env=env)
        before = signal.signal(
            signal.SIGTERM, lambda *_: child.terminate()
        )  # it saves a checkpoint and exits with code 75
        try:
            code = child.wait()
        except KeyboardInterrupt:  # the child received it from the terminal, too
            child.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code == exit_codes.PREEMPTED:
        print(f"meshwright: {rung.run}: preempted; run the same command to resume", file=sys.stderr)
    elif code or not _finished(folder, rung):
        last = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        print(
            f"{last}\nmeshwright: {rung.run}: exited with code {code} before its last step; see {log}", file=sys.stderr
        )
        return code if code > 0 else exit_codes.FAILED
    return code


def _point(rung: Rung, folder: RunFolder, model: ModelConfig, seq_len: int) -> Point:
    evaluation = json.loads(folder.summary.read_text())["evaluation"]
    if METRIC not in evaluation:
        raise ValueError(f"{folder.path}: no source has validation text, so there is no {METRIC} to fit")
    flops = rung.tokens * flops_per_token(model, seq_len)
    return Point(rung.parameters, rung.tokens, flops, evaluation[METRIC])


def _describe(
    config: RunConfig, climbed: list[Rung], points: list[Point], law: Law, others: list[Law], best: Recommendation
) -> dict[str, Any]:
    tokens_per_step = config.data.batch_size * config.data.seq_len
    fitted = [float(law.loss(p.flops) if law.is_compute_law else law.loss(p.parameters, p.tokens)) for p in points]
    rows = zip(climbed, points, fitted, strict=True)
    constants = [name for name in Law._fields if not law.is_compute_law or name not in ("B", "beta")]
    steps = round(best.tokens / tokens_per_step)
    keys = {f"model.{key}": value for key, value in best.keys.items()} | {"task.num_steps": steps}
    return {
        "rungs": [{"run": rung.run, **point._asdict(), "fitted": value} for rung, point, value in rows],
        "law": {name: getattr(law, name) for name in constants},
        "of": "compute" if law.is_compute_law else "parameters and tokens",
        "left_out": {name: spread(others, lambda other, name=name: getattr(other, name)) for name in constants},
        "recommendation": best._asdict() | {"times_largest": best.flops / max(p.flops for p in points)},
        "overrides": [f"{key}={value}" for key, value in keys.items()],
        "procedure": "Hoffmann et al. 2022 (2203.15556), section 3.3; parameters without embeddings and head; FLOPs by "
        "models/flops.py; spreads: leave-one-out refits",
    }


def _say(task: ScalingLadderConfig, text: str) -> None:
    print(text, flush=True, file=sys.stderr if task.format is Format.json else sys.stdout)


def _print(report: dict[str, Any]) -> None:
    console = open_console()
    table = make_table("run", "parameters", "tokens", "FLOPs", "loss", "fitted", no_wrap=True)
    for row in report["rungs"]:
        sizes = f"{row['parameters']:,}", f"{row['tokens']:,}", f"{row['flops']:.3g}"
        table.add_row(row["run"], *sizes, f"{row['loss']:.4f}", f"{row['fitted']:.4f}")
    console.print(table)
    between = lambda pair, form: "" if pair is None else f" ({pair[0]:{form}} to {pair[1]:{form}})"
    law = ", ".join(f"{name} {v:.4g}{between(report['left_out'][name], '.3g')}" for name, v in report["law"].items())
    of = "A / C^alpha" if report["of"] == "compute" else "A / N^alpha + B / D^beta"
    console.print(f"law         E + {of}: {law}; in parentheses: range of leave-one-out refits", soft_wrap=True)
    if report["law"]["E"] < 0.05:
        console.print("            the irreducible loss E is near 0: the law is unreliable far beyond these sizes")
    best = report["recommendation"]
    console.print(
        f"budget      {best['flops']:.3g} FLOPs, {best['times_largest']:.3g} times the largest run",
        soft_wrap=True,
    )
    console.print(
        f"recommended {best['parameters']:,}{between(best['parameters_spread'], ',.0f')} parameters on "
        f"{best['tokens']:,.0f} tokens; loss {best['loss']:.4f}{between(best['loss_spread'], '.4f')}",
        soft_wrap=True,
    )
    console.print(f"to run      {' '.join(report['overrides'])}", soft_wrap=True, markup=False)
