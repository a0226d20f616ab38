"""`meshwright serve run=NAME`: serves a run with an OpenAI-compatible HTTP API and a chat page."""

import os
import signal
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax

from configs.schema import RunConfig
from configs.tasks import ServeConfig
from launch import exit_codes
from launch.load_run import SavedRun, open_writer
from launch.multihost import log
from models.decode.engine import Engine, EngineConfig, Request
from models.decode.sampling import SamplingConfig

if TYPE_CHECKING:  # the server's packages are imported only by this task
    from launch.serving.scheduler import Scheduler
    from launch.serving.service import ServerSettings

DEFAULT_MAX_LENGTH = 4096  # maximum tokens per slot by default; longer KV caches are rarely used


def run(config: RunConfig, overrides: list[str]) -> int:
    """Serves until SIGTERM or SIGINT; returns 0, or 1 if the engine has failed.

    Raises: ValueError for invalid or unsafe settings, a missing extra, or more than one process.
    """
    task = config.task
    assert isinstance(task, ServeConfig)
    key = check(task, os.environ)
    try:
        from launch.serving.middleware import is_loopback
        from launch.serving.scheduler import Scheduler
        from launch.serving.server import serve
        from launch.serving.service import ServerSettings
    except ImportError as error:
        raise ValueError(f"serve: needs the extra ({error.name} is missing): pip install -e '.[serve]'") from None
    loopback = is_loopback(task.host)
    if not loopback and key is None:
        raise ValueError(
            f"task.host={task.host}: the server is reachable from other machines and needs an API key: set one in an "
            "environment variable, named by task.api_key_env=VARIABLE; or serve locally with task.host=127.0.0.1"
        )
    listening = listen(task.host, task.port)
    try:
        saved = open_writer(config, overrides)
        engine = make_engine(saved, task)
        served = ServerSettings(
            name=saved.folder.name,
            step=saved.step,
            created=int(saved.checkpointer.folder_of(saved.step).stat().st_mtime),
            tokenizer=saved.tokenizer,
            length=engine.length,
            timeout=task.timeout,
            max_request_bytes=task.max_request_bytes,
            api_key=key,
            loopback=loopback,
        )
        scheduler = Scheduler(engine, slots=task.max_num_seqs, max_queue=task.max_queue_size)
        # uvicorn re-raises the signal that stopped it, after its shutdown.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        serve(
            served,
            scheduler,
            listening,
            task.shutdown_timeout,
            lambda: announce(saved, served, scheduler, task, listening),
        )
        return exit_codes.FAILED if scheduler.failed else 0
    finally:
        listening.close()


def check(task: ServeConfig, environ: Mapping[str, str]) -> str | None:
    """Validates the settings and returns the API key, if any. Raises: ValueError naming key, value and fix."""
    if jax.process_count() > 1:
        raise ValueError(
            f"serve: runs in one process, and this job has {jax.process_count()}: requests would reach only one of "
            "them; start one process, on one host with all its devices"
        )
    least = {"port": 0, "max_num_seqs": 1, "max_queue_size": 0, "max_request_bytes": 1000, "shutdown_timeout": 0}
    for name, value in least.items():
        if getattr(task, name) < value:
            raise ValueError(f"task.{name}={getattr(task, name)}: must be at least {value}")
    if task.port > 65535:
        raise ValueError(f"task.port={task.port}: must be at most 65535; 0 selects a free port")
    if not task.timeout > 0:
        raise ValueError(f"task.timeout={task.timeout}: must be above 0, in seconds")
    if task.max_model_len is not None and task.max_model_len < 2:
        raise ValueError(
            f"task.max_model_len={task.max_model_len}: must be at least 2: one prompt token and one output token"
        )
    if task.api_key_env is None:
        return None
    key = environ.get(task.api_key_env, "").strip()
    if not key:
        raise ValueError(
            f"task.api_key_env={task.api_key_env}: names the environment variable with the API key, which is "
            "unset or empty; set it"
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"task.api_key_env={task.api_key_env}: the key must be printable ASCII, as required in HTTP headers"
        )
    return key


def listen(host: str, port: int) -> socket.socket:
    """Binds a socket before the model is loaded, so that a port in use fails at once. Raises: ValueError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listening_socket = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"task.host={host}: {error}") from None
    try:
        listening_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening_socket.bind(address)
        return listening_socket
    except OSError as error:
        listening_socket.close()
        raise ValueError(f"task.port={port}: {error.strerror}; choose another port, or 0 for a free one") from None


def make_engine(saved: SavedRun, task: ServeConfig) -> Engine:
    """Creates the decoding engine and compiles all its programs."""
    model = saved.core.model
    length = task.max_model_len or min(model.max_seq_len, DEFAULT_MAX_LENGTH)
    if length > model.max_seq_len:
        raise ValueError(f"task.max_model_len={length}: exceeds model.max_seq_len={model.max_seq_len} of the run")
    chunk = 64 if jax.default_backend() == "cpu" else 512
    settings = EngineConfig(slots=task.max_num_seqs, length=length, chunk=chunk)
    engine = Engine(
        saved.params(), model, settings, vocab_size=saved.tokenizer.vocab_size, constrain=saved.core.constrain
    )
    log(f"serve: loaded {saved.folder.name} at step {saved.step}; compiling")
    warm_up(engine)
    return engine


def warm_up(engine: Engine) -> None:
    """Compiles every program that requests may need, so that no request waits for compilation."""
    sampling = SamplingConfig(max_new_tokens=4, repetition_penalty=1.1)
    size = 16
    while size <= engine.engine.chunk and size + 1 < engine.length:  # single-chunk prompts of each shape
        engine.submit(Request([0] * (size + 1), sampling, top_logprobs=size == 16))
        size *= 2
        while engine.busy:
            engine.step()
    for first in (1, 1):  # the second request reuses the prefix of the first
        length = min(engine.engine.chunk + 2, engine.length - 1)
        engine.submit(Request([first] * length, sampling))
    while engine.busy:
        engine.step()
    engine.prompt_tokens = engine.reused_tokens = 0


def announce(
    saved: SavedRun, served: "ServerSettings", scheduler: "Scheduler", task: ServeConfig, listening: socket.socket
) -> None:
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    count = sum(x.size for x in jax.tree.leaves(saved.core.abstract.params))
    template = (
        "has a chat template"
        if served.tokenizer.chat_template is not None
        else "no chat template: /v1/completions only, /v1/chat/completions is refused"
    )
    log(f"serve: {served.name} at step {served.step}, {count / 1e6:.4g}M parameters; {template}")
    log(
        f"serve: {task.max_num_seqs} slots of {served.length} tokens, queue of {task.max_queue_size} requests; "
        + ("API key required" if served.api_key is not None else "no API key")
    )
    log(f"serve: {address} (page), {address}/v1 (base URL of clients); press Ctrl-C to stop")
