"""The loop that listens: uvicorn, with an end that leaves nobody waiting."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from launch.serving.api import create_app
from launch.serving.scheduler import Scheduler
from launch.serving.service import Served

LAST_WORDS = 5  # seconds in which requests that did not finish in time are told so


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float, started: Callable[[], None]):
        super().__init__(config)
        self.scheduler, self.grace, self.announce = scheduler, grace, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Requests get `grace` seconds to finish; then what is left ends with an error that says why.
        end = asyncio.get_running_loop().call_later(self.grace, self.scheduler.stop, "the server is stopping")
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()


def serve(
    served: Served, scheduler: Scheduler, listening: socket.socket, grace: float, started: Callable[[], None]
) -> None:
    """Returns after SIGTERM or SIGINT, once what was being written is finished, or `grace` seconds are over."""
    config = uvicorn.Config(
        create_app(served, scheduler),
        access_log=False,  # who asks what is nobody else's business
        log_level="warning",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=int(grace) + LAST_WORDS,
    )
    _Server(config, scheduler, grace, started).run(sockets=[listening])
