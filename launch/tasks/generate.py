"""`meshwright generate run=NAME prompt='...'`: text from a run, streamed to the terminal."""

import json
import sys
from pathlib import Path

from configs.schema import Format, GenerateConfig, RunConfig
from launch.assemble import is_chief
from launch.saved_run import open_run
from launch.writing import write
from models.sampling import SamplingConfig


def run(config: RunConfig, overrides: list[str]) -> int:
    """Prints prompt and completion of each prompt; `format=json`: one object a line."""
    task = config.task
    assert isinstance(task, GenerateConfig)
    prompts = [prompt for prompt in all_prompts(config, task) for _ in range(task.num_samples)]
    sampling = SamplingConfig(
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        top_k=task.top_k,
        top_p=task.top_p,
        min_p=task.min_p,
        repetition_penalty=task.repetition_penalty,
        seed=config.seed,
    )
    sampling.validate()
    saved = open_run(config, overrides)
    stream = len(prompts) == 1 and config.format is Format.table and is_chief()
    if stream:
        show(prompts[0])
    results = write(
        saved.params(),
        saved.core.model,
        saved.tokenizer,
        prompts,
        sampling,
        stop=task.stop,
        constrain=saved.core.constrain,
        show=show if stream else lambda text: None,
    )
    if not is_chief():
        return 0
    if stream:
        print()
    elif config.format is Format.json:
        for prompt, (text, completion) in zip(prompts, results, strict=True):
            row = {
                "prompt": prompt,
                "text": text,
                "tokens": completion.tokens,
                "logprobs": completion.logprobs,
            }
            print(json.dumps(row | {"finish_reason": completion.finish_reason}, ensure_ascii=False))
    else:
        for number, (prompt, (text, _)) in enumerate(zip(prompts, results, strict=True), 1):
            print(f"--- {number} of {len(prompts)}\n{prompt}{text}")
    return 0


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def all_prompts(config: RunConfig, task: GenerateConfig) -> list[str]:
    """Prompts of the command line and of a file. Raises: ValueError where there is none."""
    prompts = ([config.prompt] if config.prompt is not None else []) + list(task.prompts)
    if task.prompt_file is not None:
        path = Path(task.prompt_file)
        if not path.is_file():
            raise ValueError(f"task.prompt_file={task.prompt_file}: there is no such file")
        prompts += [line for line in path.read_text().splitlines() if line]
    if not prompts:
        raise ValueError("prompt=null: give a text to go on from: prompt='def '")
    if task.num_samples < 1:
        raise ValueError(f"task.num_samples={task.num_samples}: must be at least 1")
    return prompts
