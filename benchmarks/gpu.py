"""GPU training step benchmark: tokens/s, MFU and memory compared with PyTorch (SDPA, `torch.compile`).

    python benchmarks/gpu.py [--models llama3_2_1b,llama3_8b,olmoe_1b_7b] [--length 4096] [--rounds 5]
    python benchmarks/gpu.py --compile h100x1 [model.matmul_precision=fp8]

Weights and moments in bf16, AdamW; the batch grows until memory is full. PyTorch runs the dense shapes. FLOPs: six per
matmul weight and token, plus causal attention (half of a row); recomputation is not counted. MFU is the fraction of the
data sheet's dense bf16 rate, reported with the fraction of a measured [8192, 8192] matmul. `--compile` needs no GPU: it
cross-compiles each step and lists the kernels of the program. Overrides apply to the trainer only.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

import turns
from composed import built, composed, drawn
from turns import Contestant, Spread

MODELS = ("llama3_2_1b", "llama3_8b", "olmoe_1b_7b")
REMAT = {"llama3_2_1b": "qkv", "llama3_8b": "qkv", "olmoe_1b_7b": "full"}
BATCHES = (32, 16, 8, 4, 2, 1)  # rows; the first that fits


def overrides(model: str, rows: int, length: int, given: Sequence[str] = ()) -> list[str]:
    return [
        f"model={model}", "model.param_dtype=bfloat16", "model.attention.implementation=auto",
        f"model.remat={REMAT[model]}",
        f"data.seq_len={length}", f"data.batch_size={rows}", "optimizer=adamw", "schedule=constant",
        "schedule.warmup_steps=0", *given,
    ]  # fmt: skip


def meshwright(model: str, rows: int, length: int, given: Sequence[str]):
    """Its turn gives (loss, bytes of the device that were in use at most)."""
    import jax

    from trainer.reliability.loss_spikes import NO_LIMITS

    core, batch = built(overrides(model, rows, length, given))
    holds = [core.init_state()]

    def turn():
        holds[0], metrics = core.train_step(holds[0], {}, batch, NO_LIMITS)
        loss = float(metrics["loss"])
        return loss, (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    turn()
    return turn


def pytorch(model: str, rows: int, length: int):
    import torch
    from peers.llama import Llama

    c = composed(overrides(model, rows, length)).model
    a = c.attention
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    shape = (c.vocab_size, c.num_layers, c.embed_dim, a.num_heads, a.num_kv_heads, a.head_dim, c.mlp.intermediate_dim)
    llama = Llama(*shape, c.rope.theta, c.tied_embeddings, recompute=model != "llama3_2_1b")
    run = torch.compile(llama)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-4, fused=True)
    ids = torch.as_tensor(next(drawn(c.vocab_size, rows, length))).cuda()

    def turn():
        loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), torch.cuda.max_memory_allocated()

    turn()
    return turn


def product():
    """FLOP/s of a large product."""
    import time

    import jax
    import jax.numpy as jnp

    x = jnp.ones((8192, 8192), jnp.bfloat16)
    many = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: (y @ x) * 1e-4, x))
    many(x).block_until_ready()

    def turn() -> float:
        start = time.perf_counter()
        many(x).block_until_ready()
        return 20 * 2 * 8192**3 / (time.perf_counter() - start)

    return turn


def measured(model: str, length: int, rounds: int, given: Sequence[str]) -> dict:
    """Each alone on the device, for memory is what bounds the batch; so rounds are of processes, not of steps."""
    import importlib.util

    entered = {"meshwright": meshwright}
    if importlib.util.find_spec("torch") and "olmoe" not in model:
        entered["torch.compile"] = pytorch
    found: dict = {who: {"seconds": [], "rows": None, "bytes": 0} for who in entered}
    rates = []
    for index in range(rounds):
        with ExitStack() as stack:
            rates += turns.seat(stack, Contestant(product)).turns(1)[1]
        for who, make in entered.items():
            for rows in BATCHES if found[who]["rows"] is None else [found[who]["rows"]]:
                with ExitStack() as stack:
                    try:
                        args = {"model": model, "rows": rows, "length": length}
                        args |= {"given": given} if make is meshwright else {}
                        seconds, results = turns.seat(stack, Contestant(make, args)).turns(6)
                    except turns.Failed as failed:
                        if not re.search("memory|RESOURCE_EXHAUSTED|ended", str(failed), re.I):
                            raise
                        print(f"{model}: {who} with {rows} rows: {str(failed)[:100]}", flush=True)
                        continue
                found[who]["rows"], found[who]["bytes"] = rows, results[-1][1]
                found[who]["seconds"].append(sorted(seconds[1:])[2])
                print(f"{model} round {index + 1}: {who}: {rows} rows, {found[who]['seconds'][-1]:.3f} s", flush=True)
                break
    return {"model": model, "length": length, "product": rates, "found": found}


def table(results: list[dict]) -> str:
    from models.flops import flops_per_token
    from trainer.metrics import peak

    lines = [
        "| model | | rows | tokens/s | MFU | of the measured rate | memory |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        flops = flops_per_token(composed(overrides(r["model"], 1, r["length"])).model, r["length"])
        for who, one in r["found"].items():
            if not one["seconds"]:
                lines.append(f"| {r['model']} | {who} | none fits | | | | |")
                continue
            rate = Spread.of([one["rows"] * r["length"] / s for s in one["seconds"]])
            mfu = rate.median * flops / peak().flops_per_second
            share = rate.median * flops / Spread.of(r["product"]).median
            cells = f"{one['rows']} | {rate.text('.0f')} | {mfu:.1%} | {share:.1%} | {one['bytes'] / 1e9:.0f} GB"
            lines.append(f"| {r['model']} | {who} | {cells} |")
    return "\n".join(lines)


def compiled(models: list[str], target: str, length: int, given: Sequence[str]) -> str:
    """A row for each step, compiled for a device that is not there."""
    from launch.planning.hardware import parse_target
    from launch.planning.local_shapes import shapes_of
    from launch.planning.xla_compile import disable_devices, target_devices
    from trainer.mesh import make_mesh

    disable_devices()
    lines = ["| model | target | kernels in the program | memory |", "|---|---|---|---:|"]
    for model in models:
        config = composed(overrides(model, 1, length, ["mesh.data=1", *given]))
        shapes = shapes_of(config, make_mesh(config.mesh, target_devices(parse_target(target))), None)
        program = shapes.core.train_step.lower(*shapes.arguments).compile()
        names = Counter(re.findall(r'custom_call_target="([^"]+)"', program.as_text()))
        memory = program.memory_analysis()
        size = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        said = ", ".join(f"{count} {name}" for name, count in names.items()) or "none"
        lines.append(f"| {model} | {target} | {said} | {size / 1e9:.0f} GB |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", default="", help="a target, such as h100x1: no GPU is needed")
    parser.add_argument("--results", default="benchmarks/results")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    models = options.models.split(",")
    if options.compile:
        print(compiled(models, options.compile, options.length, options.overrides))
        return
    import jax

    if jax.default_backend() != "gpu":
        sys.exit("no GPU here; --compile h100x1 compiles for one that is not there")
    results = [measured(model, options.length, options.rounds, options.overrides) for model in models]
    found = {"machine": turns.machine() | {"device": jax.devices()[0].device_kind}, "results": results}
    path = turns.keep(options.results, "gpu", json.loads(json.dumps(found)))
    print(f"\n{turns.in_words(found['machine'])}; {found['machine']['device']}\n\n{table(results)}\n\n{path}")


if __name__ == "__main__":
    main()
