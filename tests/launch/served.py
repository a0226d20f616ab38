"""Test servers: a tiny model with random weights, or an engine that replays scripted tokens."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import httpx
import jax
import uvicorn

from data.records.chat_encoding import with_template
from data.tokenizers.kinds import Bytes
from data.tokenizers.tokenizer import Tokenizer
from launch.serving.api import create_app
from launch.serving.scheduler import EngineLike, Scheduler
from launch.serving.service import ServerSettings
from models.config import ModelConfig
from models.decode.engine import Engine, EngineConfig, Event, Request
from models.transformer import Params, init_params

LENGTH = 256


def tokenizer() -> Tokenizer:
    return with_template(Bytes(), "plain")


@lru_cache
def model() -> tuple[Params, ModelConfig]:
    config = ModelConfig(vocab_size=264)
    config.dtype = type(config.dtype).float32
    return init_params(config, jax.random.key(0)), config


def engine(slots: int) -> Engine:
    params, config = model()
    settings = EngineConfig(slots=slots, length=LENGTH, chunk=16, chunks_per_step=4)
    return Engine(params, config, settings, vocab_size=tokenizer().vocab_size)


class Scripted:
    """Generates the given tokens for every request, one per step; pauses while `hold` is set."""

    def __init__(self, tokens: Sequence[int], slots: int = 2):
        self.tokens, self.slots = list(tokens), slots
        self.hold, self.broken = threading.Event(), threading.Event()
        self.waiting: list[int] = []
        self.active: dict[int, int] = {}  # tokens written
        self.asked: dict[int, Request] = {}
        self.reused_tokens = self.prompt_tokens = self.count = 0

    busy = property(lambda self: bool(self.waiting or self.active))
    num_waiting = property(lambda self: len(self.waiting))
    num_active = property(lambda self: len(self.active))

    def check(self, request: Request) -> None:
        pass

    def submit(self, request: Request) -> int:
        self.count += 1
        self.waiting.append(self.count)
        self.asked[self.count] = request
        return self.count

    def cancel(self, request: int) -> None:
        self.active.pop(request, None)
        self.waiting = [number for number in self.waiting if number != request]

    def step(self) -> list[Event]:
        while self.waiting and len(self.active) < self.slots:
            self.active[self.waiting.pop(0)] = 0
        if self.broken.is_set():
            raise RuntimeError("the device is gone")
        if self.hold.is_set():
            time.sleep(0.005)
            return []
        events = []
        for number, at in list(self.active.items()):
            token, request = self.tokens[at % len(self.tokens)], self.asked[number]
            self.active[number] = at + 1
            reason = "eos" if token in request.stop_ids else None
            reason = reason or ("length" if at + 1 >= request.sampling.max_new_tokens else None)
            if reason is not None:
                del self.active[number]
            events.append(Event(number, token, -0.5, ((token, -0.5),)[: request.top_logprobs], reason))
        return events


@contextmanager
def serving(engine: EngineLike, slots: int, max_queue: int = 64, **changes: Any) -> Iterator[httpx.Client]:
    """Yields a client of a real server on a free port; `client.scheduler` is the server's scheduler."""
    changes = {"tokenizer": tokenizer(), "length": LENGTH, **changes}
    served = ServerSettings(name="tiny", step=3, created=0, **changes)
    scheduler = Scheduler(engine, slots=slots, max_queue=max_queue)
    config = uvicorn.Config(create_app(served, scheduler), log_level="error", ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=120) as client:
                client.scheduler = scheduler  # type: ignore[attr-defined]
                yield client
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def until(holds: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"condition not met within {seconds} seconds"
        time.sleep(0.01)


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))
