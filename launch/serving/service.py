"""From a request's body to engine requests, and from their events to answers."""

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

COMPLETION_TOKENS = 16  # of /v1/completions where none are asked for, as OpenAI has it
HEARTBEAT = 15.0  # seconds of silence in a stream
PROBE = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Served:
    """What is served, and to whom."""

    name: str
    step: int
    created: int  # seconds since 1970
    tokenizer: Tokenizer
    length: int  # tokens of a prompt and its answer, at most
    timeout: float = 600.0  # seconds of a request, its wait included
    max_request_bytes: int = 1_000_000
    api_key: str | None = None
    loopback: bool = True  # only this machine reaches it


class Job:
    """The answers of one HTTP request while they are written."""

    def __init__(self, service: "Service", tickets: list[Ticket], choices: list[Choice], prompt_tokens: int):
        self.service, self.tickets, self.choices, self.prompt_tokens = service, tickets, choices, prompt_tokens
        self.begun = time.monotonic()
        self.first: dict[int, float] = {}  # when the first token of each choice came
        self.done: set[int] = set()

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    async def pieces(self) -> AsyncIterator[tuple[int, TextDelta] | None]:
        """What is written as it comes, with the index of its choice; None where nothing has come for a while.

        Raises: ApiError after the time limit, and where the engine stops.
        """
        while len(self.done) < len(self.tickets):
            rest = self.begun + self.service.served.timeout - time.monotonic()
            try:
                arrival = await asyncio.wait_for(self.tickets[0].arrivals.get(), min(max(rest, 0), HEARTBEAT))
            except TimeoutError:
                if rest > HEARTBEAT:
                    yield None
                    continue
                raise self._too_late() from None
            if isinstance(arrival.event, Stopped):
                raise ApiError(503, str(arrival.event), code="stopped")
            if arrival.index not in self.done:  # else a stop text has ended it, of which the engine does not know
                yield arrival.index, self._push(arrival.index, arrival.event)

    def release(self) -> None:
        """Frees what is still being written; to be called however the answer ends."""
        for ticket in self.tickets:
            self.service.scheduler.cancel(ticket)
        if len(self.done) < len(self.tickets):
            self.service.metrics.abandoned.inc()
        else:
            self.service.took(time.monotonic() - self.begun)

    def _push(self, index: int, event: Event) -> TextDelta:
        now, metrics, choice = time.monotonic(), self.service.metrics, self.choices[index]
        if index not in self.first:
            self.first[index] = now
            metrics.first_token.observe(now - self.begun)
        piece = choice.push(event)
        metrics.written.inc()
        if piece.finish_reason is not None:
            self.done.add(index)
            self.service.scheduler.cancel(self.tickets[index])
            if choice.num_tokens > 1 and now > self.first[index]:
                metrics.rate.observe((choice.num_tokens - 1) / (now - self.first[index]))
        return piece

    def _too_late(self) -> ApiError:
        return ApiError(
            408,
            f"the answer took more than {self.service.served.timeout:g} seconds; ask for fewer tokens",
            code="timeout",
            headers={"X-Should-Retry": "false"},  # the same would take as long again
        )


class Service:
    """What the routes call."""

    def __init__(self, served: Served, scheduler: Scheduler):
        self.served, self.scheduler, self.metrics = served, scheduler, Metrics(scheduler)
        self.takes_chats = served.tokenizer.chat_template is not None
        self.takes_tools = self.takes_chats and _renders_tools(served.tokenizer)
        after = text_after_turn(served.tokenizer) if self.takes_chats else None
        self._ending = [] if after is None else [after]
        self._seconds = 1.0  # that a request takes, about

    def check_model(self, name: str) -> None:
        """Raises: ApiError where it is not the one that is served."""
        if name != self.served.name:
            why = f"model: there is no model {name!r} here; this server has {self.served.name!r}"
            raise ApiError(404, why, param="model", code="model_not_found")

    def took(self, seconds: float) -> None:
        self._seconds += 0.1 * (seconds - self._seconds)

    async def chat(self, body: ChatBody) -> Job:
        """Raises: ApiError for what cannot be answered, and where the queue is full."""
        self.check_model(body.model)
        prompt = await asyncio.to_thread(self._chat_prompt, body)
        wanted = body.max_completion_tokens or body.max_tokens
        top = (body.top_logprobs or 0) if body.logprobs else 0
        return self._begin(body, [prompt], wanted, top, "messages", self._ending)

    async def complete(self, body: CompletionBody) -> Job:
        """Raises: as `chat`."""
        self.check_model(body.model)
        prompts = await asyncio.to_thread(self._prompts, body)
        return self._begin(body, prompts, body.max_tokens or COMPLETION_TOKENS, body.logprobs or 0, "prompt", [])

    def _begin(
        self, body: Body, prompts: Sequence[list[int]], wanted: int | None, top: int, param: str, ending: list[str]
    ) -> Job:
        requests = []
        for prompt in prompts:
            room = self.served.length - len(prompt)
            if room < 1:
                why = (
                    f"{param}: its {len(prompt)} tokens leave no room to write; prompt and answer may have "
                    f"{self.served.length} tokens"
                )
                raise ApiError(400, why, param=param, code="context_length_exceeded")
            sampling = body.sampling(min(wanted or room, room))
            stop_ids = self.served.tokenizer.stop_ids
            requests += [Request(prompt, sampling, stop_ids, stream, top) for stream in range(body.n or 1)]
        if len(requests) > self.scheduler.capacity:
            why = f"n: {len(requests)} answers at once are more than this server holds, {self.scheduler.capacity}"
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
        made = lambda: Choice(self.served.tokenizer, [*body.stops, *ending], strip=param == "messages")
        return Job(self, tickets, [made() for _ in tickets], sum(map(len, prompts)))

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
            raise ApiError(400, "tools: the chat template of this model does not show tools to it", param="tools")
        self._refuse_special(messages)
        try:
            return chat_ids(self.served.tokenizer, messages, tools=tools)
        except RecursionError:
            raise ApiError(400, "messages: is nested too deeply for the template", param="messages") from None
        except ValueError as error:
            raise from_value_error(error, {"tokenizer": "messages", "chat": "messages"}) from None

    def _refuse_special(self, messages: Sequence[dict]) -> None:
        """A text that stands for a control token would let what is quoted in a message end it and begin another."""
        for i, message in enumerate(messages):
            found = [t for t in self.served.tokenizer.special_tokens if t in (message["content"] or "")]
            if found:
                name = f"messages[{i}].content"
                why = f"{name}: holds {found[0]!r}, which stands for a control token of this model; write it otherwise"
                raise ApiError(400, why, param=name)


def _renders_tools(tokenizer: Tokenizer) -> bool:
    said = [{"role": "user", "content": "Hello"}]
    try:
        return chat_ids(tokenizer, said, tools=[PROBE]) != chat_ids(tokenizer, said)
    except ValueError:
        return False
