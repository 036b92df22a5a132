"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sgpt.serving.batching import ComputedBatch

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = {"registry": self.registry}
        self.requests = Counter("sgpt_requests", "Requests by endpoint and status.", ["endpoint", "status"], **kept)
        self.latency = Histogram(
            "sgpt_request_seconds", "From a request's first byte to its answer.", ["endpoint"], buckets=SECONDS, **kept
        )
        self.in_flight = Gauge("sgpt_requests_in_flight", "Requests that are worked on or wait.", **kept)
        self.queued_tokens = Gauge("sgpt_queued_tokens", "Tokens that wait to be computed.", **kept)
        self.wait = Histogram(
            "sgpt_queue_seconds", "What a request waited for each of its batches.", ["kind"], buckets=SECONDS, **kept
        )
        self.compute = Histogram(
            "sgpt_batch_seconds", "What computing a batch took.", ["kind"], buckets=SECONDS, **kept
        )
        self.batch_tokens = Histogram("sgpt_batch_tokens", "Tokens of a batch.", ["kind"], buckets=TOKENS, **kept)
        self.batch_items = Histogram(
            "sgpt_batch_items", "Texts of a batch, of any requests.", ["kind"], buckets=ITEMS, **kept
        )
        self.texts = Counter("sgpt_texts", "Texts that were computed.", ["kind"], **kept)
        self.tokens = Counter("sgpt_tokens", "Tokens that were computed.", ["kind"], **kept)
        self.truncated = Counter("sgpt_truncated_texts", "Texts that were cut to the model's limit.", **kept)

    def observe(self, batch: ComputedBatch) -> None:
        """Counts a batch."""
        for wait in batch.waits:
            self.wait.labels(batch.kind).observe(wait)
        self.compute.labels(batch.kind).observe(batch.seconds)
        self.batch_tokens.labels(batch.kind).observe(batch.tokens)
        self.batch_items.labels(batch.kind).observe(batch.items)
        self.texts.labels(batch.kind).inc(batch.items)
        self.tokens.labels(batch.kind).inc(batch.tokens)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
