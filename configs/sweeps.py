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
    # In all, those of earlier starts included; null: all of a grid, else 20
    trials: int | None = field(default=None, metadata={"min": 1})
    max_concurrent_trials: int = field(default=1, metadata={"min": 1})  # trials at once
    seed: int = 0  # of what is chosen; all trials have the run's `seed`
    metric: str = "eval/loss"  # of metrics.jsonl, its last value; of train/... the mean over the last 50th of a run
    mode: Mode = Mode.min
    pruning: Pruning = Pruning.none
    warmup_steps: int = field(default=0, metadata={"min": 0})  # steps that every trial gets
    # Of this machine's, with launcher=local; 0: each trial sees them all
    gpus_per_trial: int = field(default=0, metadata={"min": 0})
    retry_failed: bool = False  # do those that failed again

    def validate(self) -> None:
        """Raises: ValueError naming key, value, reason and fix."""
        if not self.parameters:
            raise ValueError(
                "sweep: no key varies; give one a list of values or a range: model.num_layers=2,4 "
                "optimizer.learning_rate=log:1e-4..1e-2"
            )
