"""Checkpoint benchmark (GPT-2 124M with AdamW, 1.5 GB): blocking and total save time, throughput compared with `dd`.

    python benchmarks/checkpoint.py [--rounds 5] [--folder FOLDER] [--results FOLDER]

Each round: `dd` writes the same number of bytes with fsync, then a checkpoint is saved; both are read again after the
page cache is dropped, if permitted. A save also computes SHA-256 digests of all files, and a restore verifies them.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import turns
from composed import composed
from turns import Spread


def forget() -> bool:
    """Drops the page cache; returns whether this is permitted."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="gpt2", help="overrides, as in `meshwright train model=...`")
    parser.add_argument("--folder", default=None, help="on the disk that is measured")
    parser.add_argument("--results", default="benchmarks/results")
    options = parser.parse_args()
    import jax

    from launch.build import build_core
    from models.flops import params_bytes
    from trainer.checkpoint.checkpointer import CheckpointConfig, Checkpointer

    model = f"model={options.model}".split()
    core = build_core(composed([*model, "optimizer=adamw", "model.vocab_size=50304"]), None)
    state = core.init_state()
    # As after some steps: moments that are all zero would be written as almost nothing.
    moved = lambda x: x + 1e-3 * jax.random.normal(jax.random.key(1), x.shape, x.dtype) if x.ndim else x
    state = jax.block_until_ready(replace(state, opt_state=jax.tree.map(moved, state.opt_state)))
    size = params_bytes((state.params, state.opt_state))
    seconds: dict[str, list[float]] = {
        name: [] for name in ("dd write", "blocking save", "full save", "dd read", "restore")
    }
    forgotten = True
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        plain = Path(temporary, "plain")
        dd = lambda *given: subprocess.run(["dd", *given, "bs=4M"], check=True, capture_output=True)
        rest = {"source": {}, "config": {}, "tokenizer": {}}
        for index in range(options.rounds + 1):  # the first makes threads and folders, and is not counted
            found = {"dd write": timed(lambda: dd("if=/dev/zero", f"of={plain}", f"count={size >> 22}", "conv=fsync"))}
            folder = Path(temporary, f"run{index}")
            with Checkpointer(folder, CheckpointConfig(max_to_keep=1)) as checkpointer:
                start = time.perf_counter()
                found["blocking save"] = timed(lambda: checkpointer.save(1, state, **rest))
                checkpointer.wait()
                os.sync()
                found["full save"] = time.perf_counter() - start
            forgotten = forget() and forgotten
            found["dd read"] = timed(lambda: dd(f"if={plain}", "of=/dev/null"))
            with Checkpointer(folder, read_only=True) as checkpointer:
                forget()
                restore = lambda: jax.block_until_ready(checkpointer.restore(None, core.abstract).state)
                found["restore"] = timed(restore)
            shutil.rmtree(folder)
            plain.unlink()
            print(f"round {index}: " + ", ".join(f"{k} {v:.3f} s" for k, v in found.items()), flush=True)
            if index:
                for name, value in found.items():
                    seconds[name].append(value)
    machine = turns.machine()
    path = turns.keep(options.results, "checkpoint", {"machine": machine, "bytes": size, "seconds": seconds})
    share = Spread.of([a / b for a, b in zip(seconds["blocking save"], seconds["full save"], strict=True)])
    lines = ["| | seconds | MB/s |", "|---|---:|---:|"]
    for name, values in seconds.items():
        rate = "" if name == "blocking save" else Spread.of([size / 1e6 / v for v in values]).text(".0f")
        lines.append(f"| {name} | {Spread.of(values).text('.3f')} | {rate} |")
    print(f"\n{turns.in_words(machine)}; {size / 1e9:.2f} GB\n\n" + "\n".join(lines))
    fractions = f"{share.median:.1%} ({share.low:.1%} to {share.high:.1%})"
    print(f"\nA save blocks the training loop for {fractions} of its duration.")
    print("" if forgotten else "The page cache could not be dropped: files were read from memory.", path)


if __name__ == "__main__":
    main()
