"""What starting costs, of each process beside the others, and whether the compiled program was found and why not."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.reliability.goodput import duration

PHASES = ("import", "join", "config", "data", "state", "compile", "first step")
KEPT = 32  # programs of which something is remembered
PROGRAMS = "programs.json"  # in the folder of the compilation cache


class Startup:
    """Seconds by phase, from the beginning of the process; what falls between phases is `config`."""

    def __init__(self) -> None:
        self._began = time.perf_counter() - _seconds_of_process()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.cache = ""  # of the compiled step: found, or why not

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin, inner = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin - (sum(self.seconds.values()) - inner)

    def again(self) -> None:
        """What follows is another start in the same process."""
        self._began, self.seconds, self.cache = time.perf_counter(), dict.fromkeys(PHASES, 0.0), ""

    def first_step_done(self, seconds: float) -> None:
        self.seconds["first step"] = seconds
        self.seconds["config"] = max(0.0, time.perf_counter() - self._began - sum(self.seconds.values()))

    def told(self, of_processes: list[list[float]]) -> str:
        """A line, or a table with a column for each process. `of_processes`: seconds of `PHASES`."""
        cache = f"; {self.cache}" if self.cache else ""
        totals = [sum(seconds) for seconds in of_processes]
        if len(of_processes) == 1:
            parts = ", ".join(f"{name} {s:.1f}" for name, s in zip(PHASES, of_processes[0], strict=True) if s >= 0.05)
            return f"start-up {duration(totals[0])}: {parts}{cache}"
        shown = of_processes[:8]  # of more, who took longest matters
        columns = [*(f"process {i}" for i in range(len(shown))), "longest"]
        lines = [f"{'start-up':<12}{''.join(f'{column:>12}' for column in columns)}{cache}"]
        for index, name in enumerate(PHASES):
            lines.append(_row(name, [seconds[index] for seconds in of_processes], len(shown)))
        return "\n".join([*lines, _row("total", totals, len(shown))])


def _row(name: str, seconds: list[float], shown: int) -> str:
    return f"  {name:<10}" + "".join(f"{s:>10.1f} s" for s in [*seconds[:shown], max(seconds)])


def began(pid: int) -> str | None:
    """When a process began, in the clock ticks of its machine: numbers of processes are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _seconds_of_process() -> float:
    """How long this process has been there, where the system tells."""
    ticks = began(os.getpid())
    if ticks is None:
        return 0.0
    try:
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError):
        return 0.0


startup = Startup()


# The compilation cache


def compile_watched(lowered: Any, about: Mapping[str, Any], *, tell: bool) -> Any:
    """`lowered.compile()`. `tell`: with what became of it in `startup.cache`, and noted for the next time.

    `about`: what a person would tell programs by.
    """
    import jax

    counts: Counter[str] = Counter()
    event = lambda name, **more: counts.update({name.rpartition("/")[2]: 1})
    lasted = lambda name, seconds, **more: counts.update({name.rpartition("/")[2]: seconds})
    jax.monitoring.register_event_listener(event)
    jax.monitoring.register_event_duration_secs_listener(lasted)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(event)
        jax.monitoring.unregister_event_duration_listener(lasted)
    if tell:
        folder = jax.config.values["jax_compilation_cache_dir"]
        startup.cache = log_cache_misses(counts, program_parts(lowered.as_text(), about), folder)
    return compiled


def program_parts(lowered_text: str, about: Mapping[str, Any]) -> dict[str, str]:
    """What decides whether a program is found: `about` it, versions, flags, devices, and the program itself."""
    import jax
    import jaxlib

    kind = jax.devices()[0].device_kind
    return {
        "jax": f"{jax.__version__}, jaxlib {jaxlib.__version__}",
        "devices": f"{jax.device_count()} x {kind}, {jax.process_count()} processes",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **{name: str(value) for name, value in about.items()},
        "program": hashlib.sha256(lowered_text.encode()).hexdigest()[:16],
    }


def log_cache_misses(counts: Mapping[str, float], parts: dict[str, str], folder: str | None) -> str:
    """Whether the compilation cache in `folder` had a program, and what differs from the nearest one before it.

    The program is noted there.
    """
    if not folder:
        return "compilation cache: off (JAX_COMPILATION_CACHE_DIR)"
    file = Path(folder) / PROGRAMS
    before = _read(file)
    if "://" not in folder:
        _write(file, [*(p for p in before if p != parts), parts][-KEPT:])
    if counts.get("cache_hits"):
        return f"compilation cache: hit, {max(0.0, counts.get('compile_time_saved_sec', 0.0)):.1f} s saved"
    if not counts.get("compile_requests_use_cache"):
        return "compilation cache: not asked; this platform or program has none"
    if not before:
        return "compilation cache: miss, the first program here"
    nearest = max(before, key=lambda p: sum(p.get(name) == value for name, value in parts.items()))
    differing = [name for name, value in parts.items() if nearest.get(name) != value]
    if not differing:
        return "compilation cache: miss, though compiled before: its entry is gone, or was too quick to be kept"
    if differing == ["program"]:
        return "compilation cache: miss, the program differs in its code or another key of the config"
    why = [f"{name} was {nearest.get(name, 'not told')!r}" for name in differing if name != "program"]
    return f"compilation cache: miss, {'; '.join(why)} in the nearest"


def _read(file: Path) -> list[dict[str, str]]:
    try:
        return list(json.loads(file.read_text()))
    except (OSError, ValueError):
        return []


def _write(file: Path, programs: list[dict[str, str]]) -> None:
    from launch.run_folder import write_whole

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(programs, indent=1) + "\n")
    except OSError:  # a note is not worth a run
        pass
