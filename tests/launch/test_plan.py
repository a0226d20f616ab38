"""`meshwright plan`: estimates beside XLA, the collectives of compiled programs, targets, the search."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from hydra import compose, initialize_config_module

from configs.schema import register, to_typed
from launch.cli import run
from launch.planning.estimate import USABLE, estimate
from launch.planning.hardware import HARDWARE, Target, hardware_for, parse_target, topology_shape
from launch.planning.local_shapes import bytes_on_device, shapes_of, with_vocabulary
from launch.planning.search import Free, candidates, offloading, resolve_auto_mesh, search
from launch.planning.xla_compile import collectives, compile_step, memory_from_error
from launch.plotting import draw_plan
from launch.scaling.law import compute_optimal
from trainer.mesh import AXES, abstract_mesh
from trainer.metrics import published_peak

SMALL = ["model=tiny", "model.vocab_size=512", "data.seq_len=64", "data.batch_size=8", "source=[]"]


def config_of(*overrides):
    register()
    with initialize_config_module(config_module="configs", version_base="1.3"):
        return with_vocabulary(to_typed(compose("root", overrides=["task=plan", *SMALL, *overrides])))


def cpus(count):
    return Target(HARDWARE["cpu"], count)


@pytest.mark.parametrize(
    ("text", "kind", "count", "slices"),
    [
        ("v5p-512", "v5p", 256, 1),  # counts cores
        ("v6e-256", "v6e", 256, 1),
        ("v5litepod-16", "v5e", 16, 1),
        ("h100x64", "h100", 64, 1),
        ("4*v5e-256", "v5e", 1024, 4),
        ("cpu", "cpu", 3, 1),
    ],
)
def test_targets_are_named_as_their_makers_do(text, kind, count, slices):
    target = parse_target(text, 3)
    assert (target.hardware.name, target.num_devices, target.num_slices) == (kind, count, slices)


@pytest.mark.parametrize(
    ("text", "said"),
    [("x9-4", "no such hardware"), ("v5p-3", "two per chip"), ("v6e-512", "at most 256"), ("h100-0", "at least one")],
)
def test_targets_that_cannot_be_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_target(text)


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("cpu", "cpu"),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(called, name):
    assert hardware_for(called) is HARDWARE[name]
    assert name == "cpu" or published_peak(called) == HARDWARE[name].flops


@pytest.mark.parametrize(
    ("kind", "count", "shape"),
    [("v5p", 256, (4, 8, 8)), ("v6e", 256, (16, 16)), ("v5e", 8, (2, 4)), ("v5p", 4, (2, 2, 1))],
)
def test_slices_are_as_cubic_as_can_be(kind, count, shape):
    assert topology_shape(HARDWARE[kind], count) == shape


@pytest.mark.parametrize(
    "overrides",
    [
        ["mesh.data=8"],
        ["mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"],
        ["mesh.data=2", "mesh.context=4"],
        ["model=tiny_moe", "mesh.data=1", "mesh.expert=4", "mesh.fsdp=2"],
        ["model.num_layers=4", "mesh.data=1", "mesh.fsdp=4", "mesh.stage=2", "model.pipeline.num_repeats=2"],
    ],
)
def test_arguments_are_those_of_xla_to_the_byte(overrides):
    config = config_of(*overrides)
    found = compile_step(config, cpus(8))
    arguments = shapes_of(config, abstract_mesh(config.mesh, 8)).arguments
    # XLA keeps typed keys in two words, and says nothing of arguments that it does not read.
    assert bytes_on_device(arguments) == pytest.approx(found.argument_bytes, abs=3 * 8 * 64 * 4)
    plan = estimate(config, cpus(8))
    assert plan.memory.total == pytest.approx(found.peak_bytes, rel=0.5)  # so small a model is all odds and ends


def test_activations_that_are_not_kept_are_not_counted():
    options = ["mesh.data=1", "model.num_layers=8", "data.batch_size=32"]  # or else weights are most of it
    peaks = [estimate(config_of(*options, f"model.remat={r}"), cpus(1)).work.peak for r in ("none", "full")]
    assert peaks[1] < 0.7 * peaks[0]


def test_rows_in_pieces_between_layers_are_kept_in_pieces():
    mesh = ["mesh.data=1", "mesh.tensor=4", "model.remat=full", "data.seq_len=256"]
    kept = [
        estimate(config_of(*mesh, f"sharding.residual=[{axes}]"), cpus(4)).memory.activations
        for axes in ("context", "context,tensor")
    ]
    assert kept[1] == pytest.approx(kept[0] / 4, rel=0.05)


def test_what_waits_on_the_host_takes_nothing_of_the_device_but_time():
    options = ["mesh.data=1", "mesh.fsdp=4", "model.remat=full", "data.seq_len=256"]
    here, away = (
        estimate(config_of(*options, f"optimizer.offload_state={more}", f"model.activation_offload=[{name}]"), cpus(4))
        for more, name in (("false", ""), ("true", "layer_input"))
    )
    copied = {t.what: t.bytes for t in away.traffic if t.axis == "host"}
    assert not [t for t in here.traffic if t.axis == "host"]
    moments = copied["optimizer"] / 2  # there and back
    assert away.memory.optimizer == pytest.approx(here.memory.optimizer - moments) and away.memory.optimizer < 100
    borders = 2 * 2 * 256 * 64 * 2  # two layers, two rows of a device, bfloat16
    assert copied["activations"] == 2 * borders
    assert away.memory.activations < here.memory.activations
    assert away.step_seconds > here.step_seconds


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_plan_counts_what_stages_keep_send_and_wait_for(rounds):
    options = ["model.num_layers=8", "model.remat=full", "mesh.data=1", "data.batch_size=32"]
    one = estimate(config_of(*options), cpus(1))
    plan = estimate(config_of(*options, "mesh.stage=4", f"model.pipeline.num_repeats={rounds}"), cpus(4))
    layers = sum(n for part, n in one.parameters.items() if part in ("attention", "mlp"))
    ends = one.parameters["total"] - layers
    assert plan.memory.parameters == pytest.approx(4 * (layers / 4 + ends), rel=0.01)
    sent = {(t.axis, t.kind): t.count for t in plan.traffic}
    turns = 16 * rounds + 3  # four microbatches for each stage
    assert sent["stage", "collective-permute"] == 2 * turns
    assert (("stage", "all-to-all") in sent) == (rounds > 1)
    waiting = 3 / turns
    products = one.compute_seconds / 4 / (1 - waiting)  # of the layers; the ends have no turns to wait for
    assert 0.75 * products < plan.compute_seconds < 1.07 * products  # whole stages are computed anew, to their ends


def test_more_devices_for_keeping_take_less_of_each():
    totals = [
        estimate(config_of("mesh.data=1", f"mesh.fsdp={n}"), cpus(n)).memory for n in (1, 2, 4)
    ]  # fmt: skip
    assert [round(totals[0].optimizer / m.optimizer, 1) for m in totals] == pytest.approx([1, 2, 4], rel=0.05)


def test_collectives_are_found_with_axis_and_turns():
    config = config_of("mesh.data=2", "mesh.tensor=4", "model.num_layers=3")
    found = {(c.axes, c.kind): c for c in compile_step(config, cpus(8)).collectives}
    assert found["tensor", "all-reduce"].count >= 3 * 4  # two forward and two backward in each layer
    assert found["data", "all-reduce"].bytes > 0
    one = config_of("mesh.data=1")
    assert compile_step(one, cpus(1)).collectives == []


def test_groups_of_devices_are_told_apart_in_every_notation():
    sizes = {"stage": 1, "data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 4}
    text = """
HloModule m

ENTRY %main (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %b = bf16[16,2]{1,0} all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %c = f32[8]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  %i = f32[8]{0} all-reduce(%p), replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_2'}, to_apply=%add
  %j = f32[8]{0} all-reduce(%p), replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}, to_apply=%add
  %k = f32[8]{0} all-reduce(%p), replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}
  %l = f32[8]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %d = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %e = f32[8]{0} while(%p), condition=%more, body=%turn, backend_config={"known_trip_count":{"n":"5"}}
  %m = f32[8]{0} while(%p), condition=%less, body=%tpus_turn
}

%less (q: f32[8]) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %o = pred[]{:T(512)} compare(%q, %n), direction=LT
}

%tpus_turn (q: f32[8]) -> f32[8] {
  %r = f32[8]{0} reduce-scatter(%q), replica_groups={{0,4},{1,5},{2,6},{3,7}}
}

%turn (q: f32[8]) -> f32[8] {
  %f = f32[8]{0} conditional(%q), branch_computations={%one, %other}
}

%one (q: f32[8]) -> f32[8] {
  %g = f32[8]{0} all-to-all(%q), replica_groups={{0,4},{1,5},{2,6},{3,7}}
}

%other (q: f32[8]) -> f32[8] {
  %h = f32[8]{0} add(%q, %q)
}
"""
    found = collectives(text, sizes)
    assert [(c.axes, c.kind, c.count, c.bytes) for c in found] == [
        ("data", "all-gather", 1, 64),
        ("data", "all-reduce", 1, 32),
        ("data", "all-to-all", 5, 160),
        ("data", "reduce-scatter", 3, 96),
        ("data+tensor", "all-reduce", 1, 32),
        ("tensor", "all-reduce", 3, 96),
        ("tensor", "collective-permute", 1, 16),
    ]


def test_what_does_not_fit_a_tpu_says_what_it_would_take():
    one = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm."
    other = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (123.84G) exceeds"
    )
    assert memory_from_error(one, 5e9) == 20.5 * 1024**3
    assert memory_from_error(other, 5e9) == 5e9 + 123.84 * 1024**3
    assert memory_from_error("INVALID_ARGUMENT: Used 3G of", 5e9) is None


def test_a_search_finds_what_fits_and_says_the_smallest_where_nothing_does():
    target = Target(HARDWARE["h100"], 16)
    config = config_of("model=llama3_8b", "data.seq_len=2048")
    best = search(config, target, Free(mesh=True, remat=True, batch=True))[0]
    assert best.plan.fits
    assert math.prod(best.plan.mesh.values()) == 16
    worse = config_of("model=llama3_405b", "data.seq_len=8192", "data.batch_size=8")
    assert not search(worse, Target(HARDWARE["l4"], 8), Free())[0].plan.fits


def test_a_search_keeps_on_the_host_what_fits_nowhere_else():
    config = config_of("data.batch_size=1024", "model.num_layers=16")
    alone = Target(HARDWARE["v5e"], 1)
    room = replace(alone.hardware, memory=1.1 * estimate(offloading(config), alone).memory.total / USABLE)
    best = search(config, Target(room, 1), Free(remat=True))[0]
    assert best.plan.fits and best.config.optimizer.offload_state and best.config.model.activation_offload
    assert not search(config, Target(room, 1), Free())[0].plan.fits


def test_stages_are_tried_between_nodes_only():
    config = config_of("model=llama3_8b")
    stages = lambda count: {mesh.stage for mesh in candidates(config, Target(HARDWARE["h100"], count))}
    assert stages(8) == {1} and stages(32) == {1, 2, 4}


def test_an_axis_that_is_left_open_takes_what_remains():
    config = config_of("mesh.data=-1", "mesh.fsdp=4")
    found = search(config, cpus(8), Free(mesh=False, batch=True))
    assert {(c.plan.mesh["data"], c.plan.mesh["fsdp"]) for c in found} == {(2, 4)}


def test_every_mesh_of_a_search_has_all_devices_and_cuts_evenly():
    target, config = Target(HARDWARE["h100"], 48), config_of("model=tiny_moe")
    found = list(candidates(config, target))
    assert found
    for mesh in found:
        assert mesh.stage * mesh.data * mesh.fsdp * mesh.tensor * mesh.expert == 48
        assert config.model.attention.num_kv_heads % mesh.tensor == 0


def test_a_mesh_is_chosen_for_the_devices_that_are_there():
    config, lines = config_of("mesh=auto"), []
    chosen = resolve_auto_mesh(config, config.model, lines.append)
    assert math.prod(getattr(chosen.mesh, axis) for axis in AXES) == jax.device_count()
    assert not chosen.mesh.auto and lines[0].startswith("mesh=auto: ")
    assert chosen.model == config.model and chosen.data == config.data
    plain = config_of()
    assert resolve_auto_mesh(plain, plain.model, lines.append) is plain


def test_chinchilla_would_have_been_trained_so():
    optimum = compute_optimal(5.76e23)  # Hoffmann et al. 2022, table A3: 67 to 73 billion on 1.3 to 1.5 trillion
    assert 55e9 < optimum.parameters < 85e9
    assert optimum.parameters * optimum.tokens * 6 == pytest.approx(5.76e23)


def test_a_picture_is_drawn(tmp_path):
    plan = estimate(config_of("mesh.data=2", "mesh.tensor=4"), cpus(8))
    draw_plan(plan, tmp_path / "plan.png", "a plan")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


PHASES = {
    "pretrain": [],
    "sft": [],
    "dpo": [],
    "kto": [],
    "reward": [],
    "classify": ["data.classes=[a,b]"],
    "embed": [],
    "fim": [],
    "ul2": [],
    "mlm": [],
    "masked_diffusion": [],
    "prefix_lm": [],
    "span_corruption": [],
    "multi_token": ["model.mtp_num_layers=1"],
}


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_is_planned_from_the_command_line(phase, tmp_path, capsys):
    small = [o for o in SMALL if not o.startswith("source")]
    command = ["plan", f"phase={phase}", *small, *PHASES[phase], "mesh.fsdp=8", "mesh.data=1", "format=json"]
    assert run([*command, f"task.output={tmp_path}", f"output_dir={tmp_path}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["memory"]["parameters"] > 0 and found["seconds"]["step"] > 0
    written = list(Path(tmp_path).glob("*.json"))
    assert len(written) == 1 and json.loads(written[0].read_text()) == found


def test_adapters_keep_a_base_and_little_else(tmp_path, capsys):
    command = [
        "plan",
        "phase=sft",
        "adapter=lora",
        *SMALL,
        "mesh.data=1",
        "fake_devices=8",
        "mesh.fsdp=8",
        "format=json",
    ]
    assert run([*command, f"task.output={tmp_path}"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["frozen"] > 0 and memory["optimizer"] < 2.1 * memory["parameters"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["target=x9-4"], "no such hardware"),
        (["target=h100x8", "mesh.data=1", "mesh.tensor=3"], "mesh.tensor=3"),
        (["tokenizer=bytes", "model.vocab_size=0"], "set model.vocab_size"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, said, capsys):
    assert run(["plan", *SMALL, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_target_without_its_plugin_is_said(capsys):
    if jax.devices()[0].platform != "cpu":
        pytest.skip("the plugin is there")
    from importlib.util import find_spec

    if find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed")
    assert run(["plan", *SMALL, "target=v5e-8", "compile=true", "mesh.data=8"]) == 2
    assert "pip install 'meshwright[tpu]'" in capsys.readouterr().err
