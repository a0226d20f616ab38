"""Writing with a model: prefill, one token at a time from a cache, sampling, stopping.

Rows of a batch are independent: what one row writes depends on its prompt, its seed and the weights, never on which
other rows are there.

Shape letters: B batch, L length, S slots, V vocab.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.cache import KVCache, init_cache
from models.config import ModelConfig, Position
from models.partition import Constrain, no_constraint
from models.transformer import Params, forward, logits


@dataclass
class SamplingConfig:
    """How the next token is drawn. Filters apply in this order: penalty, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the fewest whose probabilities reach p: Holtzman et al. 2020
    min_p: float = 0.0  # keep those of at least this share of the likeliest's probability
    repetition_penalty: float = 1.0  # above 1: what has occurred becomes less likely (Keskar et al. 2019)
    seed: int = 0

    def validate(self) -> None:
        """Raises: ValueError naming key, value and what would be valid."""
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0 (0: greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0: off)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1: off)"),
        }
        for key, (ok, valid) in checks.items():
            if not ok:
                raise ValueError(f"task.{key}={getattr(self, key)}: must be {valid}")


@dataclass
class Completion:
    tokens: list[int] = field(default_factory=list)  # written ones, without the prompt
    logprobs: list[float] = field(default_factory=list)  # of each, under the model itself: temperature 1, no filter
    finish_reason: str = "length"  # length, eos or stop


def filter_logits(logits_BV: jax.Array, seen_BV: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits [B, V] of the distribution to draw from; tokens that may not be drawn are -inf."""
    x = logits_BV
    if config.repetition_penalty != 1:
        penalised = jnp.where(x > 0, x / config.repetition_penalty, x * config.repetition_penalty)
        x = jnp.where(seen_BV, penalised, x)
    if config.temperature == 0:
        return x
    x = x / config.temperature
    if 0 < config.top_k < x.shape[-1]:
        x = jnp.where(x < jax.lax.top_k(x, config.top_k)[0][:, -1:], -jnp.inf, x)
    if config.top_p < 1:
        ordered = jnp.sort(x, axis=-1)[:, ::-1]
        p = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(p, axis=-1) - p < config.top_p  # the one that crosses p is kept
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        x = jnp.where(x < least, -jnp.inf, x)
    if config.min_p > 0:
        p = jax.nn.softmax(x, axis=-1)
        x = jnp.where(p < config.min_p * p.max(-1, keepdims=True), -jnp.inf, x)
    return x


def sample(logits_BV: jax.Array, keys_B: jax.Array, seen_BV: jax.Array, config: SamplingConfig):
    """Tokens [B] and their log-probabilities [B] under the unfiltered model."""
    filtered = filter_logits(logits_BV, seen_BV, config)
    if config.temperature == 0:
        tokens_B = jnp.argmax(filtered, axis=-1)
    else:
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, filtered)
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return tokens_B.astype(jnp.int32), jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]


def prefill(params: Params, tokens_BL, lengths_B, cache: KVCache, *, config: ModelConfig, constrain: Constrain):
    """Reads right-padded prompts. Returns the logits [B, V] after the last token of each, and the cache.

    What padding leaves in the cache is overwritten before any query can see it.
    """
    B, L = tokens_BL.shape
    positions_BL = jnp.broadcast_to(jnp.arange(L)[None], (B, L))
    output, filled = forward(
        params,
        tokens_BL,
        positions_BL,
        jnp.ones((B, L), jnp.int32),
        config=config,
        constrain=constrain,
        cache=cache,
    )
    assert filled is not None
    last_B1D = jnp.take_along_axis(output.hidden_BLD, (lengths_B - 1)[:, None, None], axis=1)
    return logits(output._replace(hidden_BLD=last_B1D))[:, 0], filled


def decode_step(params: Params, tokens_B, positions_B, cache: KVCache, *, config: ModelConfig, constrain: Constrain):
    """Reads one token of each row at its position. Returns the logits [B, V] after it, and the cache."""
    ones = jnp.ones((tokens_B.shape[0], 1), jnp.int32)
    output, filled = forward(
        params, tokens_B[:, None], positions_B[:, None], ones, config=config, constrain=constrain, cache=cache
    )
    return logits(output)[:, 0], filled


class _Rows(NamedTuple):
    """What the decode loop carries on the device."""

    logits_BV: jax.Array
    lengths_B: jax.Array  # tokens of each row so far: the position of the next
    seen_BV: jax.Array
    cache: KVCache


@lru_cache(maxsize=32)
def _programs(program: "_Program"):
    """Jitted prefill and one-token turn for a model and its sampling; their shapes are bucketed by the caller."""
    config, sampling, constrain, vocab_size, num_slots = program

    @jax.jit
    def start(params, tokens_BL, lengths_B) -> _Rows:
        B, L = tokens_BL.shape
        cache = init_cache(config, B, num_slots)
        logits_BV, cache = prefill(params, tokens_BL, lengths_B, cache, config=config, constrain=constrain)
        real = jnp.arange(L)[None] < lengths_B[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(B)[:, None], tokens_BL].max(real)
        return _Rows(logits_BV, lengths_B, seen_BV, cache)

    @partial(jax.jit, donate_argnums=1)
    def turn(params, rows: _Rows, seed: jax.Array) -> tuple[_Rows, jax.Array, jax.Array]:
        # A row's stream of random numbers is its own: of its place and of how many tokens it has.
        B = rows.lengths_B.shape[0]
        key = lambda row, length: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), length)
        keys_B = jax.vmap(key)(jnp.arange(B), rows.lengths_B)
        logits_BV = jnp.where(jnp.arange(config.vocab_size)[None] < vocab_size, rows.logits_BV, -jnp.inf)
        tokens_B, logprobs_B = sample(logits_BV, keys_B, rows.seen_BV, sampling)
        seen_BV = rows.seen_BV.at[jnp.arange(B), tokens_B].set(True)
        logits_BV, cache = decode_step(params, tokens_B, rows.lengths_B, rows.cache, config=config, constrain=constrain)
        # Every process reads the tokens, so they lie on all devices.
        tokens_B, logprobs_B = constrain(tokens_B, (None,)), constrain(logprobs_B, (None,))
        return _Rows(logits_BV, rows.lengths_B + 1, seen_BV, cache), tokens_B, logprobs_B

    return start, turn


class _Program(NamedTuple):
    """What a compiled program depends on. Configs are not hashable, so their text stands for them."""

    config: ModelConfig
    sampling: SamplingConfig
    constrain: Constrain
    vocab_size: int
    num_slots: int

    def __hash__(self) -> int:
        return hash((repr(self.config), repr(self.sampling), self.constrain, self.vocab_size, self.num_slots))


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    eos_id: int | None,
    vocab_size: int | None = None,
    constrain: Constrain = no_constraint,
    on_token: Callable[[int, int], bool] | None = None,
) -> list[Completion]:
    """Completions of prompts of any lengths, all at once.

    `vocab_size`: tokens that there are, where the model's rows are padded beyond them. `on_token(row, token)` sees
    every token as it comes (not EOS) and may return True to stop that row: for stop texts and for streaming. Prompt
    and completion must fit into learned positions.
    Raises: ValueError for an empty prompt, or one that leaves no room.
    """
    sampling.validate()
    longest = max(len(p) for p in prompts)
    if min(len(p) for p in prompts) == 0:
        raise ValueError("prompt='': has no tokens; give at least one character")
    limit = config.max_seq_len if config.position is Position.learned else longest + sampling.max_new_tokens
    room = limit - longest
    if room < 1:
        raise ValueError(f"prompt: {longest} tokens leave no room in model.max_seq_len={config.max_seq_len}")
    num_new = min(sampling.max_new_tokens, room)
    B, L = len(prompts), min(_bucket(longest), limit)
    # NumPy arrays: the same on every process, wherever the parameters lie.
    tokens_BL = np.zeros((B, L), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, : len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    num_slots = max(_bucket(longest + num_new), L)
    kept = replace(sampling, seed=0, max_new_tokens=1)  # neither changes the program
    start, turn = _programs(_Program(config, kept, constrain, vocab_size or config.vocab_size, num_slots))
    rows, seed = start(params, tokens_BL, lengths_B), np.uint32(sampling.seed)
    done = [Completion() for _ in prompts]
    active = [True] * B
    for _ in range(num_new):
        rows, tokens_B, logprobs_B = turn(params, rows, seed)
        tokens, logprobs = np.asarray(tokens_B), np.asarray(logprobs_B)
        for row in range(B):
            if not active[row]:
                continue
            if tokens[row] == eos_id:
                active[row], done[row].finish_reason = False, "eos"
                continue
            done[row].tokens.append(int(tokens[row]))
            done[row].logprobs.append(float(logprobs[row]))
            if on_token is not None and on_token(row, int(tokens[row])):
                active[row], done[row].finish_reason = False, "stop"
        if not any(active):
            break
    return done


def _bucket(length: int) -> int:
    """The next power of two, at least 16: few shapes, few compilations."""
    return max(16, 1 << (length - 1).bit_length())
