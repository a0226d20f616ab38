"""Fits scaling laws to finished runs and computes compute-optimal sizes.

    L(N, D) = E + A / N^alpha + B / D^beta        nats per token, for N parameters and D tokens

The fit follows Hoffmann et al. 2022 [2203.15556], section 3.3: it minimizes the sum of Huber losses (delta 1e-3) of
log L by L-BFGS from a grid of starts, of which only the best are optimized. If all runs have the same ratio of tokens
to parameters, N and D cannot be separated, and the law is one of compute, L(C) = E + A / C^alpha.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DELTA = 1e-3
NUM_STARTS, NUM_REFINED = 20, 3  # best grid points that are optimized briefly, and to convergence
LOG_A = LOG_B = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
LOG_E = (-1.0, -0.5, 0.0, 0.5, 1.0)
EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)


class Law(NamedTuple):
    """A law of parameters and tokens, or, without `B`, a law of compute: `A / C^alpha` with C in FLOPs."""

    E: float
    A: float
    alpha: float
    B: float = 0.0
    beta: float = 0.0

    @property
    def is_compute_law(self) -> bool:
        return not self.B

    def loss(self, x: Any, tokens: Any = 1.0) -> Any:
        """Returns the loss for `x` parameters (law of compute: FLOPs) and the number of tokens."""
        return self.E + self.A / x**self.alpha + (self.B / tokens**self.beta if self.B else 0.0)


class Optimum(NamedTuple):
    parameters: float
    tokens: float
    loss: float  # nats per token, on the validation text of the law


# Hoffmann et al. 2022 [2203.15556], section 3.3, in the corrected fit of Besiroglu et al. 2024 [2404.10102], table 1.
CHINCHILLA = Law(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)
CHINCHILLA_SOURCE = "Hoffmann et al. 2022 (2203.15556), approach 3, refitted by Besiroglu et al. 2024 (2404.10102)"


def compute_optimal(flops: float, law: Law = CHINCHILLA) -> Optimum:
    """Returns the parameters and tokens with the lowest loss for a training budget in FLOPs, 6 N D = C."""
    E, A, alpha, B, beta = law
    n = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    d = flops / 6 / n
    return Optimum(n, d, E + A / n**alpha + B / d**beta)


def read_law(path: Path) -> Law:
    """Reads the law from the JSON report of a scaling ladder.

    Raises: ValueError if the file is missing or its law has no compute-optimal size.
    """
    constants = json.loads(path.read_text()).get("law", {}) if path.is_file() else None
    if constants is None:
        raise ValueError(f"task.scaling_law={path}: file not found; create it with meshwright scaling_ladder")
    if set(constants) != set(Law._fields) or min(constants["alpha"], constants["beta"]) <= 0:
        raise ValueError(
            f"task.scaling_law={path}: must contain a law of parameters and tokens with positive exponents; run "
            "meshwright scaling_ladder with several task.widths and task.tokens_per_param"
        )
    return Law(**constants)


class Point(NamedTuple):
    """A finished run."""

    parameters: float
    tokens: float
    flops: float
    loss: float


def fit_law(points: Sequence[Point], near: Law | None = None) -> Law:
    """Fits a law to finished runs. `near`: a law of similar points, used as start instead of the grid.

    Raises: ValueError if there are too few points for the law's constants.
    """
    ratios = [p.tokens / p.parameters for p in points]
    if max(ratios) < 1.1 * min(ratios):
        _check_count(points, 4, "constants E, A and alpha")
        x = np.log([[p.flops] for p in points])
    else:
        _check_count(points, 6, "constants E, A, alpha, B and beta")
        for name in ("parameters", "tokens"):
            if len({round(np.log(getattr(p, name)), 1) for p in points}) < 3:
                raise ValueError(
                    f"a law of parameters and tokens needs at least three different numbers of {name}; add values to "
                    "task.widths and task.tokens_per_param, or use a single task.tokens_per_param for a law of compute"
                )
        x = np.log([[p.parameters, p.tokens] for p in points])
    found = _fit(x, np.log([p.loss for p in points]), near)
    e, a, alpha, *rest = found
    return Law(float(np.exp(e)), float(np.exp(a)), float(alpha), *_b(rest))


def _b(rest: Sequence[float]) -> tuple[float, ...]:
    return (float(np.exp(rest[0])), float(rest[1])) if rest else ()


def _check_count(points: Sequence[Point], least: int, what: str) -> None:
    if len(points) < least:
        raise ValueError(
            f"{len(points)} finished runs: fitting the {what} requires at least {least}; add values to task.widths or "
            "task.tokens_per_param"
        )


def _fit(x: np.ndarray, y: np.ndarray, near: Law | None) -> np.ndarray:
    """Fits (e, a, alpha, [b, beta]) of log L = logsumexp(e, a - alpha log x, ...).

    `x` [points, 1 or 2] and `y` [points] are logarithms.
    """
    from scipy.optimize import minimize

    grid = np.array(list(itertools.product(LOG_E, *[LOG_A, EXPONENTS] * x.shape[1])))
    # Centers x, which decorrelates factors and exponents.
    center = x.mean(0)
    x = x - center
    grid[:, 1::2] -= grid[:, 2::2] * center
    order = np.argsort(_value(grid, x, y)[0], kind="stable")
    starts = list(grid[order[:NUM_STARTS]])
    if near is not None and near.is_compute_law == (x.shape[1] == 1):
        factors, exponents = (near.A, near.B)[: x.shape[1]], (near.alpha, near.beta)
        terms = [v for factor, power in zip(factors, exponents, strict=False) for v in (_log(factor), power)]
        theta = np.array([_log(near.E), *terms])
        theta[1::2] -= theta[2::2] * center
        starts = [theta, starts[0]]
    objective = lambda theta: tuple(part[0] for part in _value(theta[None], x, y))

    def descend(start: np.ndarray, turns: int) -> Any:
        options = {"maxiter": turns, "maxfun": 2 * turns, "ftol": 1e-13, "gtol": 1e-10}
        return minimize(objective, start, jac=True, method="L-BFGS-B", options=options)

    candidates = sorted((descend(start, 50) for start in starts), key=lambda end: end.fun)
    ends = [descend(end.x, 500) for end in candidates[: NUM_REFINED if near is None else 1]]
    best = np.array(min(ends, key=lambda end: end.fun).x)
    best[1::2] += best[2::2] * center
    return best


def _log(value: float) -> float:
    return float(np.log(max(value, 1e-300)))


def _value(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sum of Huber losses divided by DELTA^2, and its gradient, for each row of `theta` [S, 3 or 5]."""
    terms = [np.broadcast_to(theta[:, :1], (len(theta), len(y)))]
    for i in range(x.shape[1]):
        a, exponent = theta[:, 1 + 2 * i, None], theta[:, 2 + 2 * i, None]
        terms.append(a - exponent * x[None, :, i])
    stacked = np.stack(terms)  # [terms, S, points]
    top = stacked.max(0)
    log_sum = top + np.log(np.exp(stacked - top).sum(0))
    off = (log_sum - y[None]) / DELTA
    value = np.where(np.abs(off) <= 1, off**2 / 2, np.abs(off) - 0.5).sum(1)
    pull = np.clip(off, -1, 1) / DELTA * np.exp(stacked - log_sum)  # [terms, S, points]
    columns = [pull[0].sum(1)]
    for i in range(x.shape[1]):
        columns += [pull[1 + i].sum(1), -(pull[1 + i] * x[None, :, i]).sum(1)]
    return value, np.stack(columns, axis=1)


def leave_one_out_fits(points: Sequence[Point], law: Law) -> list[Law]:
    """Returns refits of `law` with each point left out in turn, skipping fits with too few points."""
    found = []
    for i in range(len(points)):
        try:
            found.append(fit_law([*points[:i], *points[i + 1 :]], law))
        except ValueError:
            continue
    return found


def spread(laws: Sequence[Law], of: Callable[[Law], float]) -> tuple[float, float] | None:
    """Returns the minimum and maximum of a number over the laws; None if there are no laws."""
    values = [of(law) for law in laws]
    return (min(values), max(values)) if values else None
