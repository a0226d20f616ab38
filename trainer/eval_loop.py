"""Evaluation loop: exact f64 sums over batches, without stalling the device."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from trainer.metrics import bits_per_byte, perplexity
from trainer.objective import Batch, Mean, Objective, Params
from trainer.step import EvalStep

Sums = dict[str, tuple[float, float]]  # metric -> (total, weight), f64 on the host
_IN_FLIGHT = 2  # batches queued on the device: enough to keep it busy with little memory


def sum_batches(eval_step: EvalStep, params: Params, frozen: Mapping[str, Any], batches: Iterable[Batch]) -> Sums:
    """Sums the metrics of all batches in f64."""
    sums: Sums = {}
    pending: deque[dict[str, Mean]] = deque()

    def add_oldest() -> None:
        for name, (total, weight) in jax.device_get(pending.popleft()).items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(total), before[1] + float(weight))

    for batch in batches:
        pending.append(eval_step(params, frozen, batch))
        if len(pending) > _IN_FLIGHT:
            add_oldest()
    while pending:
        add_oldest()
    return sums


def summarize(sums: Sums) -> dict[str, float]:
    """Returns means by name. `loss` is the plain cross entropy in nats per token if the objective reports `nll`."""
    means = {name: total / weight if weight > 0 else math.nan for name, (total, weight) in sums.items()}
    result = {name: value for name, value in means.items() if name not in ("nll", "bytes")}
    if "nll" in means:
        result["loss"] = means["nll"]
        result["perplexity"] = perplexity(means["nll"])
        if "bytes" in sums:
            result["bits_per_byte"] = bits_per_byte(sums["nll"][0], sums["bytes"][0])
    if (name := "nll" if "nll" in sums else "loss") in sums:
        result["tokens"] = sums[name][1]
    return result


def evaluate(
    eval_step: EvalStep, params: Params, frozen: Mapping[str, Any], batches: Iterable[Batch]
) -> dict[str, float]:
    """Returns `loss`, `perplexity`, `bits_per_byte` (if bytes are counted), `accuracy` and `tokens`.

    Raises: ValueError if there is no batch.
    """
    sums = sum_batches(eval_step, params, frozen, batches)
    if not sums:
        raise ValueError("evaluation: the validation split has no batch; use data with more documents")
    return summarize(sums)


def collect_outputs(
    eval_outputs: Callable[..., Any], params: Params, frozen: Mapping[str, Any], batches: Iterable[Batch]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns predictions [N, ...] and labels [N] of all labeled texts in all batches (`Objective.eval_outputs`)."""
    found = [jax.device_get(eval_outputs(params, frozen, batch)) for batch in batches]
    return tuple(np.concatenate(each) for each in zip(*((p[c >= 0], c[c >= 0]) for p, c in found), strict=True))


def report_outputs(objective: Objective, outputs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Returns `eval/NAME/precision` etc. per source, and `eval/precision` etc. over the outputs of all sources."""
    together = tuple(np.concatenate(each) for each in zip(*outputs.values(), strict=True))
    named = {f"eval/{name}": of_source for name, of_source in outputs.items()} | {"eval": together}
    report = objective.eval_report
    return {f"{name}/{key}": value for name, found in named.items() for key, value in report(*found).items()}


def evaluate_sources(
    eval_step: EvalStep,
    params: Params,
    frozen: Mapping[str, Any],
    sources: Mapping[str, Iterable[Batch]],
) -> dict[str, float]:
    """Returns `eval/NAME/loss` etc. per source, and `eval/loss` etc. over the tokens of all sources.

    Raises: ValueError naming a source without a batch.
    """
    result: dict[str, float] = {}
    together: Sums = {}
    for name, batches in sources.items():
        sums = sum_batches(eval_step, params, frozen, batches)
        if not sums:
            raise ValueError(
                f"evaluation: the validation split of source {name!r} has no batch; use a source with more documents"
            )
        result |= {f"eval/{name}/{metric}": value for metric, value in summarize(sums).items()}
        for metric, (total, weight) in sums.items():
            before = together.get(metric, (0.0, 0.0))
            together[metric] = (before[0] + total, before[1] + weight)
    return result | {f"eval/{metric}": value for metric, value in summarize(together).items()}
