"""Writing with a model: an engine that serves many requests at once, each as if it were alone.

A request gets a slot of the cache. Its prompt is read in chunks between the steps of the others; then it writes a token
a step until it ends, and the next request takes its slot. What a request gets depends on its prompt, its settings and
the weights, never on its neighbours: every program has one shape, rows do not mix, and a prefix that is found in
another slot was computed in the same chunks.

Steps are given to the device one ahead of reading their tokens, so that it does not wait for Python.

Shape letters: B slots, L length, V vocab.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.config import AttentionMask, Dispatch, MatmulPrecision, ModelConfig, Position
from models.cpu_workarounds import use_transposed_weights
from models.decode.sampling import History, SamplingConfig, Settings, sample
from models.kv_cache import BLOCK
from models.logical_axes import ShardingConstraint, no_constraint
from models.mixers.base import IDLE, Cache, copy_row
from models.mixers.registry import init_cache, rewindable
from models.transformer import Params, all_stacks, forward_cached, logits, projections, stacks
from models.weight_views import Table, TransposedWeight

MAX_TOP_LOGPROBS = 20


@dataclass
class Request:
    """What to go on from, and how."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    stop_ids: Sequence[int] = ()  # tokens that end it
    stream: int = 0  # requests of one seed are drawn apart by it
    top_logprobs: int = 0  # of how many of the likeliest tokens the log-probabilities are wanted


class Event(NamedTuple):
    """One token of one request."""

    request: int
    token: int
    logprob: float  # under the model itself: temperature 1, no filter
    top: tuple[tuple[int, float], ...]  # the likeliest tokens and their log-probabilities
    finish_reason: str | None  # eos: the token is one of `stop_ids`; length: it is the last that was asked for


@dataclass
class Completion:
    tokens: list[int] = field(default_factory=list)  # written ones, without the prompt and the one that ends them
    logprobs: list[float] = field(default_factory=list)  # of each, under the model itself: temperature 1, no filter
    finish_reason: str = "length"  # length, eos or stop
    end: tuple[int, float] | None = None  # the token that ended it, and its log-probability


# Programs


class EngineState(NamedTuple):
    """What stays on the device between steps."""

    tokens_B: jax.Array  # the last token of each slot
    history: History


class StepInputs(NamedTuple):
    """What a step is told about each slot: [B] i32."""

    positions: np.ndarray  # of the token to be read, or IDLE
    tokens: np.ndarray  # that token, or -1 for the one written last
    index: np.ndarray  # how many tokens its request has written


class _Program(NamedTuple):
    """What compiled programs depend on. Configs are not hashable, so their text stands for them."""

    config: ModelConfig
    constrain: ShardingConstraint
    vocab_size: int

    def __hash__(self) -> int:
        return hash((repr(self.config), self.constrain, self.vocab_size))


class _Jitted(NamedTuple):
    prepare: Callable[..., Params]
    empty: Callable[..., tuple[Cache, EngineState]]
    turn: Callable[..., Any]
    fill: Callable[..., Cache]
    copy: Callable[..., Cache]
    remember: Callable[..., EngineState]


@lru_cache(maxsize=32)
def _programs(program: _Program) -> _Jitted:
    """Jitted, and kept from one engine to the next: training samples again and again."""
    config, constrain, vocab_size = program
    read = partial(forward_cached, config=config, constrain=constrain)

    @partial(jax.jit, donate_argnums=(1, 2), static_argnums=5)
    def turn(params, cache: Cache, memory: EngineState, settings: Settings, feed: StepInputs, num_top: int):
        """A token for each slot: (cache, memory, (tokens, logprobs, top tokens, their logprobs))."""
        tokens_B = jnp.where(feed.tokens < 0, memory.tokens_B, feed.tokens)
        output, cache = read(params, tokens_B[:, None], feed.positions[:, None], cache)
        x_BV = logits(output)[:, 0]
        if vocab_size < x_BV.shape[1]:
            x_BV = jnp.where(jnp.arange(x_BV.shape[1])[None] < vocab_size, x_BV, -jnp.inf)
        history = memory.history
        tokens_B = sample(x_BV, history, settings, feed.index)
        busy_B = jnp.asarray(feed.positions) < IDLE  # the first token of a row may be a while after `remember`
        counts_BV = history.counts_BV.at[jnp.arange(tokens_B.shape[0]), tokens_B].add(busy_B.astype(jnp.int32))
        whole_B = jax.nn.logsumexp(x_BV, axis=-1)
        logprobs_B = jnp.take_along_axis(x_BV, tokens_B[:, None], axis=-1)[:, 0] - whole_B
        top, top_ids = jax.lax.top_k(x_BV, num_top)
        # Every process reads them, so they lie on all devices.
        written = [constrain(x, (None,) * x.ndim) for x in (tokens_B, logprobs_B, top_ids, top - whole_B[:, None])]
        return cache, EngineState(tokens_B, history._replace(counts_BV=counts_BV)), written

    @partial(jax.jit, donate_argnums=1)
    def fill(params, cache: Cache, slot, tokens_1L, start, num_tokens) -> Cache:
        """Reads a piece of a prompt: the first `num_tokens` of `tokens_1L`; the others are padding."""
        at_1L = jnp.arange(tokens_1L.shape[1])[None]
        positions_1L = jnp.where(at_1L < num_tokens, start + at_1L, IDLE)
        shown = num_tokens if config.attention.mask is AttentionMask.prefix else None
        return read(params, tokens_1L, positions_1L, cache, first_row=slot, shown=shown)[1]

    @partial(jax.jit, donate_argnums=0)
    def remember(memory: EngineState, slot, prompt_V) -> EngineState:
        prompt_BV, counts_BV = memory.history
        history = History(prompt_BV.at[slot].set(prompt_V), counts_BV.at[slot].set(0))
        return memory._replace(history=history)

    @partial(jax.jit, static_argnums=(0, 1))
    def empty(rows: int, length: int) -> tuple[Cache, EngineState]:
        shape = (rows, config.vocab_size)
        history = History(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))
        return init_cache(config, rows, length, constrain), EngineState(jnp.zeros(rows, jnp.int32), history)

    copy = jax.jit(copy_row, donate_argnums=0)
    return _Jitted(jax.jit(partial(decoding_params, config=config)), empty, turn, fill, copy, remember)


def decoding_params(params: Params, config: ModelConfig) -> Params:
    """The parameters as decoding reads them: layers apart, matrices in the dtype of the computation.

    That gives the numbers of `forward` over whole rows, which casts the same matrices at every use.
    """
    dtype = jnp.dtype(config.dtype.name)
    rows_first = use_transposed_weights()

    def ready(num_out, path, leaf):
        names = tuple(part.key for part in path)
        if names[-1] not in ("kernel", "embedding", "head") or "router" in names:
            return leaf  # computed with in f32
        leaf = leaf.astype(dtype)
        if not rows_first:
            return leaf
        if names == ("embedding",) and config.tied_embeddings:
            return Table(leaf)
        return TransposedWeight.of(leaf, num_out[names]) if names in num_out else leaf

    layers = []
    for stack in stacks(config):
        num_out = {(*path, "kernel"): projection.num_out for path, projection in projections(config, stack).items()}
        for i in range(stack.stop - stack.start):
            own = jax.tree.map(lambda x, i=i: x[i], params[stack.name])
            layers.append(jax.tree_util.tree_map_with_path(partial(ready, num_out), own))
    of_layers = [stack.name for stack in all_stacks(config)]
    ends = {name: value for name, value in params.items() if name not in of_layers}
    ends = jax.tree_util.tree_map_with_path(partial(ready, {("head",): 1}), ends)
    return {**ends, "layers": tuple(layers)}


# The engine


@dataclass
class _Slot:
    request: int | None = None
    tokens: list[int] = field(default_factory=list)  # whose keys and values are here, or will be once it is filled
    filled: int = 0  # how many of them are here
    asked: Request | None = None
    dispatched: int = 0  # tokens that the device was told to write
    used: int = 0  # when last: the longest unused is given away first


@dataclass
class EngineConfig:
    """How much is kept and done at once."""

    slots: int = 16  # requests that are written at once
    length: int = 4096  # tokens of a prompt and its completion, at most
    chunk: int = 64  # tokens of a prompt that are read at once; a power of two
    chunks_per_step: int = 4  # pieces of prompts that are read between two steps, at most


class Engine:
    """`submit` requests, then `step` while it is `busy`. Every process of a run makes the same calls."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        engine: EngineConfig,
        *,
        vocab_size: int | None = None,
        constrain: ShardingConstraint = no_constraint,
    ):
        """`vocab_size`: tokens that there are, where the model's rows are padded beyond them.

        Raises: ValueError for a model that predicts no next token.
        """
        config.refuse_masks(
            AttentionMask.bidirectional, why="an encoder tells what masks hide, and writes no next token"
        )
        self._whole = (
            config.attention.mask is AttentionMask.prefix
        )  # a prompt sees all of itself, so it is read in one piece
        # Where an expert's room is limited, what a token gets depends on its neighbours.
        experts = replace(config.moe, dispatch=Dispatch.dropless)
        config = replace(config, moe=experts, matmul_precision=MatmulPrecision.full)
        self._reuses = not self._whole and rewindable(config)  # what slots have read of other prompts
        limit = config.max_seq_len if config.position is Position.learned else engine.length
        self.length = min(engine.length, limit)  # of prompt and completion
        self.engine, self.vocab_size = engine, vocab_size or config.vocab_size
        self._jitted = _programs(_Program(config, constrain, self.vocab_size))
        self.params = self._jitted.prepare(params)
        self._cache, self._memory = self._jitted.empty(engine.slots, self.length)
        self._settings = Settings.of(engine.slots)
        self._slots = [_Slot() for _ in range(engine.slots)]
        self._waiting: deque[tuple[int, Request]] = deque()
        self._flying: tuple[list[tuple[int, int]], Any] | None = None  # (slot, request) of a step, and its arrays
        self._next_id = self._clock = 0
        self.reused_tokens = self.prompt_tokens = 0  # found in a slot; in all

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self._flying is not None or any(s.request is not None for s in self._slots)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        return sum(slot.request is not None for slot in self._slots)

    def check(self, request: Request) -> None:
        """Raises: ValueError for settings out of range, an empty prompt, one without room, and for what is no token."""
        request.sampling.validate("")
        n = len(request.prompt)
        if n == 0:
            raise ValueError("prompt='': has no tokens; give at least one character")
        if n >= self.length:
            raise ValueError(
                f"prompt: its {n} tokens leave no room to write; prompt and completion may have {self.length} tokens"
            )
        outside = [t for t in request.prompt if not 0 <= t < self.vocab_size]
        if outside:
            raise ValueError(f"prompt: {outside[0]} is no token; they are 0 to {self.vocab_size - 1}")
        if request.top_logprobs > MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs={request.top_logprobs}: must be at most {MAX_TOP_LOGPROBS}")

    def submit(self, request: Request) -> int:
        """The number by which its events are known. Raises: ValueError as `check`."""
        self.check(request)
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def cancel(self, request: int) -> None:
        """It gets no further events; unknown and finished ones are let be."""
        self._waiting = deque(item for item in self._waiting if item[0] != request)
        for slot in self._slots:
            if slot.request == request:
                self._release(slot)

    def step(self) -> list[Event]:
        """Reads pieces of prompts, has the next token of every slot written, and returns those of the step before."""
        self._admit()
        self._read_prompts()
        flying, self._flying = self._flying, self._dispatch()
        return [] if flying is None else self._receive(*flying)

    # Slots

    def _release(self, slot: _Slot) -> None:
        """Its tokens stay to be found by a request that begins with them."""
        self._clock += 1
        slot.request, slot.asked, slot.used = None, None, self._clock
        slot.tokens = slot.tokens[: slot.filled]

    def _admit(self) -> None:
        """Gives free slots to waiting requests, where a beginning that is there already is not read again."""
        for item in list(self._waiting):
            if all(slot.request is not None for slot in self._slots):
                return
            number, request = item
            prompt = list(request.prompt)
            shared = [self._shared(slot, prompt, slot.filled) for slot in self._slots]
            if max(self._shared(slot, prompt, len(slot.tokens)) for slot in self._slots) > max(shared):
                continue  # another request is reading the same beginning: soon it is there
            best = int(np.argmax(shared))
            free = [i for i, slot in enumerate(self._slots) if slot.request is None]
            found = shared[best]
            target = best if best in free and found else min(free, key=lambda i: self._slots[i].used)
            if found and target != best:
                self._cache = self._jitted.copy(self._cache, np.int32(best), np.int32(target))
            self._waiting.remove(item)
            slot = self._slots[target]
            slot.request, slot.asked, slot.tokens, slot.filled = number, request, prompt, found
            slot.dispatched = 0
            self._settings.put(target, request.sampling, request.stream)
            self.reused_tokens, self.prompt_tokens = self.reused_tokens + found, self.prompt_tokens + len(prompt)
            if request.sampling.penalises:
                seen_V = np.zeros(self._memory.history.prompt_BV.shape[1], bool)
                seen_V[prompt] = True
                self._memory = self._jitted.remember(self._memory, np.int32(target), seen_V)

    def _shared(self, slot: _Slot, prompt: list[int], limit: int) -> int:
        """Tokens at the start that are equal, in whole chunks: those are read alike in every request.

        The last token of a prompt is always read again: what follows it is written from there.
        """
        limit = min(limit, len(prompt) - 1, len(slot.tokens)) if self._reuses else 0
        equal = np.asarray(slot.tokens[:limit]) == np.asarray(prompt[:limit])
        same = limit if equal.all() else int(np.argmin(equal))
        return same // self.engine.chunk * self.engine.chunk

    # Steps

    def _room(self, request: Request) -> int:
        """Tokens that it may write."""
        return min(request.sampling.max_new_tokens, self.length - len(request.prompt))

    def _read_prompts(self) -> None:
        left, chunk = self.engine.chunks_per_step, self.engine.chunk
        for index in sorted(range(len(self._slots)), key=lambda i: self._slots[i].request or 0):  # first come first
            slot = self._slots[index]
            while slot.request is not None and left and slot.filled < len(slot.tokens) - 1 and not slot.dispatched:
                last = len(slot.tokens) - 1  # is read when what follows it is written
                piece = slot.tokens if self._whole else slot.tokens[slot.filled : min(slot.filled + chunk, last)]
                padded = np.zeros((1, _bucket(len(piece), self.length if self._whole else chunk)), np.int32)
                padded[0, : len(piece)] = piece
                args = np.int32(index), padded, np.int32(slot.filled), np.int32(len(piece))
                self._cache = self._jitted.fill(self.params, self._cache, *args)
                slot.filled = last if self._whole else slot.filled + len(piece)
                left -= 1

    def _dispatch(self) -> tuple[list[tuple[int, int]], Any] | None:
        B = len(self._slots)
        feed = StepInputs(np.full(B, IDLE, np.int32), np.full(B, -1, np.int32), np.zeros(B, np.int32))
        rows: list[tuple[int, int]] = []
        num_top = 0
        for i, slot in enumerate(self._slots):
            request = slot.asked
            if request is None or slot.request is None:
                continue
            prompt = len(request.prompt)
            if slot.filled < prompt - 1 or slot.dispatched >= self._room(request):
                continue
            feed.positions[i], feed.index[i] = prompt - 1 + slot.dispatched, slot.dispatched
            if slot.dispatched == 0:
                feed.tokens[i] = request.prompt[-1]
            slot.dispatched += 1
            rows.append((i, slot.request))
            num_top = max(num_top, request.top_logprobs)
        if not rows:
            return None
        num_top = min(MAX_TOP_LOGPROBS, self.vocab_size) if num_top else 0  # two programs, not twenty
        # A copy: the device may read it later, when it has been written over for another request.
        settings = Settings(*(x.copy() for x in self._settings))
        args = self.params, self._cache, self._memory, settings, feed, num_top
        self._cache, self._memory, written = self._jitted.turn(*args)
        return rows, written

    def _receive(self, rows: list[tuple[int, int]], written: Any) -> list[Event]:
        tokens, logprobs, top_ids, top_logprobs = map(np.asarray, written)
        events = []
        for i, number in rows:
            slot = self._slots[i]
            request = slot.asked
            if slot.request != number or request is None:
                continue  # it ended while this step was under way
            token = int(tokens[i])
            # The token before it was read in this step, so that its keys and values are there now.
            slot.filled = len(slot.tokens)
            slot.tokens.append(token)
            reason = None
            if token in request.stop_ids:
                reason = "eos"
            elif len(slot.tokens) - len(request.prompt) >= self._room(request):
                reason = "length"
            top = zip(top_ids[i][: request.top_logprobs], top_logprobs[i][: request.top_logprobs], strict=True)
            pairs = tuple((int(t), float(p)) for t, p in top)
            events.append(Event(number, token, float(logprobs[i]), pairs, reason))
            if reason is not None:
                self._release(slot)
        return events


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    stop_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    constrain: ShardingConstraint = no_constraint,
    on_token: Callable[[int, int], bool] | None = None,
    max_slots: int = 64,
) -> list[Completion]:
    """Completions of prompts of any lengths.

    `on_token(row, token)` sees every token as it comes (not the one that ends a row) and may return True to stop that
    row: for stop texts and for streaming. Prompt and completion must fit into learned positions.
    Raises: ValueError for an empty prompt, or one that leaves no room.
    """
    longest = max(len(p) for p in prompts)
    length = -(-(longest + sampling.max_new_tokens) // BLOCK) * BLOCK
    if config.position is Position.learned and longest >= config.max_seq_len:
        raise ValueError(f"prompt: {longest} tokens leave no room in model.max_seq_len={config.max_seq_len}")
    chunk = min(_bucket(longest, 512), 64 if jax.default_backend() == "cpu" else 512)
    settings = EngineConfig(min(len(prompts), max_slots), length, chunk, chunks_per_step=max_slots)
    engine = Engine(params, config, settings, vocab_size=vocab_size, constrain=constrain)
    rows = {engine.submit(Request(prompt, sampling, stop_ids, stream=row)): row for row, prompt in enumerate(prompts)}
    done = [Completion() for _ in prompts]
    while engine.busy:
        for event in engine.step():
            row = rows[event.request]
            completion = done[row]
            if completion.finish_reason == "stop":
                continue
            if event.finish_reason is not None:
                completion.finish_reason = event.finish_reason
            if event.finish_reason == "eos":
                completion.end = event.token, event.logprob
                continue
            completion.tokens.append(event.token)
            completion.logprobs.append(event.logprob)
            if on_token is not None and on_token(row, event.token):
                completion.finish_reason = "stop"
                engine.cancel(event.request)
    return done


def _bucket(length: int, most: int) -> int:
    """The next power of two, from 16 to `most`: few shapes, few compilations."""
    return min(max(16, 1 << (length - 1).bit_length()), most)
