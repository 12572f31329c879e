"""What a service counts, for Prometheus."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

# The supervisor of several processes sets it: a folder in which they all count, so that any of them can tell it all.
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
_TOKENS = (64, 128, 256, 512, 1024, 1536, 2048, 4096, 8192, 16384, 32768)
_PARTS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


class Metrics:
    """The counts of one process, in a registry of its own.

    Attributes:
        requests: by endpoint and status.
        seconds: from the request to its response, by endpoint; refusals are left out.
        refused: requests answered by a problem document, whoever wrote it, by the name of the problem.
        queue: windows that wait, and texts whose windows are still to be made, as one each.
        batch_tokens, batch_windows, batch_seconds: of each batch.
        work: executed multiply-accumulates of each answer, as a part of the full model's.
        shed: answers at a smaller budget than was asked for.
        dropped: questions whose askers had gone before all of their windows were read.
    """

    def __init__(self) -> None:
        self._registry = one = CollectorRegistry()
        self.requests = Counter(
            "dtbert_requests", "Requests answered, refused or failed", ("endpoint", "status"), registry=one
        )
        self.seconds = Histogram(
            "dtbert_request_seconds", "Time to a response", ("endpoint",), buckets=_SECONDS, registry=one
        )
        self.refused = Counter("dtbert_refused", "Requests answered by a problem", ("problem",), registry=one)
        self.queue = Gauge(
            "dtbert_queue_windows",
            "Windows that wait, and texts without theirs yet",
            registry=one,
            multiprocess_mode="livesum",
        )
        self.batch_tokens = Histogram("dtbert_batch_tokens", "Tokens of a batch", buckets=_TOKENS, registry=one)
        self.batch_windows = Counter("dtbert_batch_windows", "Windows read", registry=one)
        self.batch_seconds = Histogram("dtbert_batch_seconds", "Time of a batch", buckets=_SECONDS, registry=one)
        self.work = Histogram(
            "dtbert_budget_used", "Work of an answer over the full model's", buckets=_PARTS, registry=one
        )
        self.shed = Counter("dtbert_shed", "Answers at a smaller budget than was asked for", registry=one)
        self.dropped = Counter("dtbert_dropped", "Questions whose askers had gone", registry=one)

    def refuse(self, problem: str) -> None:
        """Count a request that is answered by this problem."""
        self.refused.labels(problem).inc()

    def batch(self, tokens: int, windows: int, seconds: float) -> None:
        """Count one batch."""
        self.batch_tokens.observe(tokens)
        self.batch_windows.inc(windows)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """All counts in Prometheus' text format: of all processes of the service where there are several."""
        if SHARED_FOLDER not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
