"""Main loop of a sweep: starts trials as slots become free, reads their metrics and prunes unpromising ones."""

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
from launch.launchers.launcher import say
from launch.launchers.supervisor import identity
from launch.sweeps.progress_display import ProgressDisplay
from launch.sweeps.study import DONE, FAILED, PRUNED, RUNNING, Study, Trial, best_of
from launch.sweeps.trials import STARTS, RunningTrial, num_steps, start, wait_for_orphan

PAUSE = 0.5  # polling interval in seconds
GIVE_UP = 3  # the sweep ends when its first trials, this many, have all failed


@dataclass
class SweepRunner:
    """Runs the trials of a sweep."""

    study: Study
    search: SweepSearchConfig
    arguments: Sequence[str]  # common to all trials
    compose: Callable[[Sequence[str]], RunConfig]  # returns a trial's config for its arguments
    logs: Path
    code: Path  # snapshot of the packages, taken when the sweep started
    shares: Sequence[Sequence[str]]  # GPUs of each slot
    on_end: Callable[[Trial], None]  # called after each trial
    screen: ProgressDisplay
    running: dict[int, RunningTrial] = field(default_factory=dict)  # by slot
    unfinished: list[Trial] = field(default_factory=list)  # interrupted trials to resume
    starts: dict[int, int] = field(default_factory=dict)  # restarts by trial number
    pruned: set[int] = field(default_factory=set)
    proven: bool = False  # at least one trial has reported a metric
    signal: int | None = None  # signal that requested the stop
    gave_up: str = ""  # reason
    exit_code: int = 0  # set when giving up

    def run(self) -> int:
        """Runs trials until the requested number has ended. Returns the exit code."""
        self.unfinished = [trial for trial in self.study.trials() if trial.state == RUNNING]
        for trial in self.unfinished:
            wait_for_orphan(trial, say)
        rejoin = {trial.number for trial in self.unfinished}
        self.proven = any(trial.state in (DONE, PRUNED) for trial in self.study.trials())
        with self._signals(), self.screen:
            while True:
                for slot in list(self.running):
                    self._poll(slot)
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
        """Handles SIGTERM and Ctrl-C: the first lets the trials save a checkpoint, the second kills them."""

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
            for one in self.running.values():  # after an internal error: leave no trial running
                one.stop()

    def _stop_all(self) -> None:
        for one in self.running.values():
            one.stop()

    def _fill(self, rejoin: set[int]) -> None:
        for slot, gpus in enumerate(self.shares):
            while slot not in self.running and not self.gave_up:
                if self.running and not self.proven:  # the first trial tokenizes the data and validates the setup
                    return
                trial = self.unfinished.pop(0) if self.unfinished else self.study.next()
                if trial is None:
                    return
                self._start(slot, gpus, trial, trial.number in rejoin)
                rejoin.discard(trial.number)

    def _start(self, slot: int, gpus: Sequence[str], trial: Trial, rejoin: bool) -> None:
        try:
            config = self.compose([*self.arguments, *trial.arguments, f"run={trial.run}"])
        except (ValueError, HydraException, OmegaConfBaseException) as error:  # incompatible values
            message = str(error).splitlines()[0]
            self._close(self.study.tell(trial, FAILED, message=message), exit_codes.WRONG_INPUT)
            return
        log = self._log(trial)
        one = start(trial, config, self.arguments, self.search, log=log, code=self.code, gpus=gpus, rejoin=rejoin)
        self.running[slot] = one
        self.study.note(trial, process=identity(one.child.pid))
        self.screen.announce(trial, "resumed" if trial.process else "started")
        if self.signal is not None:  # received while the trial was starting
            one.stop()

    def _poll(self, slot: int) -> None:
        one = self.running[slot]
        ended = one.child.poll() is not None
        one.measured.update()
        self.proven = self.proven or one.measured.step > 0
        prune = self.study.report(one.trial, one.measured.reports()) and self.search.pruning is not Pruning.none
        if prune and not ended and not one.asked and one.measured.step < num_steps(one.config):
            self.pruned.add(one.trial.number)
            one.stop()
        if ended:
            del self.running[slot]
            self._end(one)

    def _end(self, one: RunningTrial) -> None:
        outcome = one.outcome(self.search)
        self.study.report(one.trial, one.measured.reports())
        self.study.note(one.trial, seconds=one.seconds)
        if outcome.done:
            ended = self.study.tell(one.trial, DONE, value=outcome.value)
        elif one.trial.number in self.pruned:
            ended = self.study.tell(one.trial, PRUNED)
        elif outcome.again and self._requeue(one):
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

    def _requeue(self, one: RunningTrial) -> bool:
        """Queues an interrupted trial for a restart, at most STARTS times. Returns whether it remains open."""
        trial = self.study.trial(one.trial.number)
        if one.asked:  # the sweep itself is stopping
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
            first = "the first trial" if len(ended) == 1 else f"the first {len(ended)} trials"
            self.gave_up = f"sweep stopped: {first} failed, {trial.run} with: {trial.message}"
            self._stop_all()
