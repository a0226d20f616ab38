"""Prometheus metrics: request latency, generated tokens and engine load."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serving.scheduler import Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
PATHS = ("/", "/healthz", "/metrics", "/openapi.json", "/v1/models", "/v1/completions", "/v1/chat/completions")
CLIENT_GONE = 499  # status recorded if a client disconnected before the response started


class Metrics:
    """Metrics of one server, with a separate registry."""

    def __init__(self, scheduler: Scheduler):
        self.registry = registry = CollectorRegistry()
        shared = {"registry": registry}
        self.requests = Counter("meshwright_requests", "Completed requests", ["path", "status"], **shared)
        self.seconds = Histogram(
            "meshwright_request_seconds", "Total request latency in seconds", ["path"], buckets=SECONDS, **shared
        )
        self.first_token = Histogram(
            "meshwright_time_to_first_token_seconds",
            "Time to first token in seconds, including time in the queue",
            buckets=SECONDS,
            **shared,
        )
        self.rate = Histogram(
            "meshwright_tokens_per_second",
            "Decoding rate of a choice after its first token",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
            **shared,
        )
        self.written = Counter("meshwright_completion_tokens", "Generated tokens", **shared)
        self.abandoned = Counter("meshwright_cancelled", "Requests that ended before completion", **shared)
        registry.register(_Engine(scheduler))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    """Collects engine metrics on demand: plain integers, updated by the engine thread."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        engine = self.scheduler.engine
        yield GaugeMetricFamily("meshwright_queue_length", "Requests waiting for a slot", engine.num_waiting)
        yield GaugeMetricFamily("meshwright_active_slots", "Slots in use", engine.num_active)
        yield GaugeMetricFamily("meshwright_slots", "Total number of slots", self.scheduler.slots)
        yield GaugeMetricFamily(
            "meshwright_up", "Whether the server accepts requests", float(self.scheduler.failure is None)
        )
        yield CounterMetricFamily("meshwright_prompt_tokens", "Prompt tokens", engine.prompt_tokens)
        yield CounterMetricFamily(
            "meshwright_reused_prompt_tokens", "Prompt tokens reused from the prefix cache", engine.reused_tokens
        )


class MetricsMiddleware:
    """Counts and times every request. Unknown paths share one label, so that clients cannot create labels."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in PATHS else "other"
        status, start = CLIENT_GONE, time.perf_counter()

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, record_status)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
