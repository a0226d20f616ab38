"""What Prometheus reads: how long requests take, how much is written, how full the engine is."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serving.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
PATHS = ("/", "/healthz", "/metrics", "/openapi.json", "/v1/models", "/v1/completions", "/v1/chat/completions")
CLIENT_GONE = 499  # the status that is counted where a client left before its answer began


class Metrics:
    """Of one server; each has a registry of its own."""

    def __init__(self, scheduler: Scheduler):
        self.registry = registry = CollectorRegistry()
        made = {"registry": registry}
        self.requests = Counter("meshwright_requests", "Requests answered", ["path", "status"], **made)
        self.seconds = Histogram(
            "meshwright_request_seconds", "From a request to the end of its answer", ["path"], buckets=SECONDS, **made
        )
        self.first_token = Histogram(
            "meshwright_time_to_first_token_seconds",
            "From a request to its first token, the wait in the queue included",
            buckets=SECONDS,
            **made,
        )
        self.rate = Histogram(
            "meshwright_tokens_per_second",
            "Of one answer, after its first token",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
            **made,
        )
        self.written = Counter("meshwright_completion_tokens", "Tokens written", **made)
        self.abandoned = Counter("meshwright_cancelled", "Answers that were not written to their end", **made)
        registry.register(_Engine(scheduler))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    """Read from the engine when they are asked for: plain integers, which another thread may be changing."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        engine = self.scheduler.engine
        yield GaugeMetricFamily("meshwright_queue_length", "Requests that wait for a slot", engine.num_waiting)
        yield GaugeMetricFamily("meshwright_active_slots", "Slots in use", engine.num_active)
        yield GaugeMetricFamily("meshwright_slots", "Slots that there are", self.scheduler.slots)
        yield GaugeMetricFamily("meshwright_up", "Whether requests are taken", float(self.scheduler.failure is None))
        yield CounterMetricFamily("meshwright_prompt_tokens", "Tokens of prompts", engine.prompt_tokens)
        yield CounterMetricFamily(
            "meshwright_reused_prompt_tokens", "Of them, found in the cache and not read again", engine.reused_tokens
        )


class Measured:
    """ASGI: counts and times every request. Unknown paths are one, so that nobody can make up labels."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in PATHS else "other"
        status, begun = CLIENT_GONE, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)
