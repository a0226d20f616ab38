"""The same run on every mesh: losses and norms of gradients beside those of one device.

    python benchmarks/meshes.py [--steps 20] [--dtype float32] [--only dense|moe] [--write docs/meshes.md]

Each row is `meshwright train` on 8 fake devices: same model, data (packed documents) and seed. Exits with 1 where in
float32 a loss differs by more than 1e-5, or a gradient's norm by more than 1e-4, relative.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DENSE = [
    "data=8", "fsdp=8", "tensor=4 data=2", "context=8", "data=2 fsdp=4", "fsdp=4 tensor=2", "fsdp=2 tensor=4",
    "data=2 fsdp=2 tensor=2", "context=4 data=2", "context=2 fsdp=4", "context=2 tensor=4", "context=4 tensor=2",
    "context=2 fsdp=2 tensor=2", "context=2 data=2 tensor=2", "context=2 data=2 fsdp=2",
]  # fmt: skip
MOE = [
    "expert=4 data=2", "expert=2 fsdp=4", "expert=4 tensor=2", "expert=2 tensor=2 fsdp=2", "expert=2 context=4",
    "expert=2 context=2 tensor=2", "expert=4 context=2", "fsdp=8",
]  # fmt: skip
MODELS = {"dense": ("tiny", DENSE), "moe": ("tiny_moe", MOE)}
COMMON = [
    "source=[python_stdlib]", "tokenizer=bytes", "data.packing=best_fit", "data.seq_len=128", "data.batch_size=16",
    "task.sample_tokens=0", "optimizer.learning_rate=1e-3", "schedule=constant", "schedule.warmup_steps=0",
    "data.eval_batches=1", "model.vocab_size=264",
]  # fmt: skip
LOSS, GRADIENT = 1e-5, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--write", default="", help="the page to write")
    options = parser.parse_args()
    lines = ["| model | mesh | largest difference of losses | of gradients' norms |", "|---|---|---:|---:|"]
    worst = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for name in [options.only] if options.only else MODELS:
            model, meshes = MODELS[name]
            run = lambda mesh, model=model: losses(model, mesh, options.steps, options.dtype, Path(folder))
            one = run("")  # first: it prepares the data
            for mesh, found in zip(meshes, pool.map(run, meshes), strict=True):
                pairs = [(one[key], found[key]) for key in ("train/loss", "train/grad_norm")]
                off = [max(abs(b / a - 1) for a, b in zip(*pair, strict=True)) for pair in pairs]
                worst = [max(a, b) for a, b in zip(worst, off, strict=True)]
                lines.append(f"| {name} | {mesh.replace('=', ' ')} | {off[0]:.1e} | {off[1]:.1e} |")
                print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(
        [*lines, "", f"The largest: {worst[0]:.1e} and {worst[1]:.1e}, relative, over {options.steps} steps."]
    )
    print(text)
    if options.write:
        Path(options.write).write_text(PAGE.format(steps=options.steps, dtype=options.dtype, table=text))
    sys.exit(options.dtype == "float32" and (worst[0] > LOSS or worst[1] > GRADIENT))


def losses(model: str, mesh: str, steps: int, dtype: str, folder: Path) -> dict[str, list[float]]:
    """Of each step."""
    run = f"{model}-{mesh.replace(' ', '-').replace('=', '') or 'one'}"
    axes = [f"mesh.{axis}" for axis in mesh.split()]
    given = ["devices=8", *([] if "data=" in mesh else ["mesh.data=1"]), *axes] if mesh else ["devices=1"]
    command = [sys.executable, "-m", "launch.run", "train", f"model={model}", f"model.dtype={dtype}", *COMMON, *given]
    command += [f"run={run}", f"runs={folder}", f"task.num_steps={steps}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{run}: {ended.stderr.strip()}")
    rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return {key: [row[key] for row in rows if key in row] for key in ("train/loss", "train/grad_norm")}


PAGE = """# One run on every mesh

`python benchmarks/meshes.py --write docs/meshes.md`: {steps} steps of the same model, packed documents and seed on 8
fake CPU devices, {dtype}; losses and norms of gradients beside those of one device.

{table}
"""


if __name__ == "__main__":
    main()
