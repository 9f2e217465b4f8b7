"""What is measured (Prometheus), said (logs) and followed (OpenTelemetry, where it is asked for)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from pythonjsonlogger.json import JsonFormatter

from serve.errors import SettingsError
from serve.server.models import Registry
from serve.server.work import Budget

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SAMPLES = tuple(float(2**power) for power in range(11))

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")

log = logging.getLogger("serve-vae")


class Telemetry:
    """The server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        # Else each would have a second series, of when it began. (The library has no types here.)
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.metrics = CollectorRegistry()

        def make(kind: Any, name: str, text: str, labels: Sequence[str] = (), **more: Any) -> Any:
            return kind(f"balancedvae_{name}", text, labels, registry=self.metrics, **more)

        self.requests = make(Counter, "requests", "Requests that ended, by call and status code.", ["method", "code"])
        self.under_way = make(Gauge, "requests_under_way", "Requests that have not ended.")
        self.seconds = make(Histogram, "request_seconds", "From a request to its end.", ["method"], buckets=SECONDS)
        self.stalled = make(
            Counter, "stalled_readers", "Connections ended, since they read nothing while others waited."
        )
        self.samples = make(Counter, "samples", "Samples computed.", ["model"])
        self.batch = make(Histogram, "batch_samples", "Samples in a batch.", ["model"], buckets=SAMPLES)
        self.queue = make(Histogram, "queue_seconds", "From waiting to a batch.", ["model"], buckets=SECONDS)
        self.compute = make(Histogram, "compute_seconds", "A batch on a device.", ["model"], buckets=SECONDS)
        self.encode = make(Histogram, "encode_seconds", "A message's pictures.", ["encoding"], buckets=SECONDS)
        self.loads = make(Counter, "model_loads", "Model files looked at, by what came of it.", ["result"])
        for result in ("loaded", "refused"):
            self.loads.labels(result)  # at zero, so that the first one is seen to be an increase

    def batches(self, model: str) -> BatchMetrics:
        """Return the metrics of one model's batches."""
        return BatchMetrics(self, model)

    def collect_from(self, registry: Registry, budget: Budget) -> None:
        """Also show what is served, and how much of the budget is held, at each scrape."""
        self.metrics.register(State(registry, budget))

    def listen(self, address: str) -> None:
        """Serve /metrics over HTTP, in a thread.

        Raises:
            SettingsError: the address is taken, or not one of this machine's.
        """
        host, _, port = address.rpartition(":")
        try:
            server, _ = start_http_server(int(port), host.strip("[]"), self.metrics)
            server.set_app(_only_metrics(server.get_app()))
        except OSError as error:
            raise SettingsError(f"cannot listen on {address} for metrics: {error.strerror}; choose another") from None
        log.info("metrics at http://%s:%d/metrics", host, server.server_port)


def _only_metrics(answer: Any) -> Any:
    """Return a WSGI application that answers /metrics as another does, which would answer any path so."""

    def application(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        if environment["PATH_INFO"] == "/metrics":
            return answer(environment, start)
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"metrics are at /metrics\n"]

    return application


class BatchMetrics:
    """The metrics of one model's batches."""

    def __init__(self, telemetry: Telemetry, model: str) -> None:
        self._samples = telemetry.samples.labels(model)
        self._batch = telemetry.batch.labels(model)
        self._queue = telemetry.queue.labels(model)
        self._compute = telemetry.compute.labels(model)

    def computed(self, samples: int, waits: Sequence[float], seconds: float) -> None:
        self._samples.inc(samples)
        self._batch.observe(samples)
        self._compute.observe(seconds)
        for wait in waits:
            self._queue.observe(wait)


class State(Collector):
    """Reads what a server holds at the moment of the scrape."""

    def __init__(self, registry: Registry, budget: Budget) -> None:
        self._registry = registry
        self._budget = budget

    def collect(self) -> Iterator[GaugeMetricFamily]:
        models = self._registry.models()
        labels = ["model", "version", "digest", "precision", "arithmetic", "device"]
        info = GaugeMetricFamily("balancedvae_model_info", "1 for each model served.", labels=labels)
        for model in models:
            values = [model.name, str(model.version), model.digest, model.card.precision, model.arithmetic]
            info.add_metric([*values, ",".join(model.devices)], 1)
        yield info
        working = GaugeMetricFamily("balancedvae_model_working", "1 while a device makes it.", labels=labels[:2])
        for model in models:
            working.add_metric([model.name, str(model.version)], float(model.working))
        yield working
        waiting = GaugeMetricFamily("balancedvae_queue_samples", "Samples waiting.", labels=["model", "version"])
        for model in models:
            waiting.add_metric([model.name, str(model.version)], model.batcher.waiting)
        yield waiting
        yield GaugeMetricFamily("balancedvae_held_samples", "Samples under way.", self._budget.held_samples)
        yield GaugeMetricFamily("balancedvae_held_samples_limit", "The most.", self._budget.samples)
        yield GaugeMetricFamily("balancedvae_held_bytes", "Bytes of pictures under way.", self._budget.held_bytes)
        yield GaugeMetricFamily("balancedvae_held_bytes_limit", "The most.", self._budget.bytes)


def log_to_stderr(style: str) -> None:
    """Send the log to stderr: "text", or "json", an object a line with the request's id."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        fields = ["timestamp", "levelname", "name", "message", "request_id"]
        rename = {"levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter(fields, rename_fields=rename, timestamp=True))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    handler.addFilter(_add_request_id)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = REQUEST_ID.get() or None
    return True


Span = Callable[[str, Mapping[str, str]], AbstractContextManager[Any]]


def no_span(method: str, metadata: Mapping[str, str]) -> AbstractContextManager[Any]:
    """Follow nothing."""
    return nullcontext()


def tracing() -> Span:
    """Return what opens OpenTelemetry's span of a call, within its caller's; OTEL_* variables say where spans go.

    OpenTelemetry's own interceptor for grpc.aio takes streams only from asynchronous generators, as of 0.66b2.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        from opentelemetry import propagate, trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SettingsError("--otel needs OpenTelemetry: pip install '.[otel]' in the checkout") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "serve-vae"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer = provider.get_tracer("serve-vae")

    def span(method: str, metadata: Mapping[str, str]) -> AbstractContextManager[Any]:
        if method.startswith("/"):
            service, _, name = method.strip("/").partition("/")
            attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        else:
            verb, _, route = method.partition(" ")
            attributes = {"http.request.method": verb, "http.route": route}
        within = propagate.extract(metadata)
        return tracer.start_as_current_span(
            method.strip("/"), within, trace.SpanKind.SERVER, attributes | {"request.id": REQUEST_ID.get()}
        )

    return span
