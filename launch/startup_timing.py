"""Start-up times of each process by phase, and reasons for compilation cache misses."""

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
MAX_PROGRAMS = 32  # programs recorded in PROGRAMS
PROGRAMS = "programs.json"  # in the compilation cache folder


class Startup:
    """Seconds by phase since the process started; time between phases counts as `config`."""

    def __init__(self) -> None:
        self._start = time.perf_counter() - _seconds_of_process()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.cache = ""  # cache hit of the train step, or the reason for a miss

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, inner = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start - (sum(self.seconds.values()) - inner)

    def again(self) -> None:
        """Resets the times for another start in the same process."""
        self._start, self.seconds, self.cache = time.perf_counter(), dict.fromkeys(PHASES, 0.0), ""

    def first_step_done(self, seconds: float) -> None:
        self.seconds["first step"] = seconds
        self.seconds["config"] = max(0.0, time.perf_counter() - self._start - sum(self.seconds.values()))

    def summary(self, of_processes: list[list[float]]) -> str:
        """Returns a line for one process, or a table with a column per process. `of_processes`: seconds by `PHASES`."""
        cache = f"; {self.cache}" if self.cache else ""
        totals = [sum(seconds) for seconds in of_processes]
        if len(of_processes) == 1:
            parts = ", ".join(f"{name} {s:.1f}" for name, s in zip(PHASES, of_processes[0], strict=True) if s >= 0.05)
            return f"start-up {duration(totals[0])}: {parts}{cache}"
        shown = of_processes[:8]  # the column `longest` covers the others
        columns = [*(f"process {i}" for i in range(len(shown))), "longest"]
        lines = [f"{'start-up':<12}{''.join(f'{column:>12}' for column in columns)}{cache}"]
        for index, name in enumerate(PHASES):
            lines.append(_row(name, [seconds[index] for seconds in of_processes], len(shown)))
        return "\n".join([*lines, _row("total", totals, len(shown))])


def _row(name: str, seconds: list[float], shown: int) -> str:
    return f"  {name:<10}" + "".join(f"{s:>10.1f} s" for s in [*seconds[:shown], max(seconds)])


def began(pid: int) -> str | None:
    """Returns the start time of a process in clock ticks since boot, to detect reused process ids."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _seconds_of_process() -> float:
    """Returns the age of this process in seconds; 0 if the system does not report it."""
    ticks = began(os.getpid())
    if ticks is None:
        return 0.0
    try:
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError):
        return 0.0


startup = Startup()


# The compilation cache


def compile_watched(lowered: Any, about: Mapping[str, Any], *, report: bool) -> Any:
    """Runs `lowered.compile()`. `report`: sets `startup.cache` and records the program for later comparisons.

    `about`: named config values that distinguish programs.
    """
    import jax

    counts: Counter[str] = Counter()
    record_event = lambda name, **more: counts.update({name.rpartition("/")[2]: 1})
    record_duration = lambda name, seconds, **more: counts.update({name.rpartition("/")[2]: seconds})
    jax.monitoring.register_event_listener(record_event)
    jax.monitoring.register_event_duration_secs_listener(record_duration)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(record_event)
        jax.monitoring.unregister_event_duration_listener(record_duration)
    if report:
        folder = jax.config.values["jax_compilation_cache_dir"]
        startup.cache = log_cache_misses(counts, program_parts(lowered.as_text(), about), folder)
    return compiled


def program_parts(lowered_text: str, about: Mapping[str, Any]) -> dict[str, str]:
    """Returns the parts of the cache key: `about`, versions, flags, devices, and a hash of the program."""
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
    """Describes a cache hit or miss, with the difference from the closest earlier program. Records it in `folder`."""
    if not folder:
        return "compilation cache: off (JAX_COMPILATION_CACHE_DIR)"
    file = Path(folder) / PROGRAMS
    earlier = _read(file)
    if "://" not in folder:
        _write(file, [*(p for p in earlier if p != parts), parts][-MAX_PROGRAMS:])
    if counts.get("cache_hits"):
        return f"compilation cache: hit, {max(0.0, counts.get('compile_time_saved_sec', 0.0)):.1f} s saved"
    if not counts.get("compile_requests_use_cache"):
        return "compilation cache: not used; unsupported by this platform or program"
    if not earlier:
        return "compilation cache: miss, the first program"
    closest = max(earlier, key=lambda p: sum(p.get(name) == value for name, value in parts.items()))
    differing = [name for name, value in parts.items() if closest.get(name) != value]
    if not differing:
        return "compilation cache: miss, although compiled before: its entry is gone, or it compiled too fast to cache"
    if differing == ["program"]:
        return "compilation cache: miss, the program differs in its code or in another config key"
    why = [f"{name} was {closest.get(name, 'not recorded')!r}" for name in differing if name != "program"]
    return f"compilation cache: miss, {'; '.join(why)} in the closest entry"


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
    except OSError:  # a failed write must not end a run
        pass
