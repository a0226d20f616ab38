"""What a sweep varies, how it chooses, what is better, and which trials end early."""

import enum
from dataclasses import dataclass, field


class Method(enum.Enum):
    auto = "auto"  # grid where every key has a list of values, else bayes
    grid = "grid"  # every combination, in order
    random = "random"
    tpe = "tpe"  # after some random ones, those that promise most (TPE, Bergstra et al. 2011)


class Mode(enum.Enum):
    min = "min"
    max = "max"


class Pruning(enum.Enum):
    none = "none"
    median = "median"  # ends a trial that is worse at a step than the median of the others there
    hyperband = "hyperband"  # Li et al. 2018


@dataclass
class SweepSearchConfig:
    # By key what `KEY=...` says on the command line: 2,4,8 or 1e-4..1e-2 or log:1e-4..1e-2.
    parameters: dict[str, str] = field(default_factory=dict)
    method: Method = Method.auto
    trials: int | None = None  # in all, those of earlier starts included; null: all of a grid, else 20
    max_concurrent_trials: int = 1  # trials at once
    seed: int = 0  # of what is chosen; all trials have the run's `seed`
    metric: str = "eval/loss"  # of metrics.jsonl, its last value; of train/... the mean over the last 50th of a run
    mode: Mode = Mode.min
    pruning: Pruning = Pruning.none
    warmup_steps: int = 0  # steps that every trial gets
    gpus_per_trial: int = 0  # of this machine's, with launcher=local; 0: each trial sees them all
    retry_failed: bool = False  # do those that failed again

    def validate(self) -> None:
        """Raises: ValueError naming key, value, reason and fix."""
        for key, least in (("trials", 1), ("parallel", 1), ("prune_after", 0), ("gpus_per_trial", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"sweep.{key}={value}: must be at least {least}")
        if not self.parameters:
            raise ValueError(
                "sweep: no key varies; give one a list of values or a range: model.num_layers=2,4 "
                "optimizer.learning_rate=log:1e-4..1e-2"
            )
