"""`meshwright plan`: estimates memory, speed and cost of a run on devices that need not be present."""

import re
from pathlib import Path
from typing import Any

import jax

from configs.schema import RunConfig
from configs.tasks import PlanConfig
from data.object_store import is_url
from launch.config_errors import named_keys
from launch.inherit_config import inherit_model_config
from launch.multihost import log
from launch.planning.estimate import Plan, estimate
from launch.planning.hardware import Target, parse_target
from launch.planning.local_shapes import with_vocabulary
from launch.planning.search import Choice, Free, search
from launch.planning.xla_compile import Compiled, compile_step, disable_devices
from launch.plotting import draw_plan
from launch.reports import make_table, open_console, short_number, write_report
from launch.run_folder import run_folder
from launch.scaling.law import CHINCHILLA, CHINCHILLA_SOURCE, compute_optimal, read_law
from trainer.mesh import describe_mesh

CONVENTION = "6 x matmul weights + 3 x attention over half of the row (models/flops.py); peak is dense bf16"
TOP = 3  # best search results: shown, and compiled with compile=true


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints the plan, and writes it with a plot to `task.output`. Exit code 1: it does not fit."""
    task = config.task
    assert isinstance(task, PlanConfig)
    disable_devices()
    target = parse_target(task.target, config.fake_devices or jax.device_count())
    config = with_vocabulary(inherit_model_config(config, overrides, run_folder(config), log))
    named = named_keys(overrides)
    free = Free(
        mesh=not any(key.partition(".")[0] == "mesh" for key in named),
        remat=task.search and "model.remat" not in named,
        turns=task.search and "task.gradient_accumulation_steps" not in named,
        batch="data.batch_size" not in named,
    )
    choices = _chosen(config, target, free, task)
    best = choices[0]
    compiled = None
    if task.compile:
        tried = [(choice, compile_step(choice.config, target)) for choice in choices[: TOP if task.search else 1]]
        fitting = [pair for pair in tried if pair[1].peak_bytes <= pair[0].plan.capacity]
        best, compiled = (fitting or tried)[0]
    title = _title(best, overrides)
    found = describe(best, task, compiled)
    if task.search:
        found["others"] = [_line(choice) for choice in choices if choice is not best][:9]
    folder = Path(task.output or Path("runs" if is_url(config.output_dir) else config.output_dir) / "plans")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", title)
    draw = lambda path: draw_plan(best.plan, path, title)
    write_report(config, folder, name, found, draw, lambda: _print(title, best.plan, found))
    return 0 if (best.plan.fits if compiled is None else found["compiled"]["fits"]) else 1


def _chosen(config: RunConfig, target: Target, free: Free, task: PlanConfig) -> list[Choice]:
    if not (free.mesh or free.batch or task.search):
        return [Choice(config, estimate(config, target))]
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("meshes", total=None)
        return search(config, target, free, lambda done, of: bar.update(shown, completed=done, total=of))


def _title(choice: Choice, overrides: list[str]) -> str:
    given = {key: value for key, _, value in (o.partition("=") for o in overrides)}
    phase = given.get("phase", "pretrain")
    model = given.get("model") or given.get("experiment") or given.get("init_from") or "model"
    return f"{model} {phase} on {choice.plan.target.name}"


def describe(choice: Choice, task: PlanConfig, compiled: Compiled | None) -> dict[str, Any]:
    """Returns the plan as JSON values, in bytes, seconds and dollars."""
    plan, config, hardware = choice.plan, choice.config, choice.plan.target.hardware
    tokens = task.num_tokens or float(task.num_steps * plan.tokens_per_step)
    seconds = tokens / plan.tokens_per_second
    hours = seconds / 3600 * plan.target.num_devices
    price = hardware.price if task.price_per_device_hour is None else task.price_per_device_hour
    flops = tokens * plan.flops_per_token
    law, source = (
        (CHINCHILLA, CHINCHILLA_SOURCE)
        if task.scaling_law is None
        else (read_law(Path(task.scaling_law)), task.scaling_law)
    )
    optimum = compute_optimal(flops, law)
    of_plan = ("tokens_per_step", "parameters", "active_parameters", "trainable_parameters", "flops_per_token")
    found: dict[str, Any] = {
        "target": plan.target.name,
        "devices": plan.target.num_devices,
        **_line(choice),
        "seq_len": config.data.seq_len,
        "pipeline": None if plan.schedule is None else plan.schedule._asdict(),
        **{name: getattr(plan, name) for name in of_plan},
        "flops_convention": CONVENTION,
        "memory": plan.memory._asdict() | {"total": plan.memory.total, "capacity": plan.capacity},
        "traffic": [t._asdict() for t in plan.traffic],
        "seconds": {
            "products": plan.compute_seconds,
            "device": plan.device_seconds,
            "network": plan.network_seconds,
            "network_waited_for": plan.exposed_seconds,
            "step": plan.step_seconds,
        },
        "tokens_per_second_per_device": plan.tokens_per_second / plan.target.num_devices,
        "budget": {
            "tokens": tokens,
            "flops": flops,
            "days": seconds / 86400,
            "device_hours": hours,
            "dollars": hours * price,
            "dollars_per_device_hour": price,
            "kilowatt_hours": hours * hardware.watts / 1000,
        },
        "compute_optimal": optimum._asdict() | {"law": source},
        "overrides": [
            *(f"mesh.{axis}={size}" for axis, size in plan.mesh.items()),
            f"data.batch_size={plan.batch_size}",
            f"task.gradient_accumulation_steps={plan.num_microbatches}",
            f"model.remat={plan.remat}",
            *(
                [f"model.activation_offload=[{','.join(o.name for o in config.model.activation_offload)}]"]
                if config.model.activation_offload
                else []
            ),
            *(["optimizer.offload_state=true"] if config.optimizer.offload_state else []),
        ],
    }
    if compiled is not None:
        found["compiled"] = {
            **{
                name: getattr(compiled, name) for name in ("seconds", "argument_bytes", "temporary_bytes", "peak_bytes")
            },
            "fits": compiled.peak_bytes <= plan.capacity,
            "collectives": None if compiled.collectives is None else [c._asdict() for c in compiled.collectives],
        }
    return found


def _line(choice: Choice) -> dict[str, Any]:
    plan = choice.plan
    names = ("mesh", "batch_size", "num_microbatches", "remat", "fits", "mfu", "tokens_per_second")
    return {name: getattr(plan, name) for name in names} | {"memory": plan.memory.total}


def _print(title: str, plan: Plan, found: dict[str, Any]) -> None:
    console = open_console()
    gb = lambda size: f"{size / 1e9:,.2f} GB"
    console.print(f"[bold]{title}[/bold]")
    parts = ", ".join(f"{name} {short_number(n)}" for name, n in plan.parameters.items() if n and name != "total")
    console.print(f"parameters  {plan.parameters['total']:,} ({parts})")
    if plan.active_parameters != plan.parameters["total"]:
        console.print(f"            {plan.active_parameters:,} active per token")
    if plan.trainable_parameters != plan.parameters["total"]:
        console.print(f"            {plan.trainable_parameters:,} trainable")
    console.print(f"FLOPs       {plan.flops_per_token:.4g} per token: {CONVENTION}")
    console.print(f"mesh        {describe_mesh(plan.mesh)}; remat {plan.remat}; {plan.num_microbatches} microbatches")
    if plan.schedule is not None:
        console.print(f"stages      {plan.schedule.description}")
    row = found["seq_len"]
    console.print(f"batch       {plan.batch_size:,} rows of {row:,}: {plan.tokens_per_step:,} tokens per step")

    table = make_table("memory per device", "", "", left=(0, 2))
    for name, size in plan.memory._asdict().items():
        if size >= 5e6:
            table.add_row(name, gb(size), f"{size / plan.capacity:.1%}")
    spare = plan.capacity - plan.memory.total
    verdict = f"fits, {gb(spare)} free" if plan.fits else f"DOES NOT FIT, exceeds by {gb(-spare)}"
    table.add_row("total", gb(plan.memory.total), f"of {gb(plan.capacity)}: {verdict}")
    if compiled := found.get("compiled"):
        off = plan.memory.total / compiled["peak_bytes"] - 1
        fits = "fits" if compiled["fits"] else "DOES NOT FIT"
        table.add_row("XLA", gb(compiled["peak_bytes"]), f"{fits}; the estimate is {off:+.1%}")
    console.print(table)
    if plan.traffic:
        columns = ("communication per step", "", "collectives", "sent per device", "seconds", "")
        table = make_table(*columns, left=(0, 1, 3, 5))
        for t in plan.traffic:
            overlap = "overlapped" if t.hidden else "exposed"
            table.add_row(f"{t.axis}: {t.kind}", t.what, f"{t.count:,}", gb(t.bytes), f"{t.seconds:.3f}", overlap)
        console.print(table)
    if compiled:
        table = make_table("compiled collectives", "count", "results", "asynchronous")
        for c in compiled["collectives"] or ():
            table.add_row(f"{c['axes']}: {c['kind']}", f"{c['count']:,}", gb(c["bytes"]), f"{c['hidden']:,}")
        console.print(table)
        console.print(f"compiled in {compiled['seconds']:.1f} s")
    s = found["seconds"]
    console.print(
        f"step        {s['step']:.4g} s = device {s['device']:.4g} (compute {s['products']:.4g}) + exposed "
        f"communication {s['network_waited_for']:.4g} (of {s['network']:.4g})"
    )
    console.print(
        f"speed       {plan.tokens_per_second:,.0f} tokens/s, {found['tokens_per_second_per_device']:,.0f} per device, "
        f"MFU {plan.mfu:.1%}"
    )
    b = found["budget"]
    console.print(
        f"budget      {short_number(b['tokens'])} tokens: {b['days']:,.2f} days, "
        f"{b['device_hours']:,.0f} device-hours, ${b['dollars']:,.0f} at "
        f"${b['dollars_per_device_hour']:g} per device-hour, {b['kilowatt_hours']:,.0f} kWh"
    )
    o = found["compute_optimal"]
    console.print(
        f"            compute-optimal for {b['flops']:.3g} FLOPs: {short_number(o['parameters'])} parameters on "
        f"{short_number(o['tokens'])} tokens ({o['law']})"
    )
    for other in found.get("others", ())[: TOP - 1]:
        console.print(
            f"next best   {describe_mesh(other['mesh'])}; remat {other['remat']}; batch {other['batch_size']}, "
            f"{other['num_microbatches']} microbatches: {gb(other['memory'])}, MFU {other['mfu']:.1%}"
        )
    if not plan.fits:
        console.print("try         task.search=true, model.remat=full, a smaller data.batch_size, or more devices")
    console.print(f"to run      {' '.join(found['overrides'])}", soft_wrap=True, markup=False)
