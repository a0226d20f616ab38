"""`meshwright serve run=NAME`: a run behind OpenAI's HTTP interface, and a page to chat with it."""

import os
import signal
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax

from configs.schema import RunConfig
from configs.tasks import ServeConfig
from launch import exit_codes
from launch.build import log
from launch.load_run import SavedRun, open_writer
from models.decode.engine import Engine, EngineConfig, Request
from models.decode.sampling import SamplingConfig

if TYPE_CHECKING:  # only this task pays for the server's packages
    from launch.serving.scheduler import Scheduler
    from launch.serving.service import Served

LONGEST = 4096  # tokens of a slot where none are asked for: beyond it a cache costs memory that few use


def run(config: RunConfig, overrides: list[str]) -> int:
    """Serves until SIGTERM or SIGINT: 0 then, 1 where the engine has failed.

    Raises: ValueError for settings that are wrong or unsafe, without the extra, and for more than one process.
    """
    task = config.task
    assert isinstance(task, ServeConfig)
    key = check(task, os.environ)
    try:
        from launch.serving.middleware import is_loopback
        from launch.serving.scheduler import Scheduler
        from launch.serving.server import serve
        from launch.serving.service import Served
    except ImportError as error:
        raise ValueError(f"serve: needs the extra ({error.name} is missing): pip install -e '.[serve]'") from None
    loopback = is_loopback(task.host)
    if not loopback and key is None:
        raise ValueError(
            f"task.host={task.host}: others could reach the server, so it needs a key: put one into an environment "
            "variable and name it, task.api_key_env=VARIABLE; or stay on this machine with task.host=127.0.0.1"
        )
    listening = listen(task.host, task.port)
    try:
        saved = open_writer(config, overrides)
        engine = make_engine(saved, task)
        served = Served(
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
        # uvicorn raises again the signal that it ended with: then it has done its work.
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
    """The API key, if there is one. Raises: ValueError naming key, value and what would be right."""
    if jax.process_count() > 1:
        raise ValueError(
            f"serve: runs in one process, and this job has {jax.process_count()}: requests come to one of them, and "
            "the others would not know; start it once, on one host with all its devices"
        )
    least = {"port": 0, "max_num_seqs": 1, "max_queue_size": 0, "max_request_bytes": 1000, "shutdown_timeout": 0}
    for name, value in least.items():
        if getattr(task, name) < value:
            raise ValueError(f"task.{name}={getattr(task, name)}: must be at least {value}")
    if task.port > 65535:
        raise ValueError(f"task.port={task.port}: must be at most 65535; 0 takes a free one")
    if not task.timeout > 0:
        raise ValueError(f"task.timeout={task.timeout}: must be above 0, in seconds")
    if task.max_model_len is not None and task.max_model_len < 2:
        raise ValueError(
            f"task.max_model_len={task.max_model_len}: must be at least 2, a prompt and an answer of a token"
        )
    if task.api_key_env is None:
        return None
    key = environ.get(task.api_key_env, "").strip()
    if not key:
        raise ValueError(
            f"task.api_key_env={task.api_key_env}: is the name of an environment variable that holds the key, and "
            "there is none of that name, or it is empty"
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"task.api_key_env={task.api_key_env}: the key must be of printable ASCII, as headers are")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket before the model is read, so that a port in use is known at once. Raises: ValueError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"task.host={host}: {error}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        return made
    except OSError as error:
        made.close()
        raise ValueError(f"task.port={port}: {error.strerror}; take another one, or 0 for a free one") from None


def make_engine(saved: SavedRun, task: ServeConfig) -> Engine:
    """Of the run's weights, with all its programs compiled."""
    model = saved.core.model
    length = task.max_model_len or min(model.max_seq_len, LONGEST)
    if length > model.max_seq_len:
        raise ValueError(
            f"task.max_model_len={length}: longer than model.max_seq_len={model.max_seq_len}, for which the run was made"
        )
    chunk = 64 if jax.default_backend() == "cpu" else 512
    settings = EngineConfig(slots=task.max_num_seqs, length=length, chunk=chunk)
    engine = Engine(
        saved.params(), model, settings, vocab_size=saved.tokenizer.vocab_size, constrain=saved.core.constrain
    )
    log(f"serve: read {saved.folder.name} at step {saved.step}; compiling")
    warm_up(engine)
    return engine


def warm_up(engine: Engine) -> None:
    """Has every program compiled that requests may ask for, so that none of them waits for it."""
    sampling = SamplingConfig(max_new_tokens=4, repetition_penalty=1.1)
    size = 16
    while size <= engine.engine.chunk and size + 1 < engine.length:  # a prompt in one piece of each shape
        engine.submit(Request([0] * (size + 1), sampling, top_logprobs=size == 16))
        size *= 2
        while engine.busy:
            engine.step()
    for first in (1, 1):  # the second one copies what the first one has read
        length = min(engine.engine.chunk + 2, engine.length - 1)
        engine.submit(Request([first] * length, sampling))
    while engine.busy:
        engine.step()
    engine.prompt_tokens = engine.reused_tokens = 0


def announce(
    saved: SavedRun, served: "Served", scheduler: "Scheduler", task: ServeConfig, listening: socket.socket
) -> None:
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    count = sum(x.size for x in jax.tree.leaves(saved.core.abstract.params))
    template = (
        "has a chat template"
        if served.tokenizer.chat_template is not None
        else "has no chat template: it goes on with texts, /v1/chat/completions refuses"
    )
    log(f"serve: {served.name} at step {served.step}, {count / 1e6:.4g}M parameters; {template}")
    log(
        f"serve: {task.max_num_seqs} slots of {served.length} tokens, {task.max_queue_size} more requests may wait; "
        + ("the API key is asked for" if served.api_key is not None else "no API key")
    )
    log(f"serve: {address} (page), {address}/v1 (base URL of clients); Ctrl-C ends it")
