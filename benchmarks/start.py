"""Start-up time benchmark: `meshwright train experiment=hello` to the first step, compared with a PyTorch GPT.

    python benchmarks/start.py [--rounds 5] [--results FOLDER]

Cold: no compilation cache, token shards or tokenizer. Warm: the same command again. Each process is ended at its first
step; meshwright prints a breakdown of the time. PyTorch runs with and without `torch.compile`, with cold and warm
caches, on random tokens without reading data. Also measures `--help`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import turns
from turns import Spread

HELLO = ["train", "experiment=hello", "run=hello"]
SHAPE = (2048, 256, 4, 192, 3)  # vocabulary, length, layers, width, heads
NANOGPT = """
import sys
sys.path.insert(0, {here!r})
import torch
from peers.nanogpt import GPT, make_step
model = GPT(*{shape})
run = torch.compile(model) if {compiled} else model
tokens = torch.randint(0, {shape}[0], (8, {shape}[1] + 1)).numpy()
step = make_step(lambda _, *batch: run(*batch), model, (1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0), "float32",
                 iter([(tokens[:, :-1], tokens[:, 1:])]))
step()
print("start-up", flush=True)
"""


def first_line(command: list[str], environment: dict[str, str], prefix: str) -> tuple[float, str]:
    """Returns (seconds until a line starts with `prefix`, the line) and ends the process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    said = []
    try:
        for line in process.stdout or ():
            said.append(line)
            if line.startswith(prefix):
                return time.perf_counter() - start, line.strip()
    finally:
        process.kill()
        process.wait()
    sys.exit(f"{' '.join(command)}: no line starts with {prefix!r} in\n{''.join(said)}")


def ours(folder: str) -> tuple[float, str]:
    command = [sys.executable, "-m", "launch.cli", *HELLO, f"output_dir={folder}/runs"]
    return first_line(command, {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}, "start-up")


def theirs(folder: str, compiled: bool) -> tuple[float, str]:
    script = NANOGPT.format(here=str(Path(__file__).parent), shape=SHAPE, compiled=compiled)
    return first_line([sys.executable, "-c", script], {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}, "start-up")


def shown_help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "launch.cli", "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def phases(line: str) -> dict[str, float]:
    """Of `start-up 4.2 s: import 1.8, ...`."""
    return {name: float(value) for name, value in re.findall(r"([a-z ]+?) (\d+\.\d)(?=[,;]|$)", line.partition(":")[2])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", type=int, default=2, help="cold starts of each")
    parser.add_argument("--results", default="benchmarks/results")
    options = parser.parse_args()
    starts = {
        "meshwright": ours,
        "torch.compile": lambda folder: theirs(folder, True),
        "PyTorch eager": lambda folder: theirs(folder, False),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in starts}
    lines: dict[str, list[str]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, count in (("cold", options.cold), ("warm", options.rounds)):
            for index in range(count):
                place = index if kind == "cold" else 0  # that of the first cold start
                for name, start in starts.items():
                    taken, line = start(f"{temporary}/{name.split()[0]}{place}")
                    seconds[name][kind].append(taken)
                    lines[kind] += [line] if name == "meshwright" else []
                    print(f"{kind} {index + 1}: {name} {taken:.2f} s {line}", flush=True)
        helped = [shown_help() for _ in range(options.rounds)]
    found = {"machine": turns.machine(), "seconds": seconds, "lines": lines, "help": helped}
    path = turns.keep(options.results, "start", found)
    table = ["| | cold | warm |", "|---|---:|---:|"]
    for name, kinds in seconds.items():
        table.append(f"| {name} | {' | '.join(Spread.of(kinds[k]).text('.2f') + ' s' for k in kinds)} |")
    for name in sorted({name for line in lines["cold"] for name in phases(line)}):
        middle = lambda kind, name=name: Spread.of([phases(line).get(name, 0.0) for line in lines[kind]]).median
        table.append(f"| of it, {name.strip()} | {middle('cold'):.1f} s | {middle('warm'):.1f} s |")
    table.append(f"| `meshwright --help` | | {Spread.of(helped).text('.2f')} s |")
    print(f"\n{turns.in_words(found['machine'])}\n\n" + "\n".join(table) + f"\n\n{path}")


if __name__ == "__main__":
    main()
