"""Start-up reports: seconds of each process, and reasons for compilation cache misses."""

import json
import sys
import time
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import launch.cli
from launch.attention_kernel import verify_attention_kernel
from launch.startup_timing import PHASES, PROGRAMS, Startup, compile_watched, log_cache_misses, program_parts, startup
from models.attention import kernels
from models.config import AttentionConfig, AttentionImplementation, AttentionMask, ModelConfig
from models.logical_axes import NoConstraint

PARTS = {"jax": "1", "devices": "8 x cpu", "model": "a", "program": "x"}
MISS = Counter(compile_requests_use_cache=1)


def test_phases_within_phases_are_counted_once_and_all_time_is_counted():
    clock = Startup()
    with clock.phase("state"):
        time.sleep(0.02)
        with clock.phase("data"):
            time.sleep(0.03)
    clock.first_step_done(0.25)
    assert 0.02 <= clock.seconds["state"] < 0.03 <= clock.seconds["data"]
    assert clock.seconds["first step"] == 0.25 and clock.seconds["config"] >= 0
    assert list(clock.seconds) == list(PHASES)


def test_one_process_is_reported_in_a_line_and_several_in_columns():
    clock, seconds = Startup(), [1.0, 0.0, 0.5, 0.0, 2.0, 3.0, 0.25]
    clock.cache = "compilation cache: hit, 2.0 s saved"
    assert clock.summary([seconds]) == (
        "start-up 6.8 s: import 1.0, config 0.5, state 2.0, compile 3.0, first step 0.2; "
        "compilation cache: hit, 2.0 s saved"
    )
    table = clock.summary([seconds, [2 * s for s in seconds]]).splitlines()
    assert table[0].split()[:6] == ["start-up", "process", "0", "process", "1", "longest;"]
    assert [line.split()[0] for line in table[1:]] == [
        "import",
        "join",
        "config",
        "data",
        "state",
        "compile",
        "first",
        "total",
    ]
    assert table[-1].split() == ["total", "6.8", "s", "13.5", "s", "13.5", "s"]


@pytest.mark.parametrize(
    ("before", "counts", "expected"),
    [
        ([], MISS, "miss, the first program"),
        ([PARTS | {"devices": "4 x cpu", "program": "y"}], MISS, "miss, devices was '4 x cpu' in the closest entry"),
        ([PARTS | {"jax": "0", "model": "b", "program": "y"}, PARTS | {"program": "y"}], MISS, "differs in its code"),
        ([PARTS], MISS, "its entry is gone"),
        ([PARTS], Counter(compile_requests_use_cache=1, cache_hits=1, compile_time_saved_sec=2), "hit, 2.0 s saved"),
        ([PARTS], Counter(), "not used"),
    ],
)
def test_a_miss_says_what_differs_from_the_closest_program(tmp_path, before, counts, expected):
    (tmp_path / PROGRAMS).write_text(json.dumps(before))
    assert expected in log_cache_misses(counts, PARTS, str(tmp_path))
    assert json.loads((tmp_path / PROGRAMS).read_text())[-1] == PARTS
    assert log_cache_misses(counts, PARTS, None).startswith("compilation cache: off")


def test_a_program_is_found_the_second_time(tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    saved = [jax.config.values[name] for name in names]

    def compiled(factor):
        jax.clear_caches()
        lowered = jax.jit(lambda x: jnp.sin(x) * factor).lower(jnp.ones(8))
        compile_watched(lowered, {"model": "m"}, report=True)
        return startup.cache

    try:
        for name, value in zip(names, (str(tmp_path), 0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        assert "miss, the first program" in compiled(2.0)
        assert "hit" in compiled(2.0)
        assert "miss, the program differs in its code" in compiled(3.0)
    finally:
        for name, value in zip(names, saved, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert program_parts("text", {"model": "m"})["program"] != program_parts("other", {"model": "m"})["program"]


def test_a_command_restarts_with_huge_pages_once(monkeypatch):
    restarts = []
    monkeypatch.setattr(launch.cli.os, "execv", lambda program, arguments: restarts.append((program, arguments)))
    monkeypatch.setattr(sys, "argv", ["meshwright", "train"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "launch.cli", "train"])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    launch.cli.use_huge_pages()
    launch.cli.use_huge_pages()  # now they are set
    assert restarts == [(sys.executable, [sys.executable, "-m", "launch.cli", "train"])]
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(sys, "argv", ["meshwright", "--help"])
    launch.cli.use_huge_pages()
    assert len(restarts) == 1


def test_a_kernel_that_fails_on_these_devices_is_not_trained_with(monkeypatch, capsys):
    core = SimpleNamespace(constrain=NoConstraint("tpu"))
    config = SimpleNamespace(data=SimpleNamespace(seq_len=256))

    def held(kernel, difference, **attention):
        core.model = ModelConfig(attention=AttentionConfig(implementation=kernel, **attention))
        monkeypatch.setattr(kernels, "compile_rows", lambda kernel, model, length: None)
        monkeypatch.setattr(kernels, "max_error_vs_reference", lambda kernel, model: difference)
        return verify_attention_kernel(config, core)

    assert held(AttentionImplementation.auto, 0.004) is AttentionImplementation.auto
    assert capsys.readouterr().out == "attention: splash, within 0.4% of reference attention on packed documents\n"
    assert held(AttentionImplementation.auto, 0.4) is AttentionImplementation.xla
    assert "attention: xla; on cpu, splash differs by 40.0% from reference attention" in capsys.readouterr().out
    with pytest.raises(
        ValueError,
        match=r"implementation=splash: on .*, splash differs by 40.0% .*; set model.attention.implementation",
    ):
        held(AttentionImplementation.splash, 0.4)
    assert (
        held(AttentionImplementation.auto, 0.4, mask=AttentionMask.prefix) is AttentionImplementation.auto
    )  # which is plain attention there
    assert "the platform's kernel does not support model.attention.mask=prefix" in capsys.readouterr().out
    monkeypatch.undo()
    assert verify_attention_kernel(config, core) is AttentionImplementation.auto
    core.model = ModelConfig(
        attention=AttentionConfig(3, 2, implementation=AttentionImplementation.auto)
    )  # raises when it is traced
    assert verify_attention_kernel(config, core) is AttentionImplementation.xla
    assert "splash does not compile" in capsys.readouterr().out
    core.constrain = NoConstraint("cpu")
    assert verify_attention_kernel(config, core) is AttentionImplementation.auto and capsys.readouterr().out == ""
