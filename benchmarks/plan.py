"""Generates the table of docs/plan.md: memory estimates of `meshwright plan` compared with XLA's allocation.

    python benchmarks/plan.py [--only cpu|h100|v5e|v5p|v6e] [--write docs/plan.md]
    python benchmarks/plan.py --published
    python benchmarks/plan.py --sizes [--only h100] [--results FILE]
    python benchmarks/plan.py --depth

Each case is one command, `meshwright plan ... compile=true`, in a separate process. Targets without an installed
plugin are skipped and listed. TPU programs take minutes to compile.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = """
cpu-1 model=gpt2 data.batch_size=4 data.seq_len=256
cpu-8 model=gpt2 mesh.fsdp=8 data.batch_size=16 data.seq_len=512 model.remat=full
cpu-8 model=llama3_2_1b mesh.fsdp=4 mesh.tensor=2 data.batch_size=8 data.seq_len=512 model.remat=full
cpu-8 model=qwen3_0_6b mesh.fsdp=4 mesh.tensor=2 data.batch_size=8 data.seq_len=1024 model.remat=save_dots
cpu-8 model=olmoe_1b_7b mesh.expert=4 mesh.fsdp=2 data.batch_size=8 data.seq_len=512 model.remat=full
cpu-8 model=gemma3_1b mesh.data=2 mesh.fsdp=4 data.batch_size=8 data.seq_len=1024 model.remat=full
cpu-8 model=llama3_8b mesh.fsdp=8 data.batch_size=8 data.seq_len=1024 model.remat=full
cpu-8 model=mixtral_8x7b mesh.expert=8 data.batch_size=8 data.seq_len=1024 model.remat=full
cpu-8 model=qwen3_30b_a3b mesh.expert=8 data.batch_size=8 data.seq_len=1024 model.remat=full
cpu-8 model=llama3_2_1b mesh.stage=4 mesh.data=2 data.batch_size=16 data.seq_len=512 model.remat=full
h100-1 model=gpt2 data.batch_size=8 data.seq_len=512
h100-8 model=llama3_2_1b mesh.fsdp=8 data.batch_size=16 data.seq_len=1024
h100-8 model=llama3_8b mesh.fsdp=8 data.batch_size=8 data.seq_len=2048 model.remat=full
h100-64 model=llama3_8b mesh.fsdp=32 mesh.tensor=2 data.batch_size=64 data.seq_len=2048 model.remat=save_dots
h100-8 model=olmoe_1b_7b mesh.fsdp=8 data.batch_size=8 data.seq_len=1024 model.remat=full
h100-32 model=mixtral_8x7b mesh.expert=8 mesh.fsdp=4 data.batch_size=32 data.seq_len=2048 model.remat=full
h100-64 model=llama3_70b mesh.fsdp=16 mesh.tensor=4 data.batch_size=32 data.seq_len=2048 model.remat=full
h100-8 model=qwen3_4b mesh.data=2 mesh.fsdp=4 data.batch_size=8 data.seq_len=2048 model.remat=save_qkv
h100-16 model=llama3_8b mesh.stage=4 mesh.fsdp=4 data.batch_size=64 data.seq_len=2048 model.remat=full
h100-16 model=llama3_8b mesh.stage=4 mesh.data=2 mesh.tensor=2 data.batch_size=64 data.seq_len=2048 model.remat=full
h100-32 model=mixtral_8x7b mesh.stage=4 mesh.expert=4 mesh.fsdp=2 data.batch_size=64 data.seq_len=2048 model.remat=full
h100-8 model=llama3_2_1b mesh.context=4 mesh.fsdp=2 data.batch_size=4 data.seq_len=16384 model.remat=full
v5e-1 model=gpt2 data.batch_size=8 data.seq_len=512 model.remat=full
v5e-8 model=llama3_2_1b mesh.fsdp=8 data.batch_size=16 data.seq_len=1024 model.remat=full
2*v5e-16 model=llama3_2_1b mesh.data=2 mesh.fsdp=16 data.batch_size=64 data.seq_len=2048 model.remat=full
v5p-32 model=llama3_8b mesh.fsdp=16 data.batch_size=16 data.seq_len=2048 model.remat=full
v6e-16 model=olmoe_1b_7b mesh.fsdp=4 mesh.expert=4 data.batch_size=16 data.seq_len=2048 model.remat=full
v5e-16 model=smollm2_1_7b mesh.data=2 mesh.fsdp=8 data.batch_size=32 data.seq_len=1024 model.remat=save_dots
v5p-128 model=llama3_8b mesh.fsdp=16 mesh.tensor=4 data.batch_size=64 data.seq_len=2048 model.remat=full
v5p-128 model=mixtral_8x7b mesh.expert=8 mesh.fsdp=8 data.batch_size=64 data.seq_len=2048 model.remat=full
v5p-1024 model=llama3_70b mesh.fsdp=64 mesh.tensor=8 data.batch_size=128 data.seq_len=4096 model.remat=full
"""
# Published by others for their own programs: target, MFU, tokens a second of a device, source; run. See the page.
PUBLISHED = """
h100-8 0.36 6667 torchtitan; model=llama3_8b mesh.fsdp=8 data.batch_size=8 data.seq_len=8192 model.remat=full
h100-8 0.475 9850 OLMo-core; model=olmo2_7b mesh.fsdp=8 data.batch_size=16 data.seq_len=4096 model.remat=full
v6e-256 0.4546 7207 MaxText; model=llama3_8b mesh.fsdp=256 data.batch_size=768 data.seq_len=8192 model.remat=full
v6e-256 0.5033 960 MaxText; model=llama3_70b mesh.fsdp=256 data.batch_size=512 data.seq_len=8192 model.remat=full
v5p-1024 0.654 692 MaxText; model=llama3_70b mesh.fsdp=512 data.batch_size=2048 data.seq_len=4096 model.remat=full
v5p-512 0.5256 2909 MaxText; model=mixtral_8x7b mesh.fsdp=256 data.batch_size=2048 data.seq_len=4096 model.remat=full
v6e-256 0.3523 3899 MaxText; model=mixtral_8x7b mesh.fsdp=256 data.batch_size=2048 data.seq_len=4096 model.remat=full
"""

# Llama 3 from a few devices to thousands: a row or two of each piece of the batch, with stages eight.
SIZES = """
h100-8 model=llama3_8b mesh.fsdp=8 data.batch_size=8
h100-64 model=llama3_8b mesh.data=8 mesh.fsdp=8 data.batch_size=64
h100-1024 model=llama3_8b mesh.data=128 mesh.fsdp=8 data.batch_size=1024
h100-8 model=llama3_70b mesh.fsdp=8 data.batch_size=8
h100-64 model=llama3_70b mesh.fsdp=8 mesh.tensor=8 data.batch_size=16
h100-1024 model=llama3_70b mesh.data=16 mesh.fsdp=8 mesh.tensor=8 data.batch_size=256
h100-64 model=llama3_405b mesh.fsdp=8 mesh.tensor=8 data.batch_size=16
h100-1024 model=llama3_405b mesh.fsdp=128 mesh.tensor=8 data.batch_size=128
h100-1024 model=llama3_405b mesh.stage=2 mesh.fsdp=64 mesh.tensor=8 data.batch_size=512
v5p-128 model=llama3_8b mesh.fsdp=64 data.batch_size=64
v5p-1024 model=llama3_8b mesh.data=8 mesh.fsdp=64 data.batch_size=512
v5p-8192 model=llama3_8b mesh.data=64 mesh.fsdp=64 data.batch_size=4096
v5p-128 model=llama3_70b mesh.fsdp=64 data.batch_size=64
v5p-1024 model=llama3_70b mesh.fsdp=128 mesh.tensor=4 data.batch_size=256
v5p-8192 model=llama3_70b mesh.data=8 mesh.fsdp=128 mesh.tensor=4 data.batch_size=2048
v5p-128 model=llama3_405b mesh.fsdp=16 mesh.tensor=4 data.batch_size=16
v5p-1024 model=llama3_405b mesh.fsdp=64 mesh.tensor=8 data.batch_size=128
v5p-8192 model=llama3_405b mesh.data=4 mesh.fsdp=128 mesh.tensor=8 data.batch_size=1024
"""
DEPTHS = (8, 16, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only targets with this prefix")
    parser.add_argument("--results", default="", help="JSON-lines file to resume from")
    parser.add_argument("--write", default="", help="Markdown page whose table is replaced")
    parser.add_argument("--again", action="store_true", help="repeat the estimates of --results without compiling")
    parser.add_argument(
        "--published", action="store_true", help="print the table of speed compared with published runs"
    )
    parser.add_argument("--sizes", action="store_true", help="print the table of Llama 3 by size and number of devices")
    parser.add_argument("--depth", action="store_true", help="print compilation time by number of layers")
    options = parser.parse_args()
    if options.published:
        print(published())
        return
    if options.depth:
        print(depth())
        return
    kept = Path(options.results) if options.results else Path(tempfile.mkdtemp()) / "results.jsonl"
    if options.sizes:
        print(sizes(options.only, kept))
        return
    done = results(kept)
    for case in CASES.strip().splitlines():
        if case in done or not case.startswith(options.only):
            continue
        row = measured(case)
        if row is not None:
            done[case] = row
            keep(kept, row)
    rows = [done[case] for case in CASES.strip().splitlines() if case in done]
    if options.again:
        rows = [row | {"estimate": (planned(row["case"]) or {})["memory"]["total"]} for row in rows]
    text = table(rows)
    print(text)
    if options.write:
        page = Path(options.write)
        head, _, rest = page.read_text().partition("<!-- table -->")
        page.write_text(f"{head}<!-- table -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}")


def results(kept: Path) -> dict[str, dict]:
    """By case, of earlier commands with the same file."""
    return {row["case"]: row for row in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}


def keep(kept: Path, row: dict) -> None:
    with open(kept, "a") as file:
        file.write(json.dumps(row) + "\n")


def planned(case: str, *more: str) -> dict | None:
    target, *overrides = case.split()
    kind, _, count = target.partition("-")
    mesh = [] if "mesh.data" in case else ["mesh.data=1"]
    where = [f"fake_devices={count}", "target=cpu"] if kind == "cpu" else [f"target={target}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.cli", "plan", *overrides, *mesh, *where, *more]
        command += ["format=json", f"task.output={folder}"]
        ended = subprocess.run(command, capture_output=True, text=True)
    if not ended.stdout.startswith("{"):
        last = ended.stderr.strip().splitlines()[-1:]
        print(f"left out: {case}: {' '.join(last)}", file=sys.stderr)
        return None
    return json.loads(ended.stdout)


def published() -> str:
    lines = [
        "| target | run | published | MFU | predicted | error | tokens/s a device | predicted |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for line in PUBLISHED.strip().splitlines():
        facts, _, run = line.partition("; ")
        target, mfu, speed, who = facts.split()
        plan = planned(f"{target} {run}")
        if plan is None:
            continue
        error, own = plan["mfu"] / float(mfu) - 1, plan["tokens_per_second_per_device"]
        cells = [target, short(run) + ("" if plan["fits"] else ", does not fit"), who, f"{float(mfu):.1%}"]
        cells += [f"{plan['mfu']:.1%}", f"{error:+.0%}", f"{int(speed):,}", f"{own:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes(only: str, kept: Path) -> str:
    done = results(kept)
    lines = [
        "| target | run | XLA, GB of a device | | predicted step | MFU | collectives: GB of results | compiled in |",
        "|---|---|---:|---|---:|---:|---|---:|",
    ]
    for case in SIZES.strip().splitlines():
        if not case.startswith(only):
            continue
        if case not in done:
            plan = planned(case, "data.seq_len=4096", "model.remat=full", "compile=true")
            if plan is None:
                continue
            wanted = ("compiled", "memory", "seconds", "mfu")
            done[case] = {"case": case} | {key: plan[key] for key in wanted}
            keep(kept, done[case])
        row = done[case]
        target, _, run = case.partition(" ")
        compiled, capacity = row["compiled"], row["memory"]["capacity"]
        verdict = "fits" if compiled["fits"] else "does not fit"
        moved = "; ".join(
            f"{c['axes']} {c['kind']} {c['count']:,}: {c['bytes'] / 1e9:.1f}"
            for c in compiled["collectives"] or ()
            if c["bytes"] > 1e8
        )
        cells = [target, short(run), f"{compiled['peak_bytes'] / 1e9:.1f} of {capacity / 1e9:.1f}", verdict]
        cells += [f"{row['seconds']['step']:.2f} s", f"{row['mfu']:.0%}", moved, f"{compiled['seconds']:.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def depth() -> str:
    lines = ["| layers | traced and compiled in |", "|---:|---:|"]
    for layers in DEPTHS:
        run = "h100-8 model=llama3_8b mesh.fsdp=8 data.batch_size=8 data.seq_len=4096 model.remat=full"
        plan = planned(f"{run} model.num_layers={layers}", "compile=true")
        if plan is not None:
            lines.append(f"| {layers} | {plan['compiled']['seconds']:.1f} s |")
    return "\n".join(lines)


def short(run: str) -> str:
    for word in ("model=", "data.", "mesh.", "model."):
        run = run.replace(word, "")
    return run


def measured(case: str) -> dict | None:
    plan = planned(case, "compile=true")
    if plan is None:
        return None
    row = {
        "case": case,
        "estimate": plan["memory"]["total"],
        "arguments": plan["compiled"]["argument_bytes"],
        "xla": plan["compiled"]["peak_bytes"],
        "seconds": plan["compiled"]["seconds"],
    }
    print(f"{row['estimate'] / row['xla'] - 1:+.1%} {case}", file=sys.stderr, flush=True)
    return row


def table(rows: list[dict]) -> str:
    lines = [
        "| target | run | XLA, GB | of it arguments | estimate, GB | error | compiled in |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    errors = []
    for row in rows:
        target, _, run = row["case"].partition(" ")
        errors.append(abs(row["estimate"] / row["xla"] - 1))
        run = short(run)
        gb = [f"{row[key] / 1e9:.2f}" for key in ("xla", "arguments", "estimate")]
        error = f"{row['estimate'] / row['xla'] - 1:+.1%}"
        lines.append(f"| {target} | {run} | {' | '.join(gb)} | {error} | {row['seconds']:.0f} s |")
    within = sum(error <= 0.1 for error in errors)
    middle = sorted(errors)[len(errors) // 2] if errors else 0.0
    lines += ["", f"{within} of {len(rows)} within 10 %; the median error is {middle:.1%}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
