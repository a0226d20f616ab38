"""Generation with a masked diffusion model (Nie et al. 2025, LLaDA, section 2.4 and algorithm 5).

All tokens of the completion start as mask tokens. Each pass predicts all masked tokens, keeps those with the highest
confidence and masks the others again; the number kept per pass is such that none are left after the last pass.

Shape letters: B rows, L length, V vocab.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.decode.engine import Completion
from models.decode.sampling import History, SamplingConfig, Settings, sample
from models.logical_axes import ShardingConstraint, no_constraint
from models.transformer import Params, forward, logits

LENGTHS = 64  # row lengths are multiples of this, to limit the number of compiled shapes


class _Program(NamedTuple):
    """Static arguments of a compiled pass. Configs are not hashable, so their repr is hashed."""

    config: ModelConfig
    constrain: ShardingConstraint
    vocab_size: int
    mask_id: int

    def __hash__(self) -> int:
        return hash((repr(self.config), self.constrain, self.vocab_size, self.mask_id))


@lru_cache(maxsize=8)
def _pass(program: _Program) -> Any:
    return jax.jit(partial(_unmask, program))


def _unmask(program: _Program, params: Params, tokens_BL, segments_BL, left, settings: Settings, step):
    """One pass: returns (tokens, log-probabilities of unmasked tokens). `left` [B]: masks that remain."""
    B, L = tokens_BL.shape
    positions_BL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
    given = {"config": program.config, "constrain": program.constrain}
    x_BLV = logits(forward(params, tokens_BL, positions_BL, segments_BL, **given))
    token_V = jnp.arange(x_BLV.shape[-1])
    allowed_V = (token_V < program.vocab_size) & (token_V != program.mask_id)
    x_BLV = jnp.where(allowed_V[None, None], x_BLV, -jnp.inf)
    flat = x_BLV.reshape(B * L, -1)
    nothing = History(jnp.zeros((1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    index = step * L + jnp.tile(jnp.arange(L), B)  # index in the random stream of the row
    drawn_BL = sample(flat, nothing, settings, index).reshape(B, L)
    logprobs_BL = jnp.take_along_axis(jax.nn.log_softmax(x_BLV), drawn_BL[..., None], axis=-1)[..., 0]
    masked_BL = (tokens_BL == program.mask_id) & (segments_BL > 0)
    confidence_BL = jnp.where(masked_BL, logprobs_BL, -jnp.inf)
    rank_BL = jnp.argsort(jnp.argsort(-confidence_BL, axis=1), axis=1)  # 0: most confident; ties by position
    out_BL = masked_BL & (rank_BL < (masked_BL.sum(1) - left)[:, None])
    replicate = lambda x: program.constrain(x, (None, None))  # every process reads them
    return replicate(jnp.where(out_BL, drawn_BL, tokens_BL)), replicate(jnp.where(out_BL, logprobs_BL, 0.0))


def generate_masked(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    mask_id: int,
    steps: int = 0,
    stop_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    constrain: ShardingConstraint = no_constraint,
) -> list[Completion]:
    """Generates completions of `sampling.max_new_tokens` tokens, truncated at the first stop token.

    Prompts can have different lengths. `steps`: denoising passes; 0: one per token. Log-probabilities are those at the
    time a token was unmasked. The number of positions is fixed at the start, so longer documents are cut off.
    Raises: ValueError for penalties, which need a left-to-right order.
    """
    if sampling.penalises:
        raise ValueError("repetition_penalty: a diffusion model does not generate left to right; remove penalties")
    new = sampling.max_new_tokens
    steps = min(steps, new) if steps > 0 else new
    B, L = len(prompts), -(-(max(map(len, prompts)) + new) // LENGTHS) * LENGTHS
    tokens, segments = np.zeros((B, L), np.int32), np.zeros((B, L), np.int32)
    settings = Settings.of(B * L)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : len(prompt) + new] = mask_id
        segments[row, : len(prompt) + new] = 1
        for place in range(L):
            settings.put(row * L + place, sampling, stream=row)
    run = _pass(_Program(config, constrain, vocab_size or config.vocab_size, mask_id))
    logprobs = np.zeros((B, L))
    for step in range(steps):
        left = np.full(B, new - -(-new * (step + 1) // steps), np.int32)
        out, found = run(params, tokens, segments, left, settings, np.int32(step))
        tokens, logprobs = np.asarray(out), logprobs + np.asarray(found)
    return [_completion(tokens[r], logprobs[r], len(prompt), new, stop_ids) for r, prompt in enumerate(prompts)]


def _completion(tokens: np.ndarray, logprobs: np.ndarray, start: int, size: int, stop_ids: Sequence[int]) -> Completion:
    new_tokens, new_logprobs = tokens[start : start + size].tolist(), logprobs[start : start + size].tolist()
    ends = [at for at, token in enumerate(new_tokens) if token in stop_ids]
    if not ends:
        return Completion(new_tokens, new_logprobs)
    end = ends[0]
    return Completion(new_tokens[:end], new_logprobs[:end], "eos", (new_tokens[end], new_logprobs[end]))
