"""Record of a sweep: an Optuna study in a journal file, which determines the next trial.

The parameters of a trial depend only on the sweep's seed, the trial number and earlier trials, not on the state of this
process. A resumed sweep therefore proposes the same trials as an uninterrupted one.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.sweeps import Method, Mode, Pruning, SweepSearchConfig
from launch.sweeps.space import Range, Space, format_value, grid

DONE, PRUNED, FAILED, RUNNING, WAITING = "done", "pruned", "failed", "running", "waiting"
TWINS = 100  # consecutive duplicate proposals after which the search space counts as exhausted
FEW = 3  # minimum number of finished trials for the median pruner
TRIALS = 20  # default number of trials
RANDOM_SHARE, MOST_RANDOM = 3, 10  # tpe starts with a third of the trials at random, but at most 10


@dataclass(frozen=True)
class Trial:
    """A trial as recorded in the study."""

    number: int
    run: str
    state: str
    params: dict[str, str]  # values by key, in override syntax
    value: float | None = None  # final metric of a finished trial
    reports: dict[int, float] = field(default_factory=dict)  # metric by step
    seconds: float = 0.0  # total over all starts
    message: str = ""
    process: dict[str, Any] = field(default_factory=dict)  # identity of the latest process

    @property
    def latest(self) -> float | None:
        """The final value, or the last reported one."""
        if self.value is not None or not self.reports:
            return self.value
        return self.reports[max(self.reports)]

    @property
    def arguments(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.params.items()]

    @property
    def ended(self) -> bool:
        return self.state in (DONE, PRUNED, FAILED)


def chosen_method(search: SweepSearchConfig, space: Space) -> Method:
    if search.method is not Method.auto:
        return search.method
    return Method.tpe if any(isinstance(part, Range) for part in space.values()) else Method.grid


def grid_points(search: SweepSearchConfig, space: Space) -> list[dict[str, str]]:
    """Returns the points of a grid search, or none for other methods.

    Raises: ValueError if a key has a range, or the grid has more points than sweep.trials.
    """
    points = list(grid(space)) if chosen_method(search, space) is Method.grid else []
    if search.trials is not None and search.trials < len(points):
        raise ValueError(
            f"sweep.trials={search.trials}: the grid has {len(points)} points; remove sweep.trials to run all, or "
            "sample them with sweep.method=random"
        )
    return points


def imported() -> Any:
    """Imports Optuna. Raises: ValueError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError("sweep: Optuna is not installed; install it with: pip install -e '.[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Study:
    """The trials of one sweep. With `folder` None, nothing is written."""

    def __init__(self, folder: Path | None, name: str, search: SweepSearchConfig, space: Space, num_steps: int):
        optuna = self._optuna = imported()
        self.name, self.search, self.space = name, search, space
        self.method = chosen_method(search, space)
        points = grid_points(search, space)
        storage = None
        if folder is not None:
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="minimize" if search.mode is Mode.min else "maximize",
            pruner=_pruner(optuna, search, num_steps),
            load_if_exists=True,
        )
        known = len(self._study.get_trials(deepcopy=False))
        for point in points[known:]:  # if interrupted here, the next start adds the rest
            self._study.enqueue_trial(point)
        if search.retry_failed:
            self._retry()
        retries = sum("again" in trial.user_attrs for trial in self._all())
        started = sum(trial.state.name != "WAITING" for trial in self._all())
        self.wanted = max((len(points) or search.trials or TRIALS) + retries, started)
        self._opened: dict[int, Any] = {}

    @property
    def num_random(self) -> int:
        """Number of random trials before tpe uses its model."""
        return min(MOST_RANDOM, max(1, self.wanted // RANDOM_SHARE))

    def _all(self) -> Sequence[Any]:
        """Returns Optuna's trials, without duplicates of earlier ones."""
        return [t for t in self._study.get_trials(deepcopy=False) if "same_as" not in t.user_attrs]

    def _retry(self) -> None:
        """Enqueues failed trials again, under new numbers."""
        known = self._all()
        done = {trial.user_attrs.get("again") for trial in known}
        for trial in known:
            if trial.state.name == "FAIL" and trial.number not in done:
                self._study.enqueue_trial(trial.params, user_attrs={"again": trial.number})

    def trials(self) -> list[Trial]:
        return [self._trial(trial) for trial in self._all()]

    def trial(self, number: int) -> Trial:
        return self._trial(self._study.get_trials(deepcopy=False)[number])

    def _trial(self, found: Any) -> Trial:
        states = {"COMPLETE": DONE, "PRUNED": PRUNED, "FAIL": FAILED, "RUNNING": RUNNING, "WAITING": WAITING}
        attributes = found.user_attrs
        return Trial(
            number=found.number,
            run=f"{self.name}-{found.number:03d}",
            state=states[found.state.name],
            params={
                key: format_value(part, found.params[key]) for key, part in self.space.items() if key in found.params
            },
            value=found.value if found.state.name == "COMPLETE" else None,
            reports=dict(found.intermediate_values),
            seconds=attributes.get("seconds", 0.0),
            message=attributes.get("message", ""),
            process=attributes.get("process", {}),
        )

    def next(self) -> Trial | None:
        """Proposes the next trial; None if enough trials were started or the search space is exhausted."""
        started = [trial for trial in self.trials() if trial.state != WAITING]
        if len(started) >= self.wanted:
            return None
        before = {json.dumps(trial.params): trial.number for trial in started}
        for _ in range(TWINS):
            everything = self._study.get_trials(deepcopy=False)
            waiting = [trial for trial in everything if trial.state.name == "WAITING"]
            if self.method is Method.grid and not waiting:
                return None
            number = min((trial.number for trial in waiting), default=len(everything))
            self._study.sampler = self._sampler(number)
            proposal = self._study.ask(self._distributions())
            found = self.trial(proposal.number)
            twin = before.get(json.dumps(found.params))
            if twin is None or waiting:
                self._opened[found.number] = proposal
                return found
            proposal.set_user_attr("same_as", twin)
            self._study.tell(proposal, state=self._optuna.trial.TrialState.FAIL)
        return None

    def _sampler(self, number: int) -> Any:
        samplers = self._optuna.samplers
        seed = int(np.random.SeedSequence([self.search.seed, number]).generate_state(1)[0])
        if self.method is not Method.tpe:
            return samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ExperimentalWarning
            return samplers.TPESampler(
                seed=seed, n_startup_trials=self.num_random, multivariate=True, constant_liar=True
            )

    def _distributions(self) -> dict[str, Any]:
        kinds = self._optuna.distributions
        found: dict[str, Any] = {}
        for key, part in self.space.items():
            if not isinstance(part, Range):
                found[key] = kinds.CategoricalDistribution(part.values)
            elif part.is_integer:
                found[key] = kinds.IntDistribution(int(part.low), int(part.high), log=part.log)
            else:
                found[key] = kinds.FloatDistribution(part.low, part.high, log=part.log)
        return found

    def _open(self, trial: Trial) -> Any:
        """Returns Optuna's handle of a running trial, including one proposed by an earlier process."""
        if trial.number not in self._opened:
            # Creating the handle with a joint sampler would sample again.
            self._study.sampler = self._optuna.samplers.RandomSampler()
            found = self._study.get_trials(deepcopy=False)[trial.number]
            self._opened[trial.number] = self._optuna.trial.Trial(self._study, found._trial_id)
        return self._opened[trial.number]

    def note(self, trial: Trial, **values: Any) -> None:
        """Stores attributes of a running trial."""
        opened = self._open(trial)
        for key, value in values.items():
            opened.set_user_attr(key, value)

    def report(self, trial: Trial, reports: Mapping[int, float]) -> bool:
        """Records metric values by step. Returns whether the trial should be pruned."""
        opened, known = self._open(trial), self.trial(trial.number).reports
        prune = False
        for step, value in sorted(reports.items()):
            if step not in known:
                opened.report(value, step)
                prune = prune or (step > self.search.warmup_steps and opened.should_prune())
        return prune

    def tell(self, trial: Trial, state: str, *, value: float | None = None, message: str = "") -> Trial:
        """Records the end of a trial. Returns the updated trial."""
        if message:
            self.note(trial, message=message)
        states = self._optuna.trial.TrialState
        final = {DONE: states.COMPLETE, PRUNED: states.PRUNED, FAILED: states.FAIL}[state]
        self._study.tell(trial.number, value, state=final, skip_if_finished=True)
        return self.trial(trial.number)


def _pruner(optuna: Any, search: SweepSearchConfig, num_steps: int) -> Any:
    if search.pruning is Pruning.median:
        return optuna.pruners.MedianPruner(n_startup_trials=FEW, n_warmup_steps=search.warmup_steps, n_min_trials=FEW)
    if search.pruning is Pruning.hyperband:
        least = search.warmup_steps or max(1, num_steps // 27)
        return optuna.pruners.HyperbandPruner(min_resource=least, max_resource=max(num_steps, least))
    return optuna.pruners.NopPruner()


def better(search: SweepSearchConfig, value: float) -> float:
    """Returns the value with its sign chosen so that smaller is better."""
    return value if search.mode is Mode.min else -value


def ranked(trials: Sequence[Trial], search: SweepSearchConfig) -> list[Trial]:
    """Sorts trials: finished ones by value, pruned ones by their last value, then all others."""
    order = (DONE, PRUNED, RUNNING, FAILED, WAITING)

    def key(trial: Trial) -> tuple[int, float, int]:
        latest = trial.latest
        return order.index(trial.state), 0.0 if latest is None else better(search, latest), trial.number

    return sorted(trials, key=key)


def best_of(trials: Sequence[Trial], search: SweepSearchConfig) -> Trial | None:
    done = [trial for trial in trials if trial.state == DONE]
    return ranked(done, search)[0] if done else None
