"""Prometheus metrics of one application; labels are of a fixed set, never a name that a user wrote."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder in which several processes count together; prometheus_client reads it when it is imported."""
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
        self._running = Gauge(
            "t2_registry_requests_running", "Requests in work.", registry=self._registry, multiprocess_mode="livesum"
        )
        self._refused = Counter(
            "t2_registry_connections_refused", "Connections beyond the limit.", registry=self._registry
        )
        self._uploads = Counter("t2_registry_uploads", "Uploads taken.", registry=self._registry)
        self._uploaded = Counter("t2_registry_uploaded_bytes", "Bytes of these.", registry=self._registry)
        self._downloaded = Counter(
            "t2_registry_downloaded_bytes", "Bytes of content sent by this server.", registry=self._registry
        )

    def began(self) -> None:
        """Count a request that has come."""
        self._running.inc()

    def ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that is answered.

        Args:
            route: the template of its address.
        """
        method = method if method in METHODS else "other"
        self._running.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def refused(self) -> None:
        """Count a connection that was refused."""
        self._refused.inc()

    def uploaded(self, size: int) -> None:
        """Count an upload that was taken."""
        self._uploads.inc()
        self._uploaded.inc(size)

    def downloaded(self, size: int) -> None:
        """Count bytes of content that were sent."""
        self._downloaded.inc(size)

    def render(self) -> bytes:
        """Everything, in Prometheus's text format; of all processes of one server together."""
        if SHARED not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
