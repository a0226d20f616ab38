"""Config of sweeps: search space, search method, objective metric and pruning."""

import enum
from dataclasses import dataclass, field


class Method(enum.Enum):
    auto = "auto"  # grid if every key has a list of values, otherwise tpe
    grid = "grid"  # every combination, in order
    random = "random"  # independent draws
    tpe = "tpe"  # Tree-structured Parzen Estimator after initial random trials (Bergstra et al. 2011)


class Mode(enum.Enum):
    min = "min"  # lower is better
    max = "max"  # higher is better


class Pruning(enum.Enum):
    none = "none"  # run every trial to completion
    median = "median"  # stop a trial that is worse at a step than the median of the others
    hyperband = "hyperband"  # successive halving at several budgets (Li et al. 2018)


@dataclass
class SweepSearchConfig:
    """Hyperparameter search over the keys with several values."""

    # search space by key, in command-line syntax: 2,4,8 or 1e-4..1e-2 or log:1e-4..1e-2
    parameters: dict[str, str] = field(default_factory=dict)
    method: Method = Method.auto  # search method
    # total number of trials, including those of earlier starts; null: all points of a grid, otherwise 20
    trials: int | None = field(default=None, metadata={"min": 1})
    max_concurrent_trials: int = field(default=1, metadata={"min": 1})  # maximum trials running at once
    seed: int = 0  # seed of the search; every trial trains with the seed of the run
    # metric from metrics.jsonl to optimize: its last value; for train/... the mean over the last 2 % of a run
    metric: str = "eval/loss"
    mode: Mode = Mode.min  # direction of the optimization
    pruning: Pruning = Pruning.none  # early stopping of trials
    # optimizer steps before a trial can be pruned
    warmup_steps: int = field(default=0, metadata={"min": 0})
    # GPUs of this machine per trial, with launcher=local; 0: every trial sees all of them
    gpus_per_trial: int = field(default=0, metadata={"min": 0})
    retry_failed: bool = False  # repeat failed trials

    def validate(self) -> None:
        """Raises: ValueError naming key, value, reason and fix."""
        if not self.parameters:
            raise ValueError(
                "sweep: no key varies; give one a list of values or a range: model.num_layers=2,4 "
                "optimizer.learning_rate=log:1e-4..1e-2"
            )
