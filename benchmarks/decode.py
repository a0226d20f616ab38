"""Decode throughput beside `transformers.generate`, on the same machine, with the same weights, in one run.

    python benchmarks/decode.py [--model FOLDER] [--layers 30] [--requests 48] [--repeats 2]

Without FOLDER, random weights of SmolLM2-135M's shape. Both write greedily in f32 and their tokens are compared. Two
loads: `equal` (16 prompts of 64 tokens, 64 tokens each) and `mixed` (prompts of 16 to 256 and completions of 8 to 256
tokens, log-uniform): transformers takes 16 requests at a time, in the order in which they come, padded on the left, and
is done with a batch when its longest is. Only tokens that were asked for are counted.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from models.config import Dtype
from models.decode import Engine, EngineConfig, Request
from models.huggingface import family_of
from models.huggingface_files import Folder, load_params
from models.sampling import SamplingConfig
from models.transformer import abstract_params

SLOTS = 16


def random_checkpoint(folder: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=1e5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def loads(requests: int, vocab: int) -> dict[str, list[tuple[list[int], int]]]:
    """(prompt, tokens to write) of each request."""
    rng = np.random.default_rng(0)
    prompt = lambda n: rng.integers(3, vocab, n).tolist()
    between = lambda low, high: int(np.exp(rng.uniform(np.log(low), np.log(high))))
    return {
        "equal": [(prompt(64), 64) for _ in range(SLOTS)],
        "mixed": [(prompt(between(16, 256)), between(8, 256)) for _ in range(requests)],
    }


def with_transformers(model, requests):
    import torch

    written = []
    start = time.perf_counter()
    for at in range(0, len(requests), SLOTS):
        batch = requests[at : at + SLOTS]
        longest, most = max(len(p) for p, _ in batch), max(n for _, n in batch)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in batch])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=most, min_new_tokens=most, pad_token_id=0
            )
        written += [row[longest : longest + n].tolist() for row, (_, n) in zip(out, batch, strict=True)]
    return written, time.perf_counter() - start


def with_engine(engine, requests):
    start = time.perf_counter()
    numbers = [engine.submit(Request(p, SamplingConfig(max_new_tokens=n, temperature=0.0))) for p, n in requests]
    written = {number: [] for number in numbers}
    while engine.busy:
        for event in engine.step():
            written[event.request].append(event.token)
    return [written[n] for n in numbers], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(args.model or temporary)
        if not args.model:
            random_checkpoint(path, args.layers)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        folder = Folder(path)
        config = family_of(folder.config).read(folder.config)
        config.dtype = Dtype.float32
        engine = Engine(
            load_params(folder, config, abstract_params(config)), config, EngineConfig(slots=SLOTS, length=640)
        )
        work = loads(args.requests, config.vocab_size)
        with_engine(engine, [(p, 2) for p, _ in work["mixed"]])  # compiles
        with_transformers(theirs, [(work["equal"][0][0], 2)])
        print(f"{jax.device_count()} device, {torch.get_num_threads()} threads, {config.num_layers} layers")
        for name, requests in work.items():
            tokens = sum(n for _, n in requests)
            best = {"transformers": np.inf, "engine": np.inf}
            for _ in range(args.repeats):
                want, seconds = with_transformers(theirs, requests)
                best["transformers"] = min(best["transformers"], seconds)
                found, seconds = with_engine(engine, requests)
                best["engine"] = min(best["engine"], seconds)
            same = sum(a == b for a, b in zip(want, found, strict=True))
            rates = {who: tokens / seconds for who, seconds in best.items()}
            print(
                f"{name}: {len(requests)} requests, {tokens} tokens: transformers {rates['transformers']:.1f} tok/s, "
                f"engine {rates['engine']:.1f} tok/s, ratio {rates['engine'] / rates['transformers']:.2f}; "
                f"{same} of {len(requests)} completions equal",
                flush=True,
            )


if __name__ == "__main__":
    main()
