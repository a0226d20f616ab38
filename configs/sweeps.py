"""What a sweep varies, how it chooses, what is better, and which trials end early."""

import enum
from dataclasses import dataclass, field


class Method(enum.Enum):
    auto = "auto"  # grid where every key has a list of values, otherwise bayes
    grid = "grid"  # every combination, in order
    random = "random"  # independent draws
    tpe = "tpe"  # random draws first, then the Tree-structured Parzen Estimator (Bergstra et al. 2011)


class Mode(enum.Enum):
    min = "min"  # lower is better
    max = "max"  # higher is better


class Pruning(enum.Enum):
    none = "none"  # every trial trains to its end
    median = "median"  # stop a trial that is worse at a step than the median of the others
    hyperband = "hyperband"  # successive halving at several budgets (Li et al. 2018)


@dataclass
class SweepSearchConfig:
    """The search over the keys that vary."""

    # Values of each key that varies, as the command line has them: 2,4,8 or 1e-4..1e-2 or log:1e-4..1e-2
    parameters: dict[str, str] = field(default_factory=dict)
    method: Method = Method.auto  # Search method
    # Number of trials in total, including those of earlier starts; null: every point of a grid, otherwise 20
    trials: int | None = field(default=None, metadata={"min": 1})
    max_concurrent_trials: int = field(default=1, metadata={"min": 1})  # Trials that run at once
    seed: int = 0  # Seed of the search; every trial trains with the seed of the run
    # Metric to optimize, from metrics.jsonl: its last value; of train/... the mean over the last 50th of a run
    metric: str = "eval/loss"
    mode: Mode = Mode.min  # Direction of the optimization
    pruning: Pruning = Pruning.none  # Early stopping of trials
    # Optimizer steps that every trial gets before it may be pruned
    warmup_steps: int = field(default=0, metadata={"min": 0})
    # GPUs of this machine for each trial, with launcher=local; 0: every trial sees all of them
    gpus_per_trial: int = field(default=0, metadata={"min": 0})
    retry_failed: bool = False  # Repeat the trials that failed

    def validate(self) -> None:
        """Raises: ValueError naming key, value, reason and fix."""
        if not self.parameters:
            raise ValueError(
                "sweep: no key varies; give one a list of values or a range: model.num_layers=2,4 "
                "optimizer.learning_rate=log:1e-4..1e-2"
            )
