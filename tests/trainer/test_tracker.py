"""Trackers: logged values are read back from every destination."""

import io
import json
import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from launch.plotting import draw_loss, smoothed
from trainer.console import ConsoleTracker, evaluation_lines, rate, status
from trainer.tracker import (
    JsonlTracker,
    NoopTracker,
    TensorboardConfig,
    TrackerConfig,
    Trackers,
    WandbConfig,
    WandbMode,
    build_trackers,
    read_rows,
    without_secrets,
)

STEP = {
    "train/loss": 2.5,
    "train/bits_per_byte": 1.25,
    "perf/tokens_per_second": 12345.0,
    "perf/mfu": 0.314,
}


def wandb_records(path: Path) -> Iterator[Any]:
    """Reads the records of a `.wandb` file: LevelDB's log format in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # a header never crosses a block: the rest is padding
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def read_wandb(folder: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Returns id, config, history and summary of an offline run."""
    (file,) = folder.glob("*.wandb")
    run_id, config, history, summary = "", {}, [], {}
    for record in wandb_records(file):
        updates = []
        if record.HasField("run"):
            run_id = record.run.run_id
            updates = record.run.config.update
        elif record.HasField("config"):
            updates = record.config.update
        elif record.HasField("summary"):
            for item in record.summary.update:
                summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        elif record.HasField("history"):
            items = record.history.item
            history.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
        config |= {item.key: json.loads(item.value_json) for item in updates}
    return run_id, config, history, summary


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_an_offline_wandb_run_says_on_disk_what_was_logged_and_goes_on_under_one_id(tmp_path):
    logged: list[dict[str, float]] = []
    for start, steps in ((0, range(1, 4)), (2, range(3, 6))):  # the second start goes back by a step
        tracker = WandbConfig(mode=WandbMode.offline, tags=["t"]).build(
            run_folder=tmp_path, run_name="hello world/1", start_step=start
        )
        tracker.log_config({"seed": 7, "optimizer": {"learning_rate": 1e-3}, "api_key": "hidden"})
        for step in steps:
            tracker.log(step, {"train/loss": 1.0 / step, "eval/loss": 2.0 / step})
            logged.append({"train/step": step, "train/loss": 1.0 / step, "eval/loss": 2.0 / step})
        tracker.summary({"ended": "done"})
        tracker.finish(0)
    sessions = sorted(tmp_path.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert len(sessions) == 2
    deadline = time.monotonic() + 30
    while True:  # the library's service may still be writing when `finish` has returned
        first, second = (read_wandb(session) for session in sessions)
        if (first[3] and second[3]) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert first[0] == second[0] == (tmp_path / "wandb" / "id").read_text()
    assert first[0].startswith("hello-world-1-") and len(first[0]) <= 64
    assert first[1]["seed"] == 7 and first[1]["optimizer"] == {"learning_rate": 1e-3}
    assert first[1]["api_key"] == "***"
    history = [{k: row[k] for k in logged[0]} for row in [*first[2], *second[2]]]
    assert history == logged
    assert second[3]["ended"] == "done"


class Filling:
    """A file on a full disk: several partial writes, then complete ones."""

    def __init__(self, file, times: int):
        self.file, self.times = file, times

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        self.times -= 1
        return self.file.write(data if self.times < 0 else data[: 10 + self.times])


@pytest.mark.parametrize("times", [1, 2, 3])
def test_rows_wait_for_a_disk_that_takes_them_in_part(tmp_path, times):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(1, {"a": 1.0})
    tracker._file = Filling(tracker._file, times)
    for step in range(2, 7):
        tracker.log(step, {"a": 1.0})
    tracker.finish()
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_jsonl_rows_are_whole_as_soon_as_they_are_logged(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log(1, {"train/loss": 2.0, "train/grad_norm": math.nan})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["step"] == 1 and row["train/loss"] == 2.0 and row["train/grad_norm"] is None
    assert row["time"] > 1.6e9


def test_on_resume_rows_of_steps_that_come_again_and_a_broken_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in range(1, 6):
        tracker.log(step, {"train/loss": float(step)})
    tracker.log(3, {"eval/loss": 9.0})
    tracker.finish()
    before = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('{"step": 6, "train/lo')
    assert len(read_rows(path)) == 6
    tracker = JsonlTracker(path, start_step=3)
    tracker.log(4, {"train/loss": 40.0})
    tracker.finish()
    rows = path.read_text().splitlines()
    assert rows[:4] == [before[0], before[1], before[2], before[5]]
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 3, 4]
    assert read_rows(path)[-1]["train/loss"] == 40.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    tracker = TensorboardConfig().build(run_folder=tmp_path, run_name="r", start_step=0)
    tracker.log_config({"seed": 3})
    for step in (1, 2):
        tracker.log(step, {"train/loss": 0.5 * step})
    tracker.log_text(2, "sample", "def f():")
    tracker.finish()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, at, points, texts = file.read_bytes(), 0, {}, []
    while at < len(data):  # TFRecord: length, its checksum, the record, its checksum
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            if value.HasField("simple_value"):
                points[event.step] = value.simple_value
            else:
                texts.append(value.tensor.string_val[0].decode())
    assert points == {1: 0.5, 2: 1.0}
    assert "def f():" in "".join(texts) and '"seed": 3' in "".join(texts)


class Failing(NoopTracker):
    def __init__(self) -> None:
        self.calls = 0

    def log(self, step, metrics):
        self.calls += 1
        raise ConnectionError("no route to host\nand much more")


def test_a_remote_tracker_that_fails_is_named_once_and_the_others_go_on(tmp_path):
    said: list[str] = []
    failing, jsonl = Failing(), JsonlTracker(tmp_path / "metrics.jsonl")
    trackers = Trackers([jsonl], {"wandb": failing}, say=said.append)
    for step in (1, 2, 3):
        trackers.log(step, {"train/loss": 1.0})
    trackers.finish(1)
    trackers.finish(1)
    assert failing.calls == 1 and len(read_rows(tmp_path / "metrics.jsonl")) == 3
    assert said == ["tracker wandb failed and is disabled: no route to host"]


def test_a_tracker_that_cannot_be_reached_does_not_keep_a_run_from_starting(tmp_path, capsys):
    class Unreachable(TrackerConfig):
        def build(self, *, run_folder, run_name, start_step):
            raise OSError("no account")

    said: list[str] = []
    options: dict[str, Any] = dict(run_folder=tmp_path, run_name="r", say=said.append)
    options["always"] = [ConsoleTracker("r", num_steps=2)]
    trackers = build_trackers({"far": Unreachable()}, **options)
    trackers.log(1, STEP)
    trackers.finish()
    assert said == ["tracker far could not be started and is disabled: no account"]
    assert "step 1/2" in capsys.readouterr().out and read_rows(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="choose trackers with tracker="):
        build_trackers({"none": TrackerConfig()}, **options)


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=200, highlight=False, soft_wrap=True), out


def test_without_a_terminal_there_is_a_line_every_so_many_steps_and_no_colour():
    console, out = plain_console()
    tracker = ConsoleTracker("hello", num_steps=25, log_every=10, console=console)
    for step in range(1, 26):
        tracker.log(step, STEP)
    tracker.log(20, {"eval/a/loss": 2.0, "eval/a/bits_per_byte": 1.1, "eval/loss": 2.0})
    tracker.finish()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25", "20"]
    assert "loss 2.5000  1.250 bits/byte  12.3k tok/s  MFU 31.4%" in lines[0]
    assert lines[1].endswith("left") and not lines[3].endswith("left")
    assert lines[4] == "step 20  validation a:  loss 2.0000  1.100 bits/byte"
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("no_colour", [False, True])
def test_on_a_terminal_there_is_a_bar_with_loss_bits_speed_mfu_and_time_left(monkeypatch, no_colour):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, color_system="standard", highlight=False)
    tracker = ConsoleTracker("hello", num_steps=3, start_step=0, console=console)
    for step in (1, 2, 3):
        tracker._drawn = 0.0  # redraw each step
        tracker.log(step, STEP)
    tracker.log_text(3, "sample", "[def] f(): [red]")  # never read as markup
    tracker.finish()
    text = out.getvalue()
    for part in (
        "hello",
        "3/3",
        "loss 2.500",
        "1.25 bits/byte",
        "12.3k tok/s",
        "MFU 31%",
        "left",
        "[def] f(): [red]",
    ):
        assert part in text
    assert ("\x1b[36m" in text) is not no_colour


def test_rates_have_three_figures():
    assert [rate(v) for v in (842, 999.6, 1234, 12345, 99960, 1.25e6)] == [
        "842",
        "1000",
        "1.23k",
        "12.3k",
        "100k",
        "1.25M",
    ]


def test_a_status_says_only_what_is_known_and_one_source_is_told_once():
    assert status({"train/loss": 1.0}) == "loss 1.0000"
    two = {"eval/a/loss": 1.0, "eval/b/loss": 2.0, "eval/loss": 1.5}
    assert len(evaluation_lines(5, two)) == 3
    assert evaluation_lines(5, {"eval/a/loss": 1.0, "eval/loss": 1.0}) == ["step 5  validation a:  loss 1.0000"]


def test_secrets_are_hidden_by_their_names_and_tokenizers_are_not():
    config = {
        "tokenizer": {"kind": "bytes"},
        "num_tokens": 3,
        "source": [{"auth_token": "x", "path": "y"}],
        "password": None,
    }
    hidden = without_secrets(config)
    assert hidden == {**config, "source": [{"auth_token": "***", "path": "y"}]}


def test_the_configs_are_ones_that_hydra_accepts():
    for cls in (TrackerConfig, WandbConfig, TensorboardConfig):
        assert OmegaConf.structured(cls).kind == cls().kind
    merged = OmegaConf.merge(OmegaConf.structured(WandbConfig), {"mode": "offline"})
    assert OmegaConf.to_object(merged) == WandbConfig(mode=WandbMode.offline)


def test_the_loss_curve_is_a_picture_of_1200_by_700(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not draw_loss(path, tmp_path / "loss.png")
    tracker = JsonlTracker(path)
    for step in range(1, 101):
        loss = 4 * math.exp(-step / 30) + 2
        tracker.log(step, {"train/loss": loss, "train/nll": loss, "train/bits_per_byte": loss / 2})
        if step % 50 == 0:
            tracker.log(step, {"eval/a/loss": loss + 0.1, "eval/b/loss": math.nan, "eval/loss": loss + 0.1})
    tracker.finish()
    assert draw_loss(path, tmp_path / "loss.png", title="hello")
    header = (tmp_path / "loss.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:]) == (1200, 700)
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]


def test_the_smoothed_curve_of_a_constant_is_that_constant():
    import numpy as np

    assert np.allclose(smoothed(np.full(300, 3.0)), 3.0)


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_pictures_and_texts_reach_wandb_and_tensorboard(tmp_path):
    JsonlTracker(tmp_path / "metrics.jsonl").log(1, {"train/loss": 2.0})
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    for config in (WandbConfig(mode=WandbMode.offline), TensorboardConfig()):
        tracker = config.build(run_folder=tmp_path, run_name="r", start_step=0)
        tracker.log_text(1, "sample", "a < b")
        tracker.log_image(1, "loss", tmp_path / "loss.png")
        tracker.summary({"ended": "done"})
        tracker.finish()
    (session,) = tmp_path.glob("wandb/offline-run-*")
    media = sorted(path.suffix for path in (session / "files" / "media").rglob("*.*"))
    assert media == [".html", ".png"]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.stat().st_size > 10_000
