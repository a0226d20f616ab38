"""Eight fake CPU devices, strict shapes, no network, and one compilation cache for the whole suite."""

import json
import os
import signal
import tempfile

from launch.distributed import raise_fake_device_timeout

# These must stand before jax starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
raise_fake_device_timeout(int(os.environ["JAX_NUM_CPU_DEVICES"]))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "meshwright-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's `pytest &`; the commands under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs():
    """Each program of the CPU holds some memory maps, and a process may have 65,530 of them: the suite has more."""
    yield
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps", "rb") as maps:
            if sum(1 for _ in maps) > 20_000:
                jax.clear_caches()


@pytest.fixture
def measured():
    """`measured(group, name, figure=value)`: how far a test was from its oracle, for `benchmarks/parity.py`'s table."""

    def note(group: str, name: str, **figures: float) -> None:
        if path := os.environ.get("MESHWRIGHT_PARITY"):
            row = {"group": group, "name": name, **{key: float(value) for key, value in figures.items()}}
            with open(path, "a") as file:  # one short write: workers do not cut each other's lines
                file.write(json.dumps(row) + "\n")

    return note
