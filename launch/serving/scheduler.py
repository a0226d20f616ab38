"""The engine in a thread of its own, and requests that come to it from an event loop.

The engine is not thread-safe, and a step of it must not keep the loop from answering. So the thread owns the engine:
it takes commands from a queue between steps, and hands events to the loop, which alone knows tickets. Everything in
this module but `_Worker` runs on the loop.
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
    """What is asked of `models.decode.engine.Engine`."""

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
    """No room for more requests."""


class Stopped(Exception):
    """The engine has failed, or is being shut down; the message says which."""


class Arrival(NamedTuple):
    """What a request's queue gets: a token of one of its tickets, or the reason why there will be none."""

    index: int
    event: Event | Stopped


@dataclass(eq=False)
class Ticket:
    """One engine request. Those of one HTTP request share `arrivals`."""

    index: int  # among them
    request: Request
    arrivals: "asyncio.Queue[Arrival]"
    open: bool = True  # it may get further events


class _Worker:
    """The thread's side: the engine, and which ticket each of its requests belongs to."""

    def __init__(self, engine: EngineLike, deliver: Callable[[list[tuple[Ticket, Event]]], None]):
        self.engine, self.deliver = engine, deliver
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.tickets: dict[int, Ticket] = {}
        self.numbers: dict[Ticket, int] = {}

    def run(self) -> None:
        """Returns once None is among the commands."""
        while True:
            try:  # without work it sleeps until there is a command
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
        number = self.numbers.pop(ticket, None)  # None: it has ended meanwhile
        if number is not None:
            del self.tickets[number]
            self.engine.cancel(number)

    def _owned(self, event: Event) -> tuple[Ticket, Event]:
        ticket = self.tickets[event.request]
        if event.finish_reason is not None:
            del self.tickets[event.request], self.numbers[ticket]
        return ticket, event


class Scheduler:
    """`start` it on the loop, `submit`, read the tickets' arrivals, `cancel` whatever is not read to its end."""

    def __init__(self, engine: EngineLike, *, slots: int, max_queue: int):
        """`max_queue`: how many requests may wait beside the `slots` that are written."""
        self.engine, self.slots, self.capacity = engine, slots, slots + max_queue
        self.failure: Stopped | None = None  # why it takes nothing more
        self.failed = False  # it was the engine
        self._open: set[Ticket] = set()

    def start(self) -> None:
        """Begins to serve. Called on the loop, once."""
        loop = asyncio.get_running_loop()

        def on_loop(callback: Callable[..., None], *args: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
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
        """A ticket for each, in one queue; all of them or none.

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
        """It gets no further events, and its slot is free at the engine's next step. One that has ended is let be."""
        if ticket.open:
            self._close(ticket)
            self._worker.commands.put(lambda: self._worker.cancel(ticket))

    def stop(self, reason: str) -> None:
        """Takes nothing more, and ends with `reason` what there is."""
        self._end(Stopped(reason))
        self._worker.commands.put(None)

    async def join(self, timeout: float) -> bool:
        """Whether the thread has ended within `timeout` seconds."""
        await asyncio.to_thread(self._thread.join, timeout)
        return not self._thread.is_alive()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def _deliver(self, events: list[tuple[Ticket, Event]]) -> None:
        for ticket, event in events:
            if not ticket.open:
                continue  # cancelled while the step was under way
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
