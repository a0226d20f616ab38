"""Memory and time benchmark: losses over a 128k vocabulary, remat policies, long context.

    python benchmarks/memory.py [--rounds 5] [--only loss,remat,context] [--results FOLDER]

loss: 2,048 tokens of width 256 with a vocabulary of 131,072, forward and backward, in chunks of
`objective.loss_chunk_size`, compared with full logits and a naive formula. remat: a step of 8 layers of width 512 with
each policy. context: a step of that model on one row of 1,024 to 4,096 tokens. Memory: buffers of the compiled program
(arguments, results, temporaries). Time: alternating runs.
"""

import argparse
from contextlib import ExitStack

import numpy as np
import turns
from composed import built, one_document
from turns import Contestant, Spread

VOCAB, WIDTH, ROWS, LENGTH = 131072, 256, 2, 1024
MODEL = [
    "model=gpt2", "model.vocab_size=4096", "model.num_layers=8", "model.embed_dim=512",
    "model.mlp.intermediate_dim=2048",
    "model.attention.num_heads=8", "model.attention.num_kv_heads=8", "model.attention.head_dim=64",
    "model.position=rope", "model.dtype=float32", "optimizer=adamw",
]  # fmt: skip
REMAT = ("none", "dots", "qkv", "attention", "full")
CONTEXT = (1024, 2048, 4096)


def held(compiled) -> int:
    """Bytes."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def temporary(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def loss(how: str):
    """Forward and backward; its turn gives (bytes of temporaries, loss)."""
    import jax
    import jax.numpy as jnp
    import optax

    from models.transformer import ModelOutput
    from trainer.objectives.next_token import NextTokenConfig

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (ROWS, LENGTH, WIDTH))
    head = 0.02 * jax.random.normal(keys[1], (WIDTH, VOCAB))
    batch = one_document(np.asarray(jax.random.randint(keys[2], (ROWS, LENGTH + 1), 0, VOCAB)))
    objective = NextTokenConfig(loss_chunk_size=LENGTH if how == "all logits" else 128).build(None)

    def ours(hidden, head):
        return objective.of_output(ModelOutput(hidden, head, None), batch)[0].total

    def plain(hidden, head):
        logits = jnp.einsum("BLD,DV->BLV", hidden, head)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.targets)).sum()

    form = plain if how == "plain formula" else ours
    compiled = jax.jit(jax.value_and_grad(form, argnums=(0, 1))).lower(hidden, head).compile()
    return lambda: (temporary(compiled), float(jax.block_until_ready(compiled(hidden, head))[0]))


def step(overrides: list[str], rows: int, length: int):
    """A training step; its turn gives (bytes, loss)."""
    from trainer.reliability.loss_spikes import NO_LIMITS

    core, batch = built([*MODEL, f"data.seq_len={length}", f"data.batch_size={rows}", *overrides])
    holds = [core.init_state()]
    compiled = core.train_step.lower(holds[0], {}, batch, NO_LIMITS).compile()

    def turn():
        holds[0], metrics = compiled(holds[0], {}, batch, NO_LIMITS)
        return held(compiled), float(metrics["loss"])

    return turn


def parts() -> dict[str, dict[str, Contestant]]:
    return {
        "loss": {how: Contestant(loss, {"how": how}) for how in ("chunks of 128", "all logits", "plain formula")},
        "remat": {
            name: Contestant(step, {"overrides": [f"model.remat={name}"], "rows": 4, "length": 512}) for name in REMAT
        },
        "context": {
            f"{n:,} tokens": Contestant(step, {"overrides": ["model.remat=save_attn_out"], "rows": 1, "length": n})
            for n in CONTEXT
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="loss,remat,context")
    parser.add_argument("--results", default="benchmarks/results")
    options = parser.parse_args()
    found: dict = {"machine": turns.machine(), "parts": {}}
    lines = ["| | | memory | of the last | step time | of the last | loss |", "|---|---|---:|---:|---:|---:|---:|"]
    for part in options.only.split(","):
        with ExitStack() as stack:
            seats = {name: turns.seat(stack, contestant) for name, contestant in parts()[part].items()}
            turns.take_turns(seats, 1)
            seconds, results = turns.take_turns(seats, options.rounds)
        found["parts"][part] = {"seconds": seconds, "results": results}
        last = list(seats)[-1]
        for name in seats:
            size, value = results[name][0]
            of_last = f"{size / results[last][0][0]:.2f} | {Spread.of(seconds[name]).text('.3f')} s"
            ratio = turns.ratios(seconds[name], seconds[last]).text(".2f")
            lines.append(f"| {part} | {name} | {size / 1e6:,.0f} MB | {of_last} | {ratio} | {value:.6g} |")
        path = turns.keep(options.results, "memory", found)  # after each part: the last takes longest
        print(f"\n{turns.in_words(found['machine'])}\n\n" + "\n".join(lines) + f"\n\n{path}", flush=True)


if __name__ == "__main__":
    main()
