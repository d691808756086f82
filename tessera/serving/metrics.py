"""Metrics for Prometheus. Units are seconds and pixels; labels have few values."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tessera.serving.engine import CallReport

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tessera_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"tessera_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"tessera_{name}", text, labels, registry=self.registry, buckets=buckets)

        self.requests = counter("http_requests", "HTTP requests", "method", "route", "status")
        self.request_seconds = histogram("http_request_seconds", "Time to the end of a response", "method", "route")
        self.jobs = counter("jobs", "Jobs that ended", "model", "state")
        self.job_seconds = histogram("job_seconds", "Time from submission to the end of finished jobs", "model")
        self.job_wait_seconds = histogram("job_wait_seconds", "Time from submission to the first step", "model")
        self.jobs_submitted = gauge("jobs_submitted", "Jobs that wait for their first step")
        self.jobs_running = gauge("jobs_running", "Jobs between their first and last step")
        self.queue_pixel_steps = gauge("queue_pixel_steps", "Cost of accepted jobs: images x steps x pixels")
        self.images = counter("images", "Images and clips generated", "model")
        self.call_seconds = histogram("network_call_seconds", "Time of one network call", "model")
        self.call_evaluations = histogram(
            "network_call_evaluations", "Rows evaluated in one network call", "model", buckets=EVALUATIONS
        )
        self.models_loaded = gauge("models_loaded", "Models in memory")
        self.model_load_seconds = histogram("model_load_seconds", "Time to load a model", "model")
        self.ready = gauge("ready", "Whether the server takes requests")

    def call(self, report: "CallReport") -> None:
        self.call_seconds.labels(report.model).observe(report.seconds)
        self.call_evaluations.labels(report.model).observe(report.evaluations)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
