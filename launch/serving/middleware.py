"""ASGI middleware that checks the host, API key and body size of requests before they are parsed."""

import asyncio
import hmac
import ipaddress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serving.errors import ApiError

READ_SECONDS = 60.0  # timeout for receiving a body
DRAINED = 64  # an oversized body is read up to this multiple of the limit, so that the client can read the response


def is_loopback(host: str) -> bool:
    """Returns whether `host` is reachable only from this machine."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


class Guard:
    """Responds with the error raised by `admit` instead of calling the application."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                admitted = await self.admit(scope, receive)
            except ApiError as error:
                return await error.response()(scope, receive, send)
            if admitted is None:
                return None
            receive = admitted
        await self.app(scope, receive, send)

    async def admit(self, scope: Scope, receive: Receive) -> Receive | None:
        """Returns the application's `receive`, or None if the client disconnected. Raises: ApiError."""
        raise NotImplementedError


class HostGuard(Guard):
    """Rejects other host names on loopback, which prevents DNS rebinding by web pages."""

    async def admit(self, scope: Scope, receive: Receive) -> Receive:
        host = (_header(scope, b"host") or b"").decode("latin-1")
        name = host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if not is_loopback(name):
            raise ApiError(403, f"host {name!r}: this server accepts only localhost", code="wrong_host")
        return receive


class KeyGuard(Guard):
    """Requires the API key for /v1 and /metrics; the chat page, /healthz and the schema are public."""

    def __init__(self, app: ASGIApp, key: str):
        super().__init__(app)
        self.key = key.encode()

    async def admit(self, scope: Scope, receive: Receive) -> Receive:
        if scope["path"].startswith("/v1") or scope["path"] == "/metrics":
            scheme, _, given = (_header(scope, b"authorization") or b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self.key)
            if scheme.lower() != b"bearer" or not right:
                why = "is invalid" if given else "is missing; send the header Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, f"the API key {why}", code="invalid_api_key", headers=headers)
        return receive


class BodyGuard(Guard):
    """Reads the complete body, up to a size limit, before the application is called."""

    def __init__(self, app: ASGIApp, limit: int):
        super().__init__(app)
        self.limit = limit

    async def admit(self, scope: Scope, receive: Receive) -> Receive | None:
        try:
            async with asyncio.timeout(READ_SECONDS):
                body = await self._read(receive)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {READ_SECONDS:.0f} seconds") from None
        if body is None:
            return None
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        return receive_again

    async def _read(self, receive: Receive) -> bytes | None:
        """Returns the body, or None if the client disconnects. Raises: ApiError if the body is too large."""
        parts: list[bytes] = []
        size, more = 0, True
        while more and size <= self.limit * DRAINED:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= self.limit:
                parts.append(part)
        if size > self.limit:
            raise ApiError(413, f"the body has more than {self.limit} bytes", code="request_too_large")
        return b"".join(parts)
