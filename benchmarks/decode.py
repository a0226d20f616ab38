"""CPU decoding benchmark: tokens/s compared with `transformers.generate` and, for one request, llama.cpp.

    python benchmarks/decode.py --model gguf:FILE [--dtype float32] [--loads 1,16,64,mixed] [--rounds 5]

All use the same weights (any published model that `meshwright convert` reads) and decode greedily; completions are
compared. Load N: N concurrent prompts of 64 tokens with 64 new tokens each. `mixed`: 48 prompts of 16 to 256 tokens
with 8 to 256 new tokens, both log-uniform, 16 concurrently; transformers batches them in order of arrival with left
padding, and a batch takes as long as its longest completion. Only requested tokens are counted. Prompts differ in each
turn, so that no prefix cache applies.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import turns
from turns import Contestant, Spread

OURS, SLOTS, LENGTH, MIXED = "meshwright", 16, 640, 48
Asked = list[tuple[list[int], int]]  # (prompt, tokens to generate)


def loads(load: str, vocab: int) -> Iterator[Asked]:
    """Yields the requests of each turn, the same for all frameworks."""
    rng = np.random.default_rng(0)
    prompt = lambda n: rng.integers(vocab // 10, vocab, n).tolist()  # the first tokens are special
    between = lambda low, high: int(np.exp(rng.uniform(np.log(low), np.log(high))))
    while True:
        if load == "mixed":
            yield [(prompt(between(16, 256)), between(8, 256)) for _ in range(MIXED)]
        else:
            yield [(prompt(64), 64) for _ in range(int(load))]


def at_once(load: str) -> int:
    return SLOTS if load == "mixed" else int(load)


def written_models(reference: str, dtype: str, folder: str) -> dict[str, str]:
    """The model as a folder and as a file."""
    from launch.cli import run

    places = {"hf": f"{folder}/hf", "gguf": f"{folder}/model.gguf"}
    steps = [[f"from={reference}", "to=model", f"model.dtype={dtype}"], *(["from=model", f"to={kind}:{path}",
             f"task.dtype={dtype}"] for kind, path in places.items())]  # fmt: skip
    for step in steps:
        with contextlib.redirect_stdout(io.StringIO()):
            status = run(["convert", *step, f"output_dir={folder}/runs"])
        if status:
            raise SystemExit(status)
    return places


def engine(path: str, dtype: str, load: str):
    """Its turn gives (tokens that were asked for, completions)."""
    from dataclasses import replace

    from models.config import Dtype
    from models.decode.engine import Engine, EngineConfig, Request
    from models.decode.sampling import SamplingConfig
    from models.formats.huggingface.checkpoint_files import Folder, load_params
    from models.formats.huggingface.families import family_of
    from models.transformer import abstract_params

    folder = Folder(Path(path))
    config = replace(family_of(folder.config).read(folder.config), dtype=Dtype[dtype])
    settings = EngineConfig(slots=at_once(load), length=LENGTH, chunks_per_step=at_once(load))  # as `generate`
    engine = Engine(load_params(folder, config, abstract_params(config)), config, settings)
    feed = loads(load, config.vocab_size)

    def turn():
        asked = next(feed)
        numbers = [engine.submit(Request(p, SamplingConfig(max_new_tokens=n, temperature=0.0))) for p, n in asked]
        written = {number: [] for number in numbers}
        while engine.busy:
            for event in engine.step():
                written[event.request].append(event.token)
        return sum(n for _, n in asked), [written[n] for n in numbers]

    return turn


def transformers(path: str, dtype: str, load: str):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None  # as many tokens as were asked for
    feed, size = loads(load, model.config.vocab_size), at_once(load)

    def turn():
        asked, written = next(feed), []
        for at in range(0, len(asked), size):
            batch = asked[at : at + size]
            longest, most = max(len(p) for p, _ in batch), max(n for _, n in batch)
            ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in batch])
            with torch.no_grad():
                out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=most, pad_token_id=0)
            written += [row[longest : longest + n].tolist() for row, (_, n) in zip(out, batch, strict=True)]
        return sum(n for _, n in asked), written

    return turn


def llama_cpp(path: str, vocab: int):
    """One request at a time; its completions are not read as tokens."""
    import os

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, LENGTH, 1
    params.n_gpu_layers, params.cpuparams.n_threads = 0, len(os.sched_getaffinity(0))
    server = xllamacpp.Server(params)
    feed = loads("1", vocab)

    def turn():
        asked = next(feed)
        for prompt, count in asked:
            answer = server.handle_completions({
                "prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False, "ignore_eos": True,
            })  # fmt: skip
            assert answer["usage"]["completion_tokens"] == count, answer
        return sum(n for _, n in asked), None

    return turn


def measured(load: str, dtype: str, places: dict[str, str], rounds: int) -> dict:
    from models.formats.huggingface.checkpoint_files import Folder

    common = {"path": places["hf"], "dtype": dtype, "load": load}
    entered = {OURS: Contestant(engine, common), "transformers": Contestant(transformers, common)}
    if load == "1":
        vocab = Folder(Path(places["hf"])).config["vocab_size"]
        entered["llama.cpp"] = Contestant(llama_cpp, {"path": places["gguf"], "vocab": vocab})
    huge_pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as `meshwright` sets it for itself
    with ExitStack() as stack:
        seats = {}
        for name, what in entered.items():
            seats[name] = turns.seat(stack, Contestant(what.make, what.args, huge_pages))
            seats[name].turns(1)  # compiles
        seconds, results = turns.take_turns(seats, rounds)
        held = {name: seat.bytes for name, seat in seats.items()}
    rates = {who: [r[0] / s for r, s in zip(results[who], seconds[who], strict=True)] for who in seats}
    same = [a == b for ours, theirs in zip(results[OURS], results["transformers"], strict=True)
            for a, b in zip(ours[1], theirs[1], strict=True)]  # fmt: skip
    return {"load": load, "dtype": dtype, "rates": rates, "bytes": held, "equal": sum(same), "completions": len(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what `meshwright convert from=` takes")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--loads", default="1,16,64,mixed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", default="benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        places = written_models(options.model, options.dtype, folder)
        results = [measured(load, options.dtype, places, options.rounds) for load in options.loads.split(",")]
    found = {"machine": turns.machine(), "model": options.model, "results": results}
    path = turns.keep(options.results, "decode", found)
    lines = [
        "| load | | tokens/s | meshwright is faster by | memory | completions equal |",
        "|---|---|---:|---:|---:|---:|",
    ]
    groups = {}
    for r in results:
        for who, rates in r["rates"].items():
            faster = "" if who == OURS else turns.ratios(r["rates"][OURS], rates).text(".2f")
            equal = f"{r['equal']} of {r['completions']}" if who == "transformers" else ""
            cells = Spread.of(rates).text(".1f"), faster, f"{r['bytes'][who] / 1e9:.1f} GB", equal
            lines.append(f"| {r['load']} | {who} | {' | '.join(cells)} |")
        groups[f"{r['load']} at once" if r["load"] != "mixed" else "mixed"] = {
            who: Spread.of(rates) for who, rates in r["rates"].items()
        }
    turns.draw_bars(path.with_suffix(".png"), f"Decoding on this CPU, {options.dtype}", groups, "tokens/s")
    print(
        f"\n{turns.in_words(found['machine'])}\n\n"
        + "\n".join(lines)
        + f"\n\n{path} and {path.with_suffix('.png').name}"
    )
    share = statistics.mean(r["equal"] / r["completions"] for r in results)
    if options.dtype == "float32" and share < 0.9:
        raise SystemExit(f"completions are not alike: {share:.0%} are equal")


if __name__ == "__main__":
    main()
