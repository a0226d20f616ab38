"""Data pipeline benchmark: tokens/s of one core when reading token shards and when tokenizing.

    python benchmarks/tokens.py [--rounds 5] [--results FOLDER]

Reads batches of 8 rows of 2,048 tokens from shards of Python's standard library over several epochs, concatenated and
packed by best fit, compared with copying the same bytes from a memory map. Each process uses one core. Tokenizes the
same library (including writes) by bytes and by SentencePiece.
"""

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import turns
from composed import composed
from turns import Contestant, Spread

BATCH, LENGTH, BATCHES = 8, 2048, 200  # rows of a batch, tokens of a row, batches of a turn
COMMON = ["source=[python_stdlib]", f"data.seq_len={LENGTH}", f"data.batch_size={BATCH}"]
TOKENIZERS = {"bytes": ["tokenizer=bytes"], "sentencepiece": ["tokenizer=sentencepiece", "tokenizer.vocab_size=8000"]}


def prepare(folder: str, tokenizer: str) -> tuple[int, float]:
    """(tokens, seconds) of making the shards; that of a tokenizer is not counted."""
    from launch.corpora import get_tokenizer, load_corpora
    from launch.run_folder import run_folder

    config = composed([*COMMON, *TOKENIZERS[tokenizer], f"output_dir={folder}", f"run={tokenizer}"])
    get_tokenizer(config, run_folder(config), print)
    start = time.perf_counter()
    corpora = load_corpora(config, run_folder(config), print)
    return sum(
        c.num_tokens for c in [*corpora.train.values(), *corpora.validation.values()]
    ), time.perf_counter() - start


def rows(folder: str, packing: str):
    """Its turn gives how many tokens there were in the batches."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from data.loader import Mixture, TokenLoader
    from launch.corpora import load_corpora
    from launch.run_folder import run_folder

    config = composed([*COMMON, *TOKENIZERS["bytes"], f"output_dir={folder}", "run=bytes", f"data.packing={packing}"])
    corpora = load_corpora(config, run_folder(config), lambda text: None)
    mixture = Mixture(corpora.train, config.data, config.seed, None)
    source = TokenLoader(mixture, batch_size=BATCH, slots=range(BATCH), place=lambda batch: batch, prefetch=2)
    return lambda: sum(int((source.next_batch().segment_ids > 0).sum()) for _ in range(BATCHES))


def raw(folder: str):
    """The same bytes, one after the other, as an array of the same type."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    files = sorted(Path(folder, "prepared").glob("*/*.train.tokens.npy"), key=lambda file: file.stat().st_size)
    tokens = np.load(files[-1], mmap_mode="r")
    size, at = BATCH * LENGTH, [0]

    def turn() -> int:
        for _ in range(BATCHES):
            at[0] = (at[0] + size) % (len(tokens) - size)
            np.ascontiguousarray(tokens[at[0] : at[0] + size], np.int32).reshape(BATCH, LENGTH)
        return BATCHES * size

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", default="benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        making = {name: prepare(folder, name) for name in TOKENIZERS}
        entered = {
            "concat": Contestant(rows, {"folder": folder, "packing": "concat"}),
            "best_fit": Contestant(rows, {"folder": folder, "packing": "best_fit"}),
            "plain read": Contestant(raw, {"folder": folder}),
        }
        seats = {name: turns.seat(stack, contestant) for name, contestant in entered.items()}
        turns.take_turns(seats, 1)
        seconds, tokens = turns.take_turns(seats, options.rounds)
    rates = {name: Spread.of([n / s for n, s in zip(tokens[name], seconds[name], strict=True)]) for name in seats}
    found = {"machine": turns.machine(), "seconds": seconds, "tokens": tokens, "making": making}
    path = turns.keep(options.results, "tokens", found)
    lines = ["| | million tokens/s of a core |", "|---|---:|"]
    for name, rate in rates.items():
        lines.append(f"| {name} | {rate.median / 1e6:.1f} ({rate.low / 1e6:.1f} to {rate.high / 1e6:.1f}) |")
    for name, (count, taken) in making.items():
        lines.append(f"| tokenising by {name}, all cores | {count / taken / 1e6:.1f} |")
    print(f"\n{turns.in_words(found['machine'])}\n\n" + "\n".join(lines) + f"\n\n{path}")
    millions = {n: Spread(r.median / 1e6, r.low / 1e6, r.high / 1e6) for n, r in rates.items()}
    turns.draw_bars(path.with_suffix(".png"), "Batches out of prepared shards", {"one core": millions}, "Mtokens/s")


if __name__ == "__main__":
    main()
