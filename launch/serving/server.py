"""Runs the uvicorn server with a graceful shutdown."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from launch.serving.api import create_app
from launch.serving.scheduler import Scheduler
from launch.serving.service import ServerSettings

ERROR_SECONDS = 5  # extra seconds at shutdown to send errors to unfinished requests


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float, started: Callable[[], None]):
        super().__init__(config)
        self.scheduler, self.grace, self.announce = scheduler, grace, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Requests have `grace` seconds to finish; the remaining ones then end with an error.
        end = asyncio.get_running_loop().call_later(self.grace, self.scheduler.stop, "the server is stopping")
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()


def serve(
    served: ServerSettings, scheduler: Scheduler, listening: socket.socket, grace: float, started: Callable[[], None]
) -> None:
    """Serves until SIGTERM or SIGINT, then waits up to `grace` seconds for open requests."""
    config = uvicorn.Config(
        create_app(served, scheduler),
        access_log=False,  # for privacy
        log_level="warning",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=int(grace) + ERROR_SECONDS,
    )
    _Server(config, scheduler, grace, started).run(sockets=[listening])
