"""Converts request bodies to engine requests, and engine events to completions."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from data.records.chat_encoding import chat_ids, text_after_turn
from data.tokenizers.tokenizer import Tokenizer
from launch.generation import encode_prompt
from launch.serving.errors import ApiError, from_value_error
from launch.serving.prometheus_metrics import Metrics
from launch.serving.request_schema import Body, ChatBody, CompletionBody
from launch.serving.responses import Choice, TextDelta
from launch.serving.scheduler import QueueFull, Scheduler, Stopped, Ticket
from models.decode.engine import Event, Request

COMPLETION_TOKENS = 16  # default max_tokens of /v1/completions, as in OpenAI's API
HEARTBEAT = 15.0  # seconds without output before a keep-alive comment is sent
PROBE = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class ServerSettings:
    """The served model and the server's limits."""

    name: str
    step: int
    created: int  # Unix time in seconds
    tokenizer: Tokenizer
    length: int  # maximum number of tokens of a prompt and its completion
    timeout: float = 600.0  # seconds per request, including time in the queue
    max_request_bytes: int = 1_000_000
    api_key: str | None = None
    loopback: bool = True  # reachable only from this machine


class ActiveRequest:
    """The completions of one HTTP request in progress."""

    def __init__(self, service: "Service", tickets: list[Ticket], choices: list[Choice], prompt_tokens: int):
        self.service, self.tickets, self.choices, self.prompt_tokens = service, tickets, choices, prompt_tokens
        self.started = time.monotonic()
        self.first: dict[int, float] = {}  # arrival time of each choice's first token
        self.done: set[int] = set()

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    async def pieces(self) -> AsyncIterator[tuple[int, TextDelta] | None]:
        """Yields text deltas with the index of their choice, and None after HEARTBEAT seconds without output.

        Raises: ApiError on timeout or if the engine stops.
        """
        while len(self.done) < len(self.tickets):
            remaining = self.started + self.service.served.timeout - time.monotonic()
            try:
                arrival = await asyncio.wait_for(self.tickets[0].arrivals.get(), min(max(remaining, 0), HEARTBEAT))
            except TimeoutError:
                if remaining > HEARTBEAT:
                    yield None
                    continue
                raise self._timeout_error() from None
            if isinstance(arrival.event, Stopped):
                raise ApiError(503, str(arrival.event), code="stopped")
            if arrival.index not in self.done:  # a stop string, unknown to the engine, may have ended the choice
                yield arrival.index, self._push(arrival.index, arrival.event)

    def release(self) -> None:
        """Cancels unfinished choices. Must be called at the end of every request."""
        for ticket in self.tickets:
            self.service.scheduler.cancel(ticket)
        if len(self.done) < len(self.tickets):
            self.service.metrics.abandoned.inc()
        else:
            self.service.record_duration(time.monotonic() - self.started)

    def _push(self, index: int, event: Event) -> TextDelta:
        now, metrics, choice = time.monotonic(), self.service.metrics, self.choices[index]
        if index not in self.first:
            self.first[index] = now
            metrics.first_token.observe(now - self.started)
        piece = choice.push(event)
        metrics.written.inc()
        if piece.finish_reason is not None:
            self.done.add(index)
            self.service.scheduler.cancel(self.tickets[index])
            if choice.num_tokens > 1 and now > self.first[index]:
                metrics.rate.observe((choice.num_tokens - 1) / (now - self.first[index]))
        return piece

    def _timeout_error(self) -> ApiError:
        return ApiError(
            408,
            f"the request took longer than {self.service.served.timeout:g} seconds; reduce max_tokens",
            code="timeout",
            headers={"X-Should-Retry": "false"},  # a retry would take just as long
        )


class Service:
    """Validates requests and submits them to the scheduler; called by the routes."""

    def __init__(self, served: ServerSettings, scheduler: Scheduler):
        self.served, self.scheduler, self.metrics = served, scheduler, Metrics(scheduler)
        self.takes_chats = served.tokenizer.chat_template is not None
        self.takes_tools = self.takes_chats and _renders_tools(served.tokenizer)
        after = text_after_turn(served.tokenizer) if self.takes_chats else None
        self._ending = [] if after is None else [after]
        self._seconds = 1.0  # moving average of request durations

    def check_model(self, name: str) -> None:
        """Raises ApiError if `name` is not the served model."""
        if name != self.served.name:
            why = f"model: {name!r} does not exist; this server provides {self.served.name!r}"
            raise ApiError(404, why, param="model", code="model_not_found")

    def record_duration(self, seconds: float) -> None:
        self._seconds += 0.1 * (seconds - self._seconds)

    async def chat(self, body: ChatBody) -> ActiveRequest:
        """Starts a chat completion. Raises: ApiError if the request is invalid or the queue is full."""
        self.check_model(body.model)
        prompt = await asyncio.to_thread(self._chat_prompt, body)
        max_tokens = body.max_completion_tokens or body.max_tokens
        top = (body.top_logprobs or 0) if body.logprobs else 0
        return self._submit(body, [prompt], max_tokens, top, "messages", self._ending)

    async def complete(self, body: CompletionBody) -> ActiveRequest:
        """Starts a text completion. Raises: ApiError as `chat`."""
        self.check_model(body.model)
        prompts = await asyncio.to_thread(self._prompts, body)
        return self._submit(body, prompts, body.max_tokens or COMPLETION_TOKENS, body.logprobs or 0, "prompt", [])

    def _submit(
        self, body: Body, prompts: Sequence[list[int]], max_tokens: int | None, top: int, param: str, ending: list[str]
    ) -> ActiveRequest:
        requests = []
        for prompt in prompts:
            room = self.served.length - len(prompt)
            if room < 1:
                why = (
                    f"{param}: the prompt has {len(prompt)} tokens and leaves no room for a completion; the context "
                    f"length of prompt and completion is {self.served.length} tokens; shorten the prompt"
                )
                raise ApiError(400, why, param=param, code="context_length_exceeded")
            sampling = body.sampling(min(max_tokens or room, room))
            stop_ids = self.served.tokenizer.stop_ids
            requests += [Request(prompt, sampling, stop_ids, stream, top) for stream in range(body.n or 1)]
        if len(requests) > self.scheduler.capacity:
            why = (
                f"n: {len(requests)} completions in one request exceed the capacity of this server, "
                f"{self.scheduler.capacity}; reduce n or the number of prompts"
            )
            raise ApiError(400, why, param="n")
        try:
            tickets = self.scheduler.submit(requests)
        except ValueError as error:
            raise from_value_error(error, {"prompt": param}) from None
        except QueueFull:
            waiting = self.scheduler.num_open - self.scheduler.slots + 1
            seconds = math.ceil(self._seconds * max(waiting, 1) / self.scheduler.slots)
            raise ApiError(
                429,
                "the queue is full; try again later",
                code="queue_full",
                headers={"Retry-After": str(min(max(seconds, 1), 60))},
            ) from None
        except Stopped as error:
            raise ApiError(503, str(error), code="stopped") from None
        new_choice = lambda: Choice(self.served.tokenizer, [*body.stops, *ending], strip=param == "messages")
        return ActiveRequest(self, tickets, [new_choice() for _ in tickets], sum(map(len, prompts)))

    def _prompts(self, body: CompletionBody) -> list[list[int]]:
        try:
            return [p if isinstance(p, list) else encode_prompt(self.served.tokenizer, p) for p in body.prompts]
        except ValueError as error:
            raise from_value_error(error, {"tokenizer": "prompt"}) from None

    def _chat_prompt(self, body: ChatBody) -> list[int]:
        if not self.takes_chats:
            why = f"messages: the model {self.served.name!r} has no chat template; use /v1/completions"
            raise ApiError(400, why, param="messages", code="no_chat_template")
        messages = [message.plain() for message in body.messages]
        tools = None if body.tool_choice == "none" else body.tools or None
        if tools and not self.takes_tools:
            raise ApiError(400, "tools: the chat template of this model does not support tools", param="tools")
        self._refuse_special(messages)
        try:
            return chat_ids(self.served.tokenizer, messages, tools=tools)
        except RecursionError:
            raise ApiError(400, "messages: too deeply nested for the chat template", param="messages") from None
        except ValueError as error:
            raise from_value_error(error, {"tokenizer": "messages", "chat": "messages"}) from None

    def _refuse_special(self, messages: Sequence[dict]) -> None:
        """Rejects special tokens in messages, which could otherwise inject message boundaries."""
        for i, message in enumerate(messages):
            found = [t for t in self.served.tokenizer.special_tokens if t in (message["content"] or "")]
            if found:
                name = f"messages[{i}].content"
                why = f"{name}: contains {found[0]!r}, a special token of this model; remove or rewrite it"
                raise ApiError(400, why, param=name)


def _renders_tools(tokenizer: Tokenizer) -> bool:
    messages = [{"role": "user", "content": "Hello"}]
    try:
        return chat_ids(tokenizer, messages, tools=[PROBE]) != chat_ids(tokenizer, messages)
    except ValueError:
        return False
