"""HTTP routes: OpenAI-compatible completions, chat and models, the chat page, health and metrics."""

import asyncio
import base64
import hashlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from launch.serving.errors import ApiError, from_validation
from launch.serving.middleware import BodyGuard, HostGuard, KeyGuard
from launch.serving.prometheus_metrics import CLIENT_GONE, MetricsMiddleware
from launch.serving.request_schema import Body, ChatBody, CompletionBody
from launch.serving.responses import DONE, KEEP_ALIVE, Chat, FullText, Shape, Text, sse_event, usage
from launch.serving.scheduler import Scheduler
from launch.serving.service import ActiveRequest, ServerSettings, Service

T = TypeVar("T")
JOIN_SECONDS = 10.0  # timeout for the engine thread; longer than any engine step


def create_app(served: ServerSettings, scheduler: Scheduler) -> FastAPI:
    """Returns the application, whose lifespan starts and stops the scheduler."""
    service = Service(served, scheduler)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        scheduler.stop("the server is stopping")
        await scheduler.join(JOIN_SECONDS)

    # FastAPI's documentation pages are disabled, because they load scripts from a CDN.
    app = FastAPI(title="Meshwright", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_errors(app)
    _add_models(app, served, service)
    _add_completions(app, service)
    _add_page_and_monitoring(app, service)
    _complete_schema(app, served.name)
    # The middleware added last runs first.
    app.add_middleware(BodyGuard, limit=served.max_request_bytes)
    if served.api_key is not None:
        app.add_middleware(KeyGuard, key=served.api_key)
    if served.loopback:
        app.add_middleware(HostGuard)
    app.add_middleware(MetricsMiddleware, metrics=service.metrics)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: HttpRequest, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        messages = {
            404: f"{request.url.path} does not exist; see /openapi.json",
            405: f"{request.url.path} does not support {request.method}",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unknown(_: HttpRequest, error: Exception) -> Response:
        return ApiError(500, f"internal error: {type(error).__name__}").response()


def _add_models(app: FastAPI, served: ServerSettings, service: Service) -> None:
    model = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "meshwright",
        # Extensions to OpenAI's fields:
        "step": served.step,
        "context_length": served.length,
        "chat": service.takes_chats,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(model)


def _add_completions(app: FastAPI, service: Service) -> None:
    tokenizer = service.served.tokenizer

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: HttpRequest) -> Response:
        return await _respond(request, body, await service.chat(body), Chat(tokenizer, bool(body.logprobs)))

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, request: HttpRequest) -> Response:
        shape = Text(tokenizer, body.logprobs is not None)
        return await _respond(request, body, await service.complete(body), shape)


def _add_page_and_monitoring(app: FastAPI, service: Service) -> None:
    page = (files("launch") / "page" / "chat.html").read_text()
    headers = page_headers(page)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz")
    async def health() -> Response:
        failure = service.scheduler.failure
        if failure is not None:
            raise ApiError(503, str(failure), code="stopped")
        return JSONResponse({"status": "ok", "model": service.served.name})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _complete_schema(app: FastAPI, model: str) -> None:
    """Adds to /openapi.json what FastAPI cannot infer: error schema, content types and the model name."""
    schema = app.openapi()  # generated once and cached by FastAPI
    schemas = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        del schemas[name]
    text = {"type": "string"}
    fields = {"message": text, "type": text} | {key: {"type": ["string", "null"]} for key in ("param", "code")}
    error = {"type": "object", "properties": fields, "required": list(fields)}
    schemas["Error"] = {"type": "object", "properties": {"error": error}, "required": ["error"]}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    text_types = {"/metrics": {"text/plain": {"schema": text}}}
    for path in ("/v1/chat/completions", "/v1/completions"):
        text_types[path] = {"application/json": {"schema": {}}, "text/event-stream": {}}
    for path, types in text_types.items():
        for operation in schema["paths"][path].values():
            operation["responses"]["200"]["content"] = types
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["4XX"] = {"description": "Error message, with the invalid field", "content": content}
            for parameter in operation.get("parameters", ()):
                parameter["schema"]["enum"] = [model]
    for body in (ChatBody, CompletionBody):
        schemas[body.__name__]["properties"]["model"]["enum"] = [model]


def page_headers(page: str) -> dict[str, str]:
    """Returns security headers that allow only the page's own script and style, and only requests to this server."""

    def allowed(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = {
        "default-src": "'none'",
        "script-src": allowed("script"),
        "style-src": allowed("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


# Responses


async def _respond(request: HttpRequest, body: Body, job: ActiveRequest, shape: Shape) -> Response:
    head = {
        "id": shape.prefix + uuid.uuid4().hex,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": f"{job.service.served.name}@{job.service.served.step}",
    }
    if body.stream:
        return EventStream(_events(job, shape, head, body.include_usage), job.release)
    try:
        content = await unless_gone(request.receive, _full_response(job, shape, head))
        return Response(status_code=CLIENT_GONE) if content is None else JSONResponse(content)
    finally:
        job.release()


async def _full_response(job: ActiveRequest, shape: Shape, head: dict[str, Any]) -> dict[str, Any]:
    texts = [FullText() for _ in job.tickets]
    async for found in job.pieces():
        if found is not None:
            index, piece = found
            texts[index].add(piece)
    choices = [shape.choice(i, text) for i, text in enumerate(texts)]
    used = usage(job.prompt_tokens, job.completion_tokens)
    return head | {"object": shape.full_object, "choices": choices, "usage": used}


async def _events(job: ActiveRequest, shape: Shape, head: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
    head = head | {"object": shape.chunk_object}
    extra = {"usage": None} if include_usage else {}
    try:
        for index in range(len(job.tickets)):
            for choice in shape.opening(index):
                yield sse_event(head | {"choices": [choice]} | extra)
        async for found in job.pieces():
            if found is None:
                yield KEEP_ALIVE
                continue
            for choice in shape.chunks(*found):
                yield sse_event(head | {"choices": [choice]} | extra)
        if include_usage:
            yield sse_event(head | {"choices": [], "usage": usage(job.prompt_tokens, job.completion_tokens)})
        yield DONE
    except ApiError as error:  # the status line is already sent
        yield sse_event(error.body())


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns the result of `work`, or cancels it and returns None if the client disconnects first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Streams server-sent events. Always calls `release` at the end, even if the stream never started."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], release: Callable[[], Any]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.events, self.release = events, release
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(OSError):  # raised by some servers when the client has disconnected
                await unless_gone(receive, self._send(send))
        finally:
            self.release()

    async def _send(self, send: Callable[[Any], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self.events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
