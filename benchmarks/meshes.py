"""Compares losses and gradient norms of the same run on every mesh with those of one device.

    python benchmarks/meshes.py [--steps 20] [--dtypes float32,bfloat16] [--only dense|moe] [--write docs/meshes.md]
    python benchmarks/meshes.py --processes

Each cell is `meshwright train` on 8 fake devices: same model, data (packed documents) and seed, compared with one
device in the same dtype. Exits with 1 if in float32 a loss differs by more than 1e-5, or a gradient norm by more than
1e-4, relative. For MoE models, the last column is the first step at which a token is routed to other experts than on
one device, because of rounding in a near tie; from that step on the runs diverge.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DENSE = [
    "data=8", "fsdp=8", "tensor=4 data=2", "context=8", "data=2 fsdp=4", "fsdp=4 tensor=2", "fsdp=2 tensor=4",
    "data=2 fsdp=2 tensor=2", "context=4 data=2", "context=2 fsdp=4", "context=2 tensor=4", "context=4 tensor=2",
    "context=2 fsdp=2 tensor=2", "context=2 data=2 tensor=2", "context=2 data=2 fsdp=2",
    "fsdp=2 tensor=4 sharding.residual=[context,tensor]", "context=2 tensor=4 sharding.residual=[context,tensor]",
    "stage=4 data=2", "stage=2 fsdp=4", "stage=2 fsdp=4 model.pipeline.num_repeats=2", "stage=2 tensor=2 fsdp=2",
    "stage=2 context=2 tensor=2", 
    "fsdp=8 optimizer.offload_state=true model.remat=full model.activation_offload=[layer_input]",
]  # fmt: skip
MOE = [
    "expert=4 data=2", "expert=2 fsdp=4", "expert=4 tensor=2", "expert=2 tensor=2 fsdp=2", "expert=2 context=4",
    "expert=2 context=2 tensor=2", "expert=4 context=2", "fsdp=8",
    "stage=2 expert=4", "stage=2 expert=2 fsdp=2 model.pipeline.num_repeats=2",
]  # fmt: skip
# Processes, devices of each, and meshes of which at least one axis crosses the border between processes.
CROSSING = [
    (2, 4, "dense", ["fsdp=8", "context=8", "stage=2 fsdp=4", "fsdp=4 tensor=2"]),
    (2, 2, "dense", ["tensor=4"]),
    (2, 4, "moe", ["expert=8", "expert=4 tensor=2"]),
    (4, 2, "dense", ["fsdp=8", "tensor=4 fsdp=2", "context=8", "stage=4 data=2"]),
    (4, 2, "moe", ["expert=8", "stage=2 expert=4"]),
]
# Four layers divide over the stages; the MoE model has a dense first layer in addition.
MODELS = {"dense": ("tiny model.num_layers=4", DENSE), "moe": ("tiny_moe model.num_layers=5", MOE)}
COMMON = [
    "source=[python_stdlib]", "tokenizer=bytes", "data.packing=best_fit", "data.seq_len=128", "data.batch_size=16",
    "task.sample_tokens=0", "optimizer.learning_rate=3e-4", "schedule=constant", "schedule.warmup_steps=0",
    "data.max_eval_batches=1", "model.vocab_size=264",
]  # fmt: skip
LOSS, GRADIENT = 1e-5, 1e-4
METRICS = ("train/loss", "train/grad_norm")
LOADS = ("train/router/max_load", "train/router/balance_loss")
SAME_LOADS = 3e-5  # relative: they are means of counts, and one token more of 2,048 is above it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--write", default="", help="Markdown page to write")
    parser.add_argument("--processes", action="store_true", help="compare several processes with one")
    options = parser.parse_args()
    if options.processes:
        print(processes(options.steps))
        return
    dtypes = options.dtypes.split(",")
    lines = [
        f"| model | mesh |{''.join(f' {d}: losses | gradients | choices part at step |' for d in dtypes)}",
        "|---|---|" + "---:|---:|---:|" * len(dtypes),
    ]
    worst = {dtype: [0.0, 0.0] for dtype in dtypes}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for name in [options.only] if options.only else MODELS:
            model, meshes = MODELS[name]
            run = lambda mesh, dtype, model=model: measured(model, mesh, options.steps, dtype, Path(folder))
            one = {dtype: run("", dtype) for dtype in dtypes}  # first: it prepares the data
            begun = {(mesh, dtype): pool.submit(run, mesh, dtype) for mesh in meshes for dtype in dtypes}
            for mesh in meshes:
                cells = []
                for dtype in dtypes:
                    found = begun[mesh, dtype].result()
                    off = [max(differences(one[dtype][key], found[key])) for key in METRICS]
                    worst[dtype] = [max(a, b) for a, b in zip(worst[dtype], off, strict=True)]
                    loads = [differences(one[dtype][key], found[key]) for key in LOADS if key in found]
                    apart = [step for load in loads for step, d in enumerate(load, 1) if d > SAME_LOADS]
                    cells += [*(f"{value:.1e}" for value in off), str(min(apart, default="never")) if loads else ""]
                lines.append(f"| {name} | {mesh} | {' | '.join(cells)} |")
                print(lines[-1], file=sys.stderr, flush=True)
    largest = "; ".join(f"{dtype} {a:.1e} and {b:.1e}" for dtype, (a, b) in worst.items())
    text = "\n".join([*lines, "", f"The largest, of losses and of gradients' norms: {largest}."])
    print(text)
    if options.write:
        Path(options.write).write_text(PAGE.format(steps=options.steps, table=text))
    a, b = worst.get("float32", (0.0, 0.0))
    sys.exit(a > LOSS or b > GRADIENT)


def processes(steps: int) -> str:
    """Compares each mesh over several processes of this machine with the same mesh in one process."""
    lines = ["| processes x devices | model | mesh | losses | gradients |", "|---|---|---|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        for count, devices, name, meshes in CROSSING:
            for mesh in meshes:
                run = lambda more, mesh=mesh, name=name: measured(
                    MODELS[name][0], f"{mesh} {more}", steps, "float32", Path(folder)
                )
                one, several = (run(f"fake_devices={count * devices} launcher.num_processes={n}") for n in (1, count))
                off = [f"{max(differences(one[key], several[key])):.1e}" for key in METRICS]
                lines.append(f"| {count} x {devices} | {name} | {mesh} | {' | '.join(off)} |")
                print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def differences(one: list[float], other: list[float]) -> list[float]:
    """Relative, of each step."""
    return [abs(b / a - 1) for a, b in zip(one, other, strict=True)]


def measured(model: str, mesh: str, steps: int, dtype: str, folder: Path) -> dict[str, list[float]]:
    """Of each step."""
    run = re.sub("[^a-z0-9]+", "-", f"{model}-{dtype}-{mesh or 'one'}").strip("-")
    axes = [key if "." in key or key.startswith("devices") else f"mesh.{key}" for key in mesh.split()]
    given = ["fake_devices=8", *([] if "data=" in mesh else ["mesh.data=1"]), *axes] if mesh else ["fake_devices=1"]
    given = given[1:] if "fake_devices=" in mesh else given
    command = [sys.executable, "-m", "launch.cli", "train", *f"model={model}".split(), f"model.dtype={dtype}"]
    command += [*COMMON, *given, f"run={run}", f"output_dir={folder}", f"task.num_steps={steps}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{run}: {ended.stderr.strip()}")
    rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    kept = {key: [row[key] for row in rows if key in row] for key in (*METRICS, *LOADS)}
    return {key: values for key, values in kept.items() if values}


PAGE = """# One run on every mesh

`python benchmarks/meshes.py --write docs/meshes.md`: {steps} steps of the same model, packed documents and seed on 8
fake CPU devices. The largest relative differences of losses and of norms of gradients from those of one device in the
same dtype of activations (the rounding of bfloat16 differs with the order of sums; weights stay in float32). Where two
experts score equally, rounding decides: the last column is the first step at which a mesh routes a token differently,
detected by expert loads. From that step on the runs diverge.

{table}
"""


if __name__ == "__main__":
    main()
