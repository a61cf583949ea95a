"""Serve the metrics of fusion to Prometheus.

    from fusion_detox.integrations.prometheus import serve

    serve(metrics, port=9108)  # http://localhost:9108/metrics

Or register ``FusionCollector(metrics)`` in a registry that your process serves already.
"""

from __future__ import annotations

from collections.abc import Iterator

from fusion_detox.errors import ConfigError, MissingExtraError
from fusion_detox.integrations.metrics import FusionMetrics

try:
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError as _error:
    raise MissingExtraError("prometheus_client", "metrics") from _error

__all__ = ["FusionCollector", "serve"]

_COUNTERS = {
    "tokens": "Rows of all steps, fused or not.",
    "fused_tokens": "Rows with a strength above 0.",
    "held_back_tokens": "Fused rows whose most probable token changed.",
    "strength_sum": "Sum of the strengths of fused rows.",
}


class FusionCollector(Collector):  # type: ignore[misc]
    """Reads ``FusionMetrics`` whenever Prometheus asks.

    Args:
        metrics: The metrics.
    """

    def __init__(self, metrics: FusionMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """The metrics, named ``fusion_detox_…``."""
        found = self._metrics.snapshot()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"fusion_detox_{name}", text, value=getattr(found, name))
        yield HistogramMetricFamily(
            "fusion_detox_step_seconds",
            "Time that fusion adds to a step.",
            [("+Inf" if count == float("inf") else str(count), n) for count, n in found.buckets],
            found.seconds_sum,
        )


def serve(metrics: FusionMetrics, port: int, host: str = "127.0.0.1") -> None:
    """Serve the metrics over HTTP, from a thread that ends with the process.

    Args:
        metrics: The metrics.
        port: The port; 0 takes any free one.
        host: The address; by default, only this machine can connect.

    Raises:
        ConfigError: The port cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(FusionCollector(metrics))
    try:
        start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"the metrics cannot be served at {host}, port {port}: {error}. Choose another port"
        ) from error
