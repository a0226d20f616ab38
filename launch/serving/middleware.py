"""What a request has to pass before its body is looked at: the right host, the key, the size. Plain ASGI."""

import asyncio
import hmac
import ipaddress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serving.errors import ApiError

READ_SECONDS = 60.0  # in which a body has to arrive
DRAINED = 64  # times the limit: so much of a body that is too large is read away, for its sender to see the answer


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
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
    """Answers in place of the application where `admit` refuses a request."""

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
        """What the application receives from; None where the client has left. Raises: ApiError."""
        raise NotImplementedError


class HostGuard(Guard):
    """On loopback, other names are refused: a web page could have its own name lead here, and read what we answer."""

    async def admit(self, scope: Scope, receive: Receive) -> Receive:
        host = (_header(scope, b"host") or b"").decode("latin-1")
        name = host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if not is_loopback(name):
            raise ApiError(403, f"host {name!r}: this server answers to localhost only", code="wrong_host")
        return receive


class KeyGuard(Guard):
    """What writes, and what tells of others' use, needs the key; the page and the health do not."""

    def __init__(self, app: ASGIApp, key: str):
        super().__init__(app)
        self.key = key.encode()

    async def admit(self, scope: Scope, receive: Receive) -> Receive:
        if scope["path"].startswith("/v1") or scope["path"] == "/metrics":
            scheme, _, given = (_header(scope, b"authorization") or b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self.key)
            if scheme.lower() != b"bearer" or not right:
                why = "is wrong" if given else "is missing; send the header Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, f"the API key {why}", code="invalid_api_key", headers=headers)
        return receive


class BodyGuard(Guard):
    """Reads a body whole before anybody else does, up to a limit."""

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
        """None where the client leaves. Raises: ApiError for a body that is too large."""
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
