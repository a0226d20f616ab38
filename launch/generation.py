"""Text generation, shared by training samples and the `generate` task."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import RunConfig
from data.tokenizers.kinds import StreamDecoder
from data.tokenizers.tokenizer import Tokenizer
from data.transforms import Diffusion
from models.config import ModelConfig
from models.decode.diffusion import generate_masked
from models.decode.engine import Completion, generate
from models.decode.sampling import SamplingConfig
from models.logical_axes import ShardingConstraint
from trainer.objective import Params


class Unmasking(NamedTuple):
    """Decoding parameters of a masked diffusion model."""

    mask_id: int
    steps: int  # denoising steps; 0: one per token


class StopText:
    """Streams the text of one row and detects stop strings, including those that span tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], show: Callable[[str], None]):
        self.decoder, self.stop, self.show = StreamDecoder(tokenizer), [s for s in stop if s], show
        self.text = ""  # the text so far, cut at a stop string
        self.shown = 0

    def push(self, token: int) -> bool:
        """Adds a token; returns True if a stop string is complete."""
        self.text += self.decoder.push(token)
        found = [at for s in self.stop if (at := self.text.find(s, max(0, self.shown - len(s)))) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self._show(len(self.text))
            return True
        # The text may end with a prefix of a stop string: hold it back.
        held = max((n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        self._show(len(self.text) - held)
        return False

    def finish(self) -> str:
        """Returns the complete text, including the part held back."""
        if self.decoder.done < len(self.decoder.ids):  # an incomplete character at the end
            self.text += self.decoder.flush()
        self._show(len(self.text))
        return self.text

    def _show(self, upto: int) -> None:
        if upto > self.shown:
            self.show(self.text[self.shown : upto])
            self.shown = upto


def generate_batches(
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    sampling: SamplingConfig,
    *,
    stop: Sequence[str] = (),
    constrain: ShardingConstraint,
    show: Callable[[str], None] = lambda text: None,
    unmasking: Unmasking | None = None,
) -> list[tuple[str, Completion]]:
    """Returns (text, completion) per prompt; `show` receives the text of the first one as it is generated.

    A prompt is a string, or the token ids of a chat. `unmasking`: parameters of a diffusion model, whose text is not
    streamed.
    """
    encoded = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    rows = [StopText(tokenizer, stop, show if i == 0 else lambda text: None) for i in range(len(prompts))]
    if unmasking is not None:
        given = {"stop_ids": tokenizer.stop_ids, "vocab_size": tokenizer.vocab_size, "constrain": constrain}
        found = generate_masked(params, model, encoded, sampling, **unmasking._asdict(), **given)
        cut = [_until(row, completion) for row, completion in zip(rows, found, strict=True)]
        return [(row.finish(), completion) for row, completion in zip(rows, cut, strict=True)]
    completions = generate(
        params,
        model,
        encoded,
        sampling,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
        constrain=constrain,
        on_token=lambda row, token: rows[row].push(token),
    )
    return [(row.finish(), completion) for row, completion in zip(rows, completions, strict=True)]


def _until(row: StopText, completion: Completion) -> Completion:
    """Cuts a completion at the first stop string; `row` receives the text."""
    for count, token in enumerate(completion.tokens, 1):
        if row.push(token):
            return Completion(completion.tokens[:count], completion.logprobs[:count], "stop")
    return completion


def unmasking_of(config: RunConfig, tokenizer: Tokenizer, steps: int = 0) -> Unmasking | None:
    """Returns the decoding parameters of a masked diffusion run; None for autoregressive models."""
    if config.objective.data_needs.transform != "diffusion":
        return None
    transform = config.data.transform.build(tokenizer, config.data.seq_len)
    assert isinstance(transform, Diffusion), "the config was checked"
    return Unmasking(transform.mask, steps)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encodes a prompt, with BOS if the tokenizer adds it. An empty prompt becomes BOS, or else EOS.

    Raises: ValueError for an empty prompt if the tokenizer has neither BOS nor EOS.
    """
    ids = tokenizer.add_bos_token(tokenizer.encode(prompt))
    if ids:
        return ids
    first = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    if first is None:
        raise ValueError(
            "prompt='': this tokenizer has no BOS or EOS token to start a document; give at least one character"
        )
    return [first]


def append_samples(path: Path, step: int, prompts: Sequence[str], texts: Sequence[str], **more: Any) -> None:
    """Appends one JSON object per line: step, time, prompt, text."""
    with path.open("a") as file:
        for prompt, text in zip(prompts, texts, strict=True):
            row = {"step": step, "time": time.time(), "prompt": prompt, "text": text, **more}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
