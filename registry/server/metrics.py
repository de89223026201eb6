"""Prometheus metrics of one application; labels are of a fixed set, never a name that a user wrote."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """What happens, counted."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("t2_registry_requests", "Requests answered.", labels, registry=self._registry)
        self._seconds = Histogram(
            "t2_registry_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._running = Gauge("t2_registry_requests_running", "Requests in work.", registry=self._registry)
        self._uploads = Counter("t2_registry_uploads", "Uploads taken.", registry=self._registry)
        self._uploaded = Counter("t2_registry_uploaded_bytes", "Bytes of these.", registry=self._registry)
        self._downloaded = Counter(
            "t2_registry_downloaded_bytes", "Bytes of content sent by this server.", registry=self._registry
        )

    def began(self) -> None:
        """A request has come."""
        self._running.inc()

    def ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request is answered.

        Args:
            route: the template of its address.
        """
        method = method if method in METHODS else "other"
        self._running.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def uploaded(self, size: int) -> None:
        """An upload was taken."""
        self._uploads.inc()
        self._uploaded.inc(size)

    def downloaded(self, size: int) -> None:
        """Bytes of content were sent."""
        self._downloaded.inc(size)

    def render(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)
