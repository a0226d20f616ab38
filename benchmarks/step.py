"""CPU training step benchmark: tokens/s compared with PyTorch, transformers and a hand-written JAX step.

    python benchmarks/step.py [--models gpt2,10m] [--dtypes float32,bfloat16] [--rounds 5] [OVERRIDES]

GPT-2 124M (context 256, batch 4) and a model of 10 million parameters of the same kind (context 256, batch 16), AdamW,
gradient clipping, weights in float32. All start from the same weights and train on the same tokens. Exits with 1 if the
losses of the first steps differ by more than 1e-4 (bfloat16: 1e-2), relative. Then the trainer alternates with each of
the others, two processes at a time.

FLOPs: six per matmul weight and token, plus causal attention (half of a row); recomputation is not counted. The
reference rate is that of a [2048, 2048] matmul in JAX, alternating with the steps. Overrides (`model.scan_unroll=0`)
are those of `meshwright train`.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import turns
from composed import composed, drawn, one_document
from turns import Contestant, Spread

OPTIMIZER = (3e-4, 0.9, 0.95, 1e-8, 0.1, 1.0)  # rate, b1, b2, eps, weight decay, clipping
OURS = "meshwright"
CHECKED = 3  # steps whose losses are compared
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Shape:
    vocab: int
    length: int
    layers: int
    width: int
    heads: int
    batch: int

    @property
    def flops(self) -> float:
        """Of a step."""
        matrices = self.layers * 12 * self.width**2 + self.vocab * self.width
        attention = self.layers * 2 * self.width * self.length  # two products over half of the row
        return 3 * (2 * matrices + attention) * self.batch * self.length


SHAPES = {
    "gpt2": Shape(50304, 256, 12, 768, 12, 4),
    "10m": Shape(65, 256, 6, 384, 6, 16),
    "tiny": Shape(64, 32, 2, 32, 2, 2),
}


def write_weights(folder: Path, shape: Shape) -> None:
    """A checkpoint that all can read, in the names of GPT-2."""
    from safetensors.numpy import save_file

    rng, D = np.random.default_rng(0), shape.width
    drawn = lambda *sizes: (0.02 * rng.standard_normal(sizes)).astype(np.float32)
    tensors = {"wte.weight": drawn(shape.vocab, D), "wpe.weight": drawn(shape.length, D)}
    sizes = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
    for layer in range(shape.layers):
        for name, (rows, columns) in sizes.items():
            tensors[f"h.{layer}.{name}.weight"] = drawn(rows, columns)
            tensors[f"h.{layer}.{name}.bias"] = np.zeros(columns, np.float32)
    for name in ["ln_f", *(f"h.{layer}.ln_{i}" for layer in range(shape.layers) for i in (1, 2))]:
        tensors |= {f"{name}.weight": np.ones(D, np.float32), f"{name}.bias": np.zeros(D, np.float32)}
    save_file({f"transformer.{k}": v for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": shape.vocab, "n_embd": D,
        "n_layer": shape.layers, "n_head": shape.heads, "n_positions": shape.length, "n_ctx": shape.length,
        "activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def batches(shape: Shape):
    """(tokens, targets) without end, the same for all."""
    for ids in drawn(shape.vocab, shape.batch, shape.length):
        yield ids[:, :-1], ids[:, 1:]


def meshwright(folder: str, shape: Shape, precision: str, overrides: Sequence[str] = ()):
    """The trainer's own step, as `meshwright train model=gpt2` compiles it."""
    from launch.build import build_core
    from models.formats.huggingface.checkpoint_files import Folder, load_params
    from trainer.reliability.loss_spikes import NO_LIMITS

    rate, b1, b2, eps, weight_decay, clip = OPTIMIZER
    given = [
        "model=gpt2", f"model.vocab_size={shape.vocab}", f"model.max_seq_len={shape.length}",
        f"model.num_layers={shape.layers}", f"model.embed_dim={shape.width}",
        f"model.mlp.intermediate_dim={4 * shape.width}",
        f"model.attention.num_heads={shape.heads}", f"model.attention.num_kv_heads={shape.heads}",
        f"model.attention.head_dim={shape.width // shape.heads}", f"model.dtype={precision}", "optimizer=adamw",
        f"optimizer.learning_rate={rate}", f"optimizer.b1={b1}", f"optimizer.b2={b2}", f"optimizer.eps={eps}",
        f"optimizer.weight_decay={weight_decay}", f"optimizer.max_grad_norm={clip}", "schedule=constant",
        "schedule.warmup_steps=0", f"data.seq_len={shape.length}", f"data.batch_size={shape.batch}", *overrides,
    ]  # fmt: skip
    core = build_core(composed(given), None)
    holds = [core.init_state(None, load_params(Folder(Path(folder)), core.model, core.own))]
    feed = drawn(shape.vocab, shape.batch, shape.length)

    def turn() -> float:
        holds[0], metrics = core.train_step(holds[0], {}, core.place(one_document(next(feed))), NO_LIMITS)
        return float(metrics["loss"])

    return turn


def bare(folder: str, shape: Shape, precision: str):
    from peers.bare import make_turn

    return make_turn(folder, shape.heads, precision, OPTIMIZER, batches(shape))


def torch_step(folder: str, shape: Shape, precision: str, compiled: bool):
    import torch
    from peers.nanogpt import make_step, read_gpt2

    model = read_gpt2(folder, shape.vocab, shape.length, shape.layers, shape.width, shape.heads)
    run = torch.compile(model) if compiled else model
    return make_step(lambda _, *batch: run(*batch), model, OPTIMIZER, precision, batches(shape))


def transformers_step(folder: str, shape: Shape, precision: str):
    import torch.nn.functional as F
    from peers.nanogpt import make_step
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa").train()

    def loss_of(model, tokens, targets):
        logits = model(tokens, use_cache=False).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))

    return make_step(loss_of, model, OPTIMIZER, precision, batches(shape))


def matmul(precision: str):
    """Its turn gives FLOP/s."""
    from trainer.metrics import measure_matmul

    return lambda: measure_matmul(precision, size=2048, seconds=0.5)


def contestants(folder: str, shape: Shape, precision: str, overrides: list[str]) -> dict[str, Contestant]:
    common = {"folder": folder, "shape": shape, "precision": precision}
    made = {
        OURS: (meshwright, {**common, "overrides": overrides}),
        "bare JAX": (bare, common),
        "PyTorch eager": (torch_step, {**common, "compiled": False}),
        "torch.compile": (torch_step, {**common, "compiled": True}),
        "transformers": (transformers_step, common),
    }
    huge_pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as `meshwright` sets it for itself
    return {name: Contestant(*what, huge_pages) for name, what in made.items()}


def measured(name: str, precision: str, only: list[str], rounds: int, steps: int, overrides: list[str]) -> dict:
    """Compares the trainer with each other framework for one model and precision, two processes at a time."""
    shape = SHAPES[name]
    found: dict = {"model": name, "dtype": precision, "shape": asdict(shape), "flops": shape.flops, "peers": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), shape)
        entered = contestants(folder, shape, precision, overrides)
        for who in [k for k in entered if k != OURS and (not only or k in only)]:
            with ExitStack() as stack:
                seats, losses, first = {}, {}, {}
                for each in (OURS, who):
                    seats[each] = turns.seat(stack, entered[each])
                    seconds, losses[each] = seats[each].turns(CHECKED)
                    first[each] = seats[each].ready + seconds[0]
                off = max(abs(b / a - 1) for a, b in zip(losses[OURS], losses[who], strict=True))
                print(f"{name} {precision}: {who}: {losses[who]}, off by {off:.1e}", flush=True)
                seats["matmul"] = turns.seat(stack, Contestant(matmul, {"precision": precision}))
                seconds, results = turns.take_turns(seats, rounds, steps)
                found["peers"][who] = {
                    "seconds": {each: seconds[each] for each in (OURS, who)}, "matmul": results["matmul"], "off": off,
                    "losses": losses, "first_step": first, "bytes": {each: seats[each].bytes for each in (OURS, who)},
                }  # fmt: skip
    return found


def table(results: list[dict]) -> str:
    lines = [
        "| model | dtype | | tokens/s | meshwright tokens/s | speedup | fraction of matmul rate "
        "| meshwright | memory | meshwright |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        tokens = r["shape"]["batch"] * r["shape"]["length"]
        for who, pair in r["peers"].items():
            seconds, cells = pair["seconds"], []
            rates = {each: Spread.of([tokens / s for s in found]) for each, found in seconds.items()}
            for each in (who, OURS):
                shares = [r["flops"] / s / m for s, m in zip(seconds[each], pair["matmul"], strict=True)]
                cells.append(f"{statistics.median(shares):.0%}")
            cells += [f"{pair['bytes'][each] / 1e9:.1f} GB" for each in (who, OURS)]
            faster = turns.ratios(seconds[who], seconds[OURS]).text(".2f")
            both = " | ".join(rates[each].text(".0f") for each in (who, OURS))
            lines.append(f"| {r['model']} | {r['dtype']} | {who} | {both} | {faster} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,10m")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--only", default="", help="comma-separated frameworks; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per framework and round")
    parser.add_argument("--results", default="benchmarks/results")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    cells = itertools.product(options.models.split(","), options.dtypes.split(","))
    given = options.rounds, options.steps, options.overrides
    results = [measured(name, dtype, only, *given) for name, dtype in cells]
    found = {"machine": turns.machine(), "overrides": options.overrides, "results": results}
    path = turns.keep(options.results, "step", found)
    groups = {}
    for r in results:
        rate = lambda found, tokens=r["shape"]["batch"] * r["shape"]["length"]: Spread.of([tokens / s for s in found])
        ours = [s for pair in r["peers"].values() for s in pair["seconds"][OURS]]
        bars = {OURS: rate(ours)} | {who: rate(pair["seconds"][who]) for who, pair in r["peers"].items()}
        groups[f"{r['model']}, {r['dtype']}"] = bars
    turns.draw_bars(path.with_suffix(".png"), "A training step on this CPU", groups, "tokens/s")
    print(f"\n{turns.in_words(found['machine'])}\n\n{table(results)}\n\n{path} and {path.with_suffix('.png').name}")
    apart = [
        f"{r['model']} {r['dtype']} {who} {pair['off']:.1e}"
        for r in results
        for who, pair in r["peers"].items()
        if pair["off"] > TOLERANCE[r["dtype"]]
    ]
    if apart:
        sys.exit(f"losses differ: {'; '.join(apart)}")


if __name__ == "__main__":
    main()
