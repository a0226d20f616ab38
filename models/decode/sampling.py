"""Drawing the next token: every row of a batch has settings and a stream of random numbers of its own.

Shape letters: B rows, V vocab.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class SamplingConfig:
    """How the next token is drawn. Filters apply in this order: penalties, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the fewest whose probabilities reach p: Holtzman et al. 2020
    min_p: float = 0.0  # keep those of at least this share of the likeliest's probability
    repetition_penalty: float = 1.0  # above 1: what has occurred becomes less likely (Keskar et al. 2019)
    presence_penalty: float = 0.0  # taken off the logit of what was written already
    frequency_penalty: float = 0.0  # taken off once for each time that it was written
    seed: int = 0

    def validate(self, key: str = "task.") -> None:
        """Raises: ValueError naming key, value and what would be valid."""
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
    """Those of each row: [B] arrays."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    seed: np.ndarray  # u32
    stream: np.ndarray  # u32: rows of one seed are drawn apart by it

    @classmethod
    def of(cls, rows: int) -> "Settings":
        """Greedy and without penalties, to be filled in."""
        number = lambda value: np.full(rows, value, np.float32)
        whole = lambda dtype: np.zeros(rows, dtype)
        return cls(
            number(0), whole(np.int32), number(1), number(0), number(1), number(0), number(0),
            whole(np.uint32), whole(np.uint32),
        )  # fmt: skip

    def put(self, row: int, config: SamplingConfig, stream: int) -> None:
        self.temperature[row], self.top_k[row], self.top_p[row] = config.temperature, config.top_k, config.top_p
        self.min_p[row], self.repetition[row] = config.min_p, config.repetition_penalty
        self.presence[row], self.frequency[row] = config.presence_penalty, config.frequency_penalty
        self.seed[row], self.stream[row] = config.seed % 2**32, stream % 2**32


class History(NamedTuple):
    """What penalties count."""

    prompt_BV: jax.Array  # bool: occurs in the prompt
    counts_BV: jax.Array  # i32: times it was written


def _penalised(x_BV: jax.Array, history: History, settings: Settings) -> jax.Array:
    repetition_B1 = settings.repetition[:, None]
    seen_BV = history.prompt_BV | (history.counts_BV > 0)
    x_BV = jnp.where(seen_BV, jnp.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1), x_BV)
    x_BV = x_BV - settings.presence[:, None] * (history.counts_BV > 0)
    return x_BV - settings.frequency[:, None] * history.counts_BV


def _largest_where(holds, x_BV: jax.Array) -> jax.Array:
    """[B, V] bool: x >= t for the largest t of each row for which `holds(x >= t)` [B], which is true for small t.

    Bits of t are found one by one, which costs 32 passes and no sorting.
    """
    bits = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    order_BV = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))  # as ordered as the floats are

    def body(i, t_B):
        candidate_B = t_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(order_BV >= candidate_B[:, None]), candidate_B, t_B)

    t_B = jax.lax.fori_loop(0, 32, body, jnp.zeros(x_BV.shape[0], jnp.uint32))
    return order_BV >= t_B[:, None]


def _cut(x_BV: jax.Array, settings: Settings) -> jax.Array:
    """Top-k, then top-p of what is left."""
    k_B = jnp.where(settings.top_k > 0, settings.top_k, x_BV.shape[1])
    x_BV = jnp.where(_largest_where(lambda kept_BV: kept_BV.sum(-1) >= k_B, x_BV), x_BV, -jnp.inf)
    p_BV = jax.nn.softmax(x_BV, axis=-1)
    mass = lambda kept_BV: jnp.where(kept_BV, p_BV, 0).sum(-1)
    kept_BV = _largest_where(lambda kept_BV: mass(kept_BV) >= settings.top_p, x_BV)  # what crosses p is kept
    return jnp.where(kept_BV | (jnp.asarray(settings.top_p)[:, None] >= 1), x_BV, -jnp.inf)


def _penalising(settings: Settings) -> jax.Array:
    return (settings.repetition != 1) | (settings.presence != 0) | (settings.frequency != 0)


def temperature_scaled(x_BV: jax.Array, settings: Settings) -> jax.Array:
    return x_BV / jnp.where(settings.temperature > 0, settings.temperature, 1)[:, None]


def _cutting(settings: Settings) -> jax.Array:
    return (settings.top_k > 0) | (settings.top_p < 1)


def filter_logits(logits_BV: jax.Array, history: History, settings: Settings) -> jax.Array:
    """Logits [B, V] of the distribution to draw from; tokens that may not be drawn are -inf.

    Each filter costs only where a row asks for it.
    """
    s = Settings(*map(jnp.asarray, settings))
    x_BV = jax.lax.cond(jnp.any(_penalising(s)), lambda x: _penalised(x, history, s), lambda x: x, logits_BV)
    x_BV = temperature_scaled(x_BV, s)
    x_BV = jax.lax.cond(jnp.any(_cutting(s)), lambda x: _cut(x, s), lambda x: x, x_BV)
    least_B1 = x_BV.max(-1, keepdims=True) + jnp.log(s.min_p)[:, None]  # -inf for 0
    return jnp.where(x_BV < least_B1, -jnp.inf, x_BV)


def sample(logits_BV: jax.Array, history: History, settings: Settings, index_B: jax.Array) -> jax.Array:
    """Tokens [B] i32. `index_B`: how many each row has written, its place in its stream of random numbers.

    Rows cost what the most demanding of them asks for, and get the same. Each branch gives tokens alone: XLA copies
    logits that a branch hands on as they are.
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
