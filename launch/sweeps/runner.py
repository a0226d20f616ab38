"""The loop of a sweep: starts trials while there is room, reads how they do, ends those that promise nothing."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from configs.schema import RunConfig
from configs.sweeps import Pruning, SweepSearchConfig
from launch import exit_codes
from launch.launchers.base import say
from launch.launchers.supervisor import identity
from launch.sweeps.progress_display import ProgressDisplay
from launch.sweeps.study import DONE, FAILED, PRUNED, RUNNING, Study, Trial, best_of
from launch.sweeps.trials import STARTS, Running, num_steps, start, wait_for_orphan

PAUSE = 0.5  # seconds between looks at the trials
GIVE_UP = 3  # trials that all failed, with none that did not


@dataclass
class SweepRunner:
    """What a sweep needs to run its trials, and what it remembers while it does."""

    study: Study
    search: SweepSearchConfig
    arguments: Sequence[str]  # of every trial
    compose: Callable[[Sequence[str]], RunConfig]  # a trial's config from its arguments
    logs: Path
    code: Path  # the packages as they were when the sweep began
    shares: Sequence[Sequence[str]]  # GPUs of each place
    on_end: Callable[[Trial], None]  # called after each trial
    screen: ProgressDisplay
    running: dict[int, Running] = field(default_factory=dict)  # by place
    unfinished: list[Trial] = field(default_factory=list)  # begun, to go on with
    starts: dict[int, int] = field(default_factory=dict)
    pruned: set[int] = field(default_factory=set)
    proven: bool = False  # a trial has measured something
    signal: int | None = None  # that asked the sweep to end
    gave_up: str = ""
    exit_code: int = 0  # where it gave up

    def conduct(self) -> int:
        """Runs trials until there are enough. Returns the exit code."""
        self.unfinished = [trial for trial in self.study.trials() if trial.state == RUNNING]
        for trial in self.unfinished:
            wait_for_orphan(trial, say)
        rejoin = {trial.number for trial in self.unfinished}
        self.proven = any(trial.state in (DONE, PRUNED) for trial in self.study.trials())
        with self._signals(), self.screen:
            while True:
                for place in list(self.running):
                    self._look(place)
                if self.signal is None and not self.gave_up:
                    self._fill(rejoin)
                self.screen.show(self.study.trials(), self.study.wanted, list(self.running.values()))
                if not self.running:
                    break
                time.sleep(PAUSE)
        if self.signal is not None:
            return exit_codes.PREEMPTED if self.signal == signal.SIGTERM else exit_codes.INTERRUPTED
        if self.gave_up:
            say(self.gave_up)
            return self.exit_code
        return 0 if best_of(self.study.trials(), self.search) else exit_codes.FAILED

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGTERM or Ctrl-C lets the trials save, the second one kills them."""

        def handle(number: int, frame: Any) -> None:
            if self.signal is not None:
                for one in self.running.values():
                    one.child.kill()
                return
            self.signal = number
            self._stop_all()

        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for one in self.running.values():  # an error of ours: no trial is left alone
                one.stop()

    def _stop_all(self) -> None:
        for one in self.running.values():
            one.stop()

    def _fill(self, rejoin: set[int]) -> None:
        for place, gpus in enumerate(self.shares):
            while place not in self.running and not self.gave_up:
                if self.running and not self.proven:  # the first prepares the text, and shows whether all is right
                    return
                trial = self.unfinished.pop(0) if self.unfinished else self.study.next()
                if trial is None:
                    return
                self._begin(place, gpus, trial, trial.number in rejoin)
                rejoin.discard(trial.number)

    def _begin(self, place: int, gpus: Sequence[str], trial: Trial, rejoin: bool) -> None:
        try:
            config = self.compose([*self.arguments, *trial.arguments, f"run={trial.run}"])
        except (ValueError, HydraException, OmegaConfBaseException) as error:  # values that do not go together
            message = str(error).splitlines()[0]
            self._close(self.study.tell(trial, FAILED, message=message), exit_codes.WRONG_INPUT)
            return
        log = self._log(trial)
        one = start(trial, config, self.arguments, self.search, log=log, code=self.code, gpus=gpus, rejoin=rejoin)
        self.running[place] = one
        self.study.note(trial, process=identity(one.child.pid))
        self.screen.tell(trial, "goes on" if trial.process else "begins")
        if self.signal is not None:  # it came while the trial began
            one.stop()

    def _look(self, place: int) -> None:
        one = self.running[place]
        ended = one.child.poll() is not None
        one.measured.look()
        self.proven = self.proven or one.measured.step > 0
        prune = self.study.report(one.trial, one.measured.reports()) and self.search.pruning is not Pruning.none
        if prune and not ended and not one.asked and one.measured.step < num_steps(one.config):
            self.pruned.add(one.trial.number)
            one.stop()
        if ended:
            del self.running[place]
            self._end(one)

    def _end(self, one: Running) -> None:
        outcome = one.outcome(self.search)
        self.study.report(one.trial, one.measured.reports())
        self.study.note(one.trial, seconds=one.seconds)
        if outcome.done:
            ended = self.study.tell(one.trial, DONE, value=outcome.value)
        elif one.trial.number in self.pruned:
            ended = self.study.tell(one.trial, PRUNED)
        elif outcome.again and self._goes_on(one):
            return
        else:
            ended = self.study.tell(one.trial, FAILED, message=outcome.message)
        self._close(ended, outcome.code)

    def _close(self, ended: Trial, code: int) -> None:
        self.screen.ended(ended, self.study.trials(), self._log(ended))
        self.on_end(ended)
        if ended.state == FAILED:
            self._consider_giving_up(ended, code)

    def _log(self, trial: Trial) -> Path:
        return self.logs / f"{trial.run}.log"

    def _goes_on(self, one: Running) -> bool:
        """Whether a trial that was cut off is to be started again; it waits for its turn then."""
        trial = self.study.trial(one.trial.number)
        if one.asked:  # with the sweep
            return True
        if not one.rejoined:
            self.starts[trial.number] = self.starts.get(trial.number, 0) + 1
        if self.starts.get(trial.number, 0) >= STARTS:
            return False
        self.unfinished.append(trial)
        return True

    def _consider_giving_up(self, trial: Trial, code: int) -> None:
        ended = [t for t in self.study.trials() if t.ended]
        if self.gave_up or any(t.state != FAILED for t in ended):
            return
        wrong = code == exit_codes.WRONG_INPUT
        if wrong or len(ended) >= GIVE_UP:
            self.exit_code = exit_codes.WRONG_INPUT if wrong else exit_codes.FAILED
            many = "the first trial" if len(ended) == 1 else f"the first {len(ended)} trials"
            self.gave_up = f"sweep ends: {many} failed, {trial.run} with: {trial.message}"
            self._stop_all()
