"""Runs the engine in a separate thread and schedules requests from an asyncio event loop.

The engine is not thread-safe, and its steps must not block the event loop. A thread therefore owns the engine: between
steps it takes commands from a queue, and it passes events to the loop. Everything in this module except `_Worker` runs
on the event loop.
"""

import asyncio
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from models.decode.engine import Event, Request


class EngineLike(Protocol):
    """The part of the interface of `models.decode.engine.Engine` used here."""

    reused_tokens: int
    prompt_tokens: int

    @property
    def busy(self) -> bool: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_active(self) -> int: ...
    def check(self, request: Request) -> None: ...
    def submit(self, request: Request) -> int: ...
    def cancel(self, request: int) -> None: ...
    def step(self) -> list[Event]: ...


class QueueFull(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The engine has failed or is shutting down; the message holds the reason."""


class Arrival(NamedTuple):
    """An item of a request's queue: an event of one of its tickets, or the reason why generation stopped."""

    index: int
    event: Event | Stopped


@dataclass(eq=False)
class Ticket:
    """One engine request. Those of one HTTP request share `arrivals`."""

    index: int  # among them
    request: Request
    arrivals: "asyncio.Queue[Arrival]"
    open: bool = True  # may receive more events


class _Worker:
    """Runs in the engine thread: owns the engine and maps its requests to tickets."""

    def __init__(self, engine: EngineLike, deliver: Callable[[list[tuple[Ticket, Event]]], None]):
        self.engine, self.deliver = engine, deliver
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.tickets: dict[int, Ticket] = {}
        self.numbers: dict[Ticket, int] = {}

    def run(self) -> None:
        """Runs until it receives the command None."""
        while True:
            try:  # blocks for a command if the engine is idle
                command = self.commands.get(block=not self.engine.busy)
            except queue.Empty:
                events = self.engine.step()
                if events:
                    self.deliver([self._owned(event) for event in events])
                continue
            if command is None:
                return
            command()

    def submit(self, ticket: Ticket) -> None:
        number = self.engine.submit(ticket.request)
        self.tickets[number], self.numbers[ticket] = ticket, number

    def cancel(self, ticket: Ticket) -> None:
        number = self.numbers.pop(ticket, None)  # None: already finished
        if number is not None:
            del self.tickets[number]
            self.engine.cancel(number)

    def _owned(self, event: Event) -> tuple[Ticket, Event]:
        ticket = self.tickets[event.request]
        if event.finish_reason is not None:
            del self.tickets[event.request], self.numbers[ticket]
        return ticket, event


class Scheduler:
    """Schedules requests on the engine thread.

    Usage: `start` on the event loop, `submit` requests, read the arrivals of their tickets, and `cancel` unfinished
    tickets.
    """

    def __init__(self, engine: EngineLike, *, slots: int, max_queue: int):
        """`max_queue`: maximum number of requests waiting in addition to the `slots` in progress."""
        self.engine, self.slots, self.capacity = engine, slots, slots + max_queue
        self.failure: Stopped | None = None  # why no more requests are accepted
        self.failed = False  # the engine has failed
        self._open: set[Ticket] = set()

    def start(self) -> None:
        """Begins to serve. Called on the loop, once."""
        loop = asyncio.get_running_loop()

        def on_loop(callback: Callable[..., None], *args: object) -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(callback, *args)

        worker = self._worker = _Worker(self.engine, lambda events: on_loop(self._deliver, events))

        def run() -> None:
            try:
                worker.run()
            except BaseException as error:
                traceback.print_exc()
                on_loop(self._fail, f"the engine has failed ({type(error).__name__}); the server must be restarted")

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> list[Ticket]:
        """Submits all requests or none. Returns one ticket per request; the tickets share a queue of arrivals.

        Raises: ValueError as `Engine.check`; QueueFull; Stopped.
        """
        if self.failure is not None:
            raise self.failure
        for request in requests:
            self.engine.check(request)
        if len(self._open) + len(requests) > self.capacity:
            raise QueueFull
        arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        tickets = [Ticket(i, request, arrivals) for i, request in enumerate(requests)]
        for ticket in tickets:
            self._open.add(ticket)
            self._worker.commands.put(lambda ticket=ticket: self._worker.submit(ticket))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Stops events for the ticket and frees its slot at the next engine step. Ignores finished tickets."""
        if ticket.open:
            self._close(ticket)
            self._worker.commands.put(lambda: self._worker.cancel(ticket))

    def stop(self, reason: str) -> None:
        """Rejects new requests and ends open ones with `reason`."""
        self._end(Stopped(reason))
        self._worker.commands.put(None)

    async def join(self, timeout: float) -> bool:
        """Waits for the engine thread; returns whether it ended within `timeout` seconds."""
        await asyncio.to_thread(self._thread.join, timeout)
        return not self._thread.is_alive()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def _deliver(self, events: list[tuple[Ticket, Event]]) -> None:
        for ticket, event in events:
            if not ticket.open:
                continue  # cancelled during the step
            if event.finish_reason is not None:
                self._close(ticket)
            ticket.arrivals.put_nowait(Arrival(ticket.index, event))

    def _fail(self, reason: str) -> None:
        self.failed = True
        self._end(Stopped(reason))

    def _end(self, failure: Stopped) -> None:
        self.failure = self.failure or failure
        for ticket in list(self._open):
            self._close(ticket)
            ticket.arrivals.put_nowait(Arrival(ticket.index, self.failure))

    def _close(self, ticket: Ticket) -> None:
        ticket.open = False
        self._open.discard(ticket)
