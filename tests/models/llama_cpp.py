"""llama.cpp as a reference, in a separate process, because it aborts the process on unsupported files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import json, sys
import xllamacpp
asked = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = asked["path"]
params.n_ctx = asked["context"]
params.n_parallel = 1
params.n_gpu_layers = 0
params.warmup = False
params.cpuparams.n_threads = 2
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
answers = [server.handle_completions(request) for request in asked["requests"]]
print("ANSWERS" + json.dumps(answers), flush=True)
"""


def spelt(num_tokens: int) -> dict[str, Any]:
    """Returns a tokenizer header with three-digit numbers as tokens, so that all are full characters; 0 is EOS."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [f"{i:03}" for i in range(num_tokens)],
        "tokenizer.ggml.token_type": [3] + [1] * (num_tokens - 1),
        "tokenizer.ggml.merges": ["000 000"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def complete(path: Path, prompts: list[Any], num_tokens: int, *, context: int = 256) -> list[list[dict[str, Any]]]:
    """Greedy completions by llama.cpp of prompts (strings or token ids): pieces with `id` and `logprob`.

    Tokens that form one character come as one piece, with the id and logprob of the last of them.
    """
    common = {"n_predict": num_tokens, "temperature": 0, "logprobs": 1, "n_probs": 1, "cache_prompt": False}
    requests = [{"prompt": prompt, **common} for prompt in prompts]
    asked = json.dumps({"path": str(path), "context": context, "requests": requests})
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=asked, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, f"llama.cpp ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-2500:]}"
    answers = json.loads(lines[0].removeprefix("ANSWERS"))
    return [answer["choices"][0]["logprobs"]["content"] for answer in answers]
