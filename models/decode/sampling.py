"""Sampling of the next token, with separate settings and random streams for each row of a batch.

Shape letters: B rows, V vocab.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class SamplingConfig:
    """Sampling parameters. Filters apply in this order: penalties, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 256  # Maximum number of generated tokens
    temperature: float = 1.0  # Sampling temperature; 0: greedy
    top_k: int = 0  # Sample from the k most likely tokens; 0: all
    top_p: float = 1.0  # Nucleus sampling, smallest set with probability p: Holtzman et al. 2020; 1: all
    min_p: float = 0.0  # Minimum probability relative to the most likely token
    repetition_penalty: float = 1.0  # Above 1: penalize tokens of prompt and completion (Keskar et al. 2019)
    presence_penalty: float = 0.0  # Subtracted from the logit of tokens already generated
    frequency_penalty: float = 0.0  # Subtracted from the logit for each earlier occurrence in the completion
    seed: int = 0  # Random seed

    def validate(self, key: str = "task.") -> None:
        """Checks the parameters. Raises: ValueError naming key, value and valid values."""
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < np.inf, "at least 0 (0: greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0: off)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
            "repetition_penalty": (0 < self.repetition_penalty < np.inf, "above 0 (1: off)"),
            "presence_penalty": (abs(self.presence_penalty) <= 2, "from -2 to 2"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 2, "from -2 to 2"),
        }
        for name, (ok, valid) in checks.items():
            if not ok:
                raise ValueError(f"{key}{name}={getattr(self, name)}: must be {valid}")

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class Settings(NamedTuple):
    """Sampling parameters of all rows: [B] arrays."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    seed: np.ndarray  # u32
    stream: np.ndarray  # u32: separates the random streams of rows with equal seeds

    @classmethod
    def of(cls, rows: int) -> "Settings":
        """Returns greedy settings without penalties for `rows` rows."""
        number = lambda value: np.full(rows, value, np.float32)
        zeros = lambda dtype: np.zeros(rows, dtype)
        return cls(
            number(0), zeros(np.int32), number(1), number(0), number(1), number(0), number(0),
            zeros(np.uint32), zeros(np.uint32),
        )  # fmt: skip

    def put(self, row: int, config: SamplingConfig, stream: int) -> None:
        """Sets the parameters of one row, in place."""
        self.temperature[row], self.top_k[row], self.top_p[row] = config.temperature, config.top_k, config.top_p
        self.min_p[row], self.repetition[row] = config.min_p, config.repetition_penalty
        self.presence[row], self.frequency[row] = config.presence_penalty, config.frequency_penalty
        self.seed[row], self.stream[row] = config.seed % 2**32, stream % 2**32


class History(NamedTuple):
    """Token occurrences used by penalties."""

    prompt_BV: jax.Array  # bool: token occurs in the prompt
    counts_BV: jax.Array  # i32: occurrences in the completion


def _penalised(x_BV: jax.Array, history: History, settings: Settings) -> jax.Array:
    repetition_B1 = settings.repetition[:, None]
    seen_BV = history.prompt_BV | (history.counts_BV > 0)
    x_BV = jnp.where(seen_BV, jnp.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1), x_BV)
    x_BV = x_BV - settings.presence[:, None] * (history.counts_BV > 0)
    return x_BV - settings.frequency[:, None] * history.counts_BV


def _largest_where(holds, x_BV: jax.Array) -> jax.Array:
    """Returns x >= t, [B, V] bool, for the largest t per row with `holds(x >= t)` [B], which must be monotonic in t.

    Finds the bits of t by bisection: 32 passes instead of a sort.
    """
    bits = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    order_BV = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # same order as the floats

    def body(i, t_B):
        candidate_B = t_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(order_BV >= candidate_B[:, None]), candidate_B, t_B)

    t_B = jax.lax.fori_loop(0, 32, body, jnp.zeros(x_BV.shape[0], jnp.uint32))
    return order_BV >= t_B[:, None]


def _cut(x_BV: jax.Array, settings: Settings) -> jax.Array:
    """Applies top-k, then top-p to the remaining tokens."""
    k_B = jnp.where(settings.top_k > 0, settings.top_k, x_BV.shape[1])
    x_BV = jnp.where(_largest_where(lambda top_BV: top_BV.sum(-1) >= k_B, x_BV), x_BV, -jnp.inf)
    p_BV = jax.nn.softmax(x_BV, axis=-1)
    mass = lambda top_BV: jnp.where(top_BV, p_BV, 0).sum(-1)
    top_BV = _largest_where(lambda top_BV: mass(top_BV) >= settings.top_p, x_BV)  # includes the token that crosses p
    return jnp.where(top_BV | (jnp.asarray(settings.top_p)[:, None] >= 1), x_BV, -jnp.inf)


def _penalising(settings: Settings) -> jax.Array:
    return (settings.repetition != 1) | (settings.presence != 0) | (settings.frequency != 0)


def temperature_scaled(x_BV: jax.Array, settings: Settings) -> jax.Array:
    return x_BV / jnp.where(settings.temperature > 0, settings.temperature, 1)[:, None]


def _cutting(settings: Settings) -> jax.Array:
    return (settings.top_k > 0) | (settings.top_p < 1)


def filter_logits(logits_BV: jax.Array, history: History, settings: Settings) -> jax.Array:
    """Returns the logits [B, V] of the sampling distribution; excluded tokens are -inf.

    Filters run only if a row of the batch uses them.
    """
    s = Settings(*map(jnp.asarray, settings))
    x_BV = jax.lax.cond(jnp.any(_penalising(s)), lambda x: _penalised(x, history, s), lambda x: x, logits_BV)
    x_BV = temperature_scaled(x_BV, s)
    x_BV = jax.lax.cond(jnp.any(_cutting(s)), lambda x: _cut(x, s), lambda x: x, x_BV)
    least_B1 = x_BV.max(-1, keepdims=True) + jnp.log(s.min_p)[:, None]  # -inf for 0
    return jnp.where(x_BV < least_B1, -jnp.inf, x_BV)


def sample(logits_BV: jax.Array, history: History, settings: Settings, index_B: jax.Array) -> jax.Array:
    """Samples tokens [B] i32. `index_B`: number of tokens generated by each row, its index in the random stream.

    The branch for all rows is that of the most demanding row, and does not change the tokens of the others. Branches
    return tokens only: XLA copies logits that a branch returns unchanged.
    """
    s = Settings(*map(jnp.asarray, settings))
    hot_B = s.temperature > 0

    def key(seed, stream, index):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index)

    def greedy(x_BV):
        return jnp.argmax(x_BV, axis=-1)

    def drawn(x_BV):
        keys_B = jax.vmap(key)(s.seed, s.stream, index_B)
        return jnp.where(hot_B, jax.vmap(jax.random.categorical)(keys_B, x_BV), greedy(x_BV))

    branches = [
        greedy,
        lambda x_BV: drawn(temperature_scaled(x_BV, s)),
        lambda x_BV: drawn(filter_logits(x_BV, history, s)),
    ]
    filtering = jnp.any(_penalising(s)) | jnp.any(hot_B & (_cutting(s) | (s.min_p > 0)))
    branch = jnp.where(filtering, 2, jnp.any(hot_B))
    return jax.lax.switch(branch, branches, logits_BV).astype(jnp.int32)
