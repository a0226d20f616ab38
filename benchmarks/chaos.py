"""Fault injection test: a multi-process run with faults must end with the same bits as an undisturbed run.

    python benchmarks/chaos.py [--faults 200] [--processes 2,3,4] [--seed 0] [--each 25] [--plain] [--results FILE]

A seeded plan per job schedules faults by step: processes killed, frozen or terminated, checkpoints damaged while all
processes are down, a full or read-only disk, NaN gradients, a bit flip in one copy of the parameters. Processes are
supervised as by `launcher=local`. Exits with 1 if a job makes no progress for `BOUND` seconds, resumes from another
step than its newest valid checkpoint, or ends with other parameters, optimizer state, next batch or losses than the
same job without faults (except NaN gradients, which both have).

Disk faults need root and are skipped otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.launchers import supervisor
from launch.launchers.job import distributed_env
from launch.launchers.local import free_port
from trainer.checkpoint.checksums import DIGESTS, verify_digests

ROOT = Path(__file__).resolve().parents[1]
BOUND = 150.0  # seconds without a new step, starting and compiling included, that count as a hang
GAP = 12  # steps between two faults
RUN = [
    "train", "run=a", "source=[synthetic]", "tokenizer=bytes", "model=tiny", "model.num_layers=2",
    "model.vocab_size=264", "model.dtype=float32", "data.packing=best_fit", "data.seq_len=64", "data.batch_size=12",
    "data.max_eval_batches=1", "optimizer.learning_rate=1e-3", "schedule=constant", "schedule.warmup_steps=2",
    "task.sample_tokens=0", "checkpoint.save_interval_steps=5", "checkpoint.max_to_keep=4",
    "checkpoint.keep_best=false",
    "sdc_check.every=4",
]  # fmt: skip
# How often each kind is drawn. What a frozen process costs is the half minute until it counts as gone.
KINDS = {
    "kill": 5, "kill process 0": 2, "kill all": 2, "terminate": 4, "terminate twice": 1, "pause": 4, "freeze": 1,
    "flip a bit": 2, "truncate a file": 2, "remove a file": 1, "disk full": 3, "read-only": 2, "not a number": 3,
    "flip a parameter": 2,
}  # fmt: skip
NEED_ROOT = ("disk full", "read-only")
INSIDE = ("not a number", "flip a parameter")  # done by the process itself
DAMAGE = ("flip a bit", "truncate a file", "remove a file")


@dataclass(frozen=True)
class Fault:
    step: int  # at which, or soon after, it happens
    kind: str
    victim: int  # a process


@dataclass
class Job:
    """One run with faults, and what was seen of it."""

    folder: Path
    count: int  # of processes
    steps: int
    faults: list[Fault]
    done: list[Fault] = field(default_factory=list)
    recovery: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # seconds to the next new step
    wrong: list[str] = field(default_factory=list)
    starts: int = 0
    processes: list[subprocess.Popen] = field(default_factory=list)
    damage: list[Fault] = field(default_factory=list)  # to be done before the next start

    @property
    def checkpoints(self) -> Path:
        return self.folder / "runs" / "a" / "checkpoints"

    def newest_whole(self) -> int | None:
        steps = sorted((int(path.name) for path in self.checkpoints.glob("*") if path.name.isdigit()), reverse=True)
        return next((step for step in steps if verify_digests(self.checkpoints / str(step)) is None), None)

    def step(self) -> int:
        """The newest that was reported."""
        try:
            rows = (self.folder / "runs" / "a" / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return 0
        found = [re.match(r'\{"step": (\d+)', row) for row in rows[-3:]]
        return max((int(match[1]) for match in found if match), default=0)

    def attempt(self, count: int) -> supervisor.AttemptResult:
        """One start of all processes, to the end of the last."""
        for fault in self.damage:
            damage(self.checkpoints, fault)
        self.damage = []
        self.starts += 1
        expected, port = self.newest_whole(), free_port()
        logs = [self.folder / f"process_{index}.{self.starts}.log" for index in range(count)]
        for index, log in enumerate(logs):
            with log.open("w") as file:
                self.processes.append(self.process(index, port, file))
        try:
            return supervisor.watch(
                lambda: [process.poll() for process in self.processes],
                end_all=lambda: self.signal(signal.SIGTERM),
                kill_all=lambda: self.signal(signal.SIGKILL),
            )
        finally:
            self.processes = []
            found = re.search(r"resumes at step (\d+)", logs[0].read_text())
            if found and int(found[1]) != expected:
                self.wrong.append(f"start {self.starts} resumed at {found[1]} instead of {expected}")

    def process(self, index: int, port: int, log: object) -> subprocess.Popen:
        inside = [f"{f.kind}:{f.step}:{f.victim}" for f in self.faults if f.kind in INSIDE]
        settings = distributed_env(self.count, index, f"127.0.0.1:{port}") if self.count > 1 else {}
        return subprocess.Popen(
            [sys.executable, str(Path(__file__)), "child", *self.arguments()],
            cwd=self.folder,
            env=os.environ
            | settings
            | {"PYTHONPATH": str(ROOT), "CHAOS": ",".join(inside), "TF_CPP_MIN_LOG_LEVEL": "3", "NO_COLOR": "1"},
            stdout=log,
            stderr=log,
        )

    def arguments(self) -> list[str]:
        mesh = {2: ["mesh.data=2"], 3: ["mesh.data=3"], 4: ["mesh.data=2", "mesh.fsdp=2"]}[self.count]
        return [*RUN, f"fake_devices={self.count}", *mesh, f"task.num_steps={self.steps}"]

    def signal(self, number: int, only: int | None = None) -> None:
        for index, process in enumerate(self.processes):
            if process.poll() is None and only in (None, index):
                process.send_signal(number)

    def run(self) -> None:
        """To the end, with all faults."""
        ended = threading.Event()
        injector = threading.Thread(target=self.inject, args=(ended,), daemon=True)
        injector.start()
        code = supervisor.supervise(
            self.attempt,
            count=self.count,
            max_restarts=10 * len(self.faults) + 10,
            elastic=False,
            saved_step=self.newest_whole,
            say=lambda text: None,
        )
        ended.set()
        injector.join()
        if code:
            self.wrong.append(f"ended with {code}")

    def inject(self, ended: threading.Event) -> None:
        plan = sorted((f for f in self.faults if f.kind not in INSIDE), key=lambda fault: fault.step)
        inside = sorted((f for f in self.faults if f.kind in INSIDE), key=lambda fault: fault.step)
        furthest, since, waiting = 0, time.monotonic(), []
        while not ended.wait(0.05):
            now, step = time.monotonic(), self.step()
            if step > furthest:
                for fault in waiting:
                    self.recovery[fault.kind].append(now - since)
                furthest, since, waiting = step, now, []
                while inside and inside[0].step <= step:
                    self.done.append(inside.pop(0))
            elif now - since > BOUND:
                self.wrong.append(f"no progress for {BOUND:.0f} s after step {furthest}, after {self.done[-1:]}")
                self.signal(signal.SIGKILL)
                since = now
            if plan and step >= plan[0].step and len(self.processes) == self.count and not waiting:
                fault = plan.pop(0)
                self.done.append(fault)
                waiting.append(fault)
                since = time.monotonic()
                self.do(fault)

    def do(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                self.signal(signal.SIGKILL, fault.victim)
            case "kill process 0":
                self.signal(signal.SIGKILL, 0)
            case "kill all":
                self.signal(signal.SIGKILL)
            case "terminate":
                self.signal(signal.SIGTERM, fault.victim)
            case "terminate twice":
                self.signal(signal.SIGTERM, fault.victim)
                time.sleep(0.3)
                self.signal(signal.SIGTERM, fault.victim)
            case "pause":
                self.signal(signal.SIGSTOP, fault.victim)
                time.sleep(4)
                self.signal(signal.SIGCONT, fault.victim)
            case "freeze":
                self.signal(signal.SIGSTOP, fault.victim)  # the supervisor ends it when the others have left
            case "disk full":
                ballast = self.folder / "ballast"
                with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while file.write(bytes(1 << 16)):
                        pass
                time.sleep(4)
                ballast.unlink()
            case "read-only":
                subprocess.run(["mount", "-o", "remount,ro", self.folder], check=False, capture_output=True)
                time.sleep(2)
                subprocess.run(["mount", "-o", "remount,rw", self.folder], check=True)
            case _:
                self.damage.append(fault)
                self.signal(signal.SIGKILL)


def damage(checkpoints: Path, fault: Fault) -> None:
    """Does something to a file of the newest checkpoint, where there is an older one."""
    steps = sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())
    if len(steps) < 2:
        return
    chosen = random.Random(fault.step)
    files = sorted(p for p in (checkpoints / str(steps[-1])).rglob("*") if p.is_file() and p.stat().st_size)
    file = chosen.choice([p for p in files if p.name not in (DIGESTS, "_CHECKPOINT_METADATA")])
    content = bytearray(file.read_bytes())
    if fault.kind == "remove a file":
        file.unlink()
    elif fault.kind == "truncate a file":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        file.write_bytes(content)


def child(arguments: Sequence[str]) -> None:
    """A process of a job: the command line, with the faults that only it can have."""
    import trainer.reliability.sdc_check
    import trainer.step
    from launch.cli import run

    inside = [entry.split(":") for entry in os.environ.get("CHAOS", "").split(",") if entry]
    poisoned = [int(step) for kind, step, _ in inside if kind == "not a number"]
    flipped = {int(step): int(victim) for kind, step, victim in inside if kind == "flip a parameter"}
    made, guard = trainer.step._accumulate, trainer.reliability.sdc_check.SDCChecker.guard

    def poisoned_gradients(loss_sum, params, frozen, batch, rng, num_microbatches):  # type: ignore[no-untyped-def]
        import jax.numpy as jnp

        step = frozen.pop("chaos")
        grads, means = made(loss_sum, params, frozen, batch, rng, num_microbatches)
        bad = jnp.isin(step + 1, jnp.asarray(poisoned or [-1]))
        import jax

        return jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads), means

    def with_step(make):  # type: ignore[no-untyped-def]
        def making(*args, **more):  # type: ignore[no-untyped-def]
            step = make(*args, **more)
            return lambda state, frozen, *rest: step(state, {**frozen, "chaos": state.step}, *rest)

        return making

    def guarding(self, train_step, first_step):  # type: ignore[no-untyped-def]
        guarded, step = guard(self, train_step, first_step), first_step

        def flipping(state, *rest):  # type: ignore[no-untyped-def]
            nonlocal step
            step += 1
            import jax

            mark = Path(f"flipped_{step}")  # a bit that flips once, not again when the step comes again
            if flipped.get(step) == jax.process_index() and not mark.exists():
                mark.touch()
                state = with_a_flipped_bit(state)
            return guarded(state, *rest)

        return flipping

    import launch.build

    trainer.step._accumulate = poisoned_gradients
    launch.build.make_train_step = with_step(trainer.step.make_train_step)
    trainer.reliability.sdc_check.SDCChecker.guard = guarding
    sys.exit(run(list(arguments)))


def with_a_flipped_bit(state):  # type: ignore[no-untyped-def]
    """The lowest bit of one element of this process' copy of the embedding."""
    import dataclasses

    import jax
    import numpy as np

    array = state.params["embedding"]
    pieces = []
    for index, shard in enumerate(array.addressable_shards):
        piece = np.array(shard.data)
        if index == 0:
            piece.reshape(-1).view(np.uint32)[piece.size // 2] ^= 1
        pieces.append(jax.device_put(piece, shard.device))
    spoiled = jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)
    return dataclasses.replace(state, params={**state.params, "embedding": spoiled})


def end_of(job: Job) -> dict:
    """Returns the values to compare: hashes of the last checkpoint and all losses."""
    output = subprocess.run(
        [sys.executable, "-m", "launch.cli", "inspect", "run=a", "format=json"],
        cwd=job.folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = json.loads(output)
    rows = [json.loads(row) for row in (job.folder / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    keys = ("params_sha256", "optimizer_sha256", "next_batch_sha256", "step")
    return {key: found[key] for key in keys} | {"losses": losses}


def planned(count: int, number: int, rng: random.Random, root: bool) -> list[Fault]:
    kinds = {kind: weight for kind, weight in KINDS.items() if root or kind not in NEED_ROOT}
    drawn = rng.choices(list(kinds), list(kinds.values()), k=number)
    return [Fault(11 + GAP * i + rng.randrange(5), kind, rng.randrange(count)) for i, kind in enumerate(drawn)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--each", type=int, default=25, help="faults per job")
    parser.add_argument("--processes", default="2,3,4", help="process counts of the jobs, cycled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without the kinds that need root")
    parser.add_argument("--results", default="", help="a JSON file to write")
    options = parser.parse_args()
    counts, rng = [int(n) for n in options.processes.split(",")], random.Random(options.seed)
    root = os.geteuid() == 0 and not options.plain
    total, recovery, wrong, starts, left = Counter(), defaultdict(list), [], 0, options.faults
    started = time.monotonic()
    while left > 0:
        number, count = min(left, options.each), counts[(options.faults - left) // options.each % len(counts)]
        left -= number
        faults = planned(count, number, rng, root)
        job = compared(count, faults, root)
        total.update(fault.kind for fault in job.done)
        for kind, seconds in job.recovery.items():
            recovery[kind] += seconds
        wrong += [f"{count} processes: {text}" for text in job.wrong]
        starts += job.starts
        print(
            f"{count} processes, {len(job.done)} of {number} faults, {job.starts} starts: "
            + ("; ".join(job.wrong) or "the end is that of the unbroken run"),
            flush=True,
        )
    print("\n| fault | times | to the next new step: median | longest |\n|---|---:|---:|---:|")
    for kind, times in total.most_common():
        seconds = sorted(recovery[kind])
        recovered = f"{seconds[len(seconds) // 2]:.0f} s | {seconds[-1]:.0f} s" if seconds else " | "
        print(f"| {kind} | {times} | {recovered} |")
    print(f"\n{total.total()} faults, {starts} starts, {(time.monotonic() - started) / 60:.0f} min; {len(wrong)} wrong")
    if options.results:
        saved = {"faults": total, "recovery": recovery, "starts": starts, "wrong": wrong, "seed": options.seed}
        Path(options.results).write_text(json.dumps(saved, indent=1))
    sys.exit(bool(wrong))


def difference(one, other) -> str:  # type: ignore[no-untyped-def]
    """Describes the steps at which losses differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return ""
    apart = [(step, one.get(step), other.get(step)) for step in sorted(one | other) if one.get(step) != other.get(step)]
    return f": at step {apart[0][0]} {apart[0][2]} for {apart[0][1]}, and at {len(apart) - 1} more"


def compared(count: int, faults: list[Fault], root: bool) -> Job:
    """Runs a job with these faults, and the same job with only the faults that change the computation."""
    steps = 11 + GAP * (len(faults) + 1)
    with tempfile.TemporaryDirectory(prefix="chaos_") as name:
        ends, logs = [], Path(tempfile.gettempdir()) / "chaos_logs"
        for part in ("unbroken", "broken"):
            folder = Path(name) / part
            folder.mkdir()
            if root:  # a separate file system that can be filled
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", folder], check=True)
            try:
                kept = faults if part == "broken" else [f for f in faults if f.kind == "not a number"]
                job = Job(folder, count, steps, kept)
                job.run()
                ends.append(None if job.wrong and part == "unbroken" else end_of(job))
            except subprocess.CalledProcessError as error:
                job.wrong.append(f"its end cannot be read: {error.stderr[-300:]}")
                ends.append({})
            finally:
                (logs / part).mkdir(parents=True, exist_ok=True)
                for log in [*folder.glob("*.log"), *folder.glob("runs/a/*.json*")]:
                    shutil.copy(log, logs / part)
                if root:
                    subprocess.run(["umount", "-l", folder], check=True)
        for key, value in (ends[0] or {}).items():
            other = ends[1].get(key)
            if other != value:
                job.wrong.append(f"{key} is not that of the unbroken run{difference(value, other)}")
        if not job.wrong:
            shutil.rmtree(logs)
    return job


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2:])
    else:
        main()
