"""Counters of the adapters beside vLLM's own at ``/metrics``.

The engine counts in its process. It is asked when ``/metrics`` is read, before the answer is made.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from reft_kernels.serving.vllm.endpoints import Server

PATH = "/metrics"
PATIENCE = 1.0  # seconds that a reading waits for a busy engine
logger = logging.getLogger("vllm.reft_kernels.metrics")
_ENGINE_COUNTERS = {
    "hits": "Requests whose adapter was in a slot of the bank",
    "loads": "Adapters copied into a slot of the bank",
    "evictions": "Adapters that lost their slot to another",
}


class AdapterMetrics(Collector):
    """Metrics of one server.

    Args:
        server: the plugin's state.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.engine: dict[str, Any] = {}

    async def refresh(self) -> None:
        """Ask the engine for its counters. Those of the last time stay if it does not answer."""
        try:
            self.engine = await asyncio.wait_for(self._server.calls.stats(), PATIENCE)
        except Exception as error:
            logger.warning("counters of the adapters are not fresh: %r", error)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics in Prometheus' form."""
        names, admission = self._server.names, self._server.admission
        for key, text in _ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"reft:bank_{key}", text, value=self.engine.get(key, 0))
        yield CounterMetricFamily(
            "reft:requests_admitted", "Requests with an adapter", value=admission.admitted
        )
        yield CounterMetricFamily(
            "reft:requests_refused",
            "Requests whose adapter is unknown or cannot be served",
            value=admission.refused,
        )
        running = sum(version.requests for version in [*names, *names.retired])
        gauges = {
            "bank_slots": ("Slots of the bank", self.engine.get("slots", 0)),
            "bank_resident": ("Slots that hold an adapter", self.engine.get("resident", 0)),
            "adapters": ("Adapters that requests can name", len(names)),
            "requests_running": ("Requests in flight with an adapter", running),
        }
        for key, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"reft:{key}", text, value=value)


class FreshMetrics:
    """ASGI middleware that refreshes the engine's counters before ``/metrics`` is answered."""

    def __init__(self, app: Any, state: Any) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == PATH:
            found = getattr(self._state, "reft_metrics", None)
            if found is not None:
                await found.refresh()
        await self._app(scope, receive, send)


def register(server: Server) -> AdapterMetrics:
    """Add a server's metrics to Prometheus' registry, which vLLM's ``/metrics`` shows."""
    metrics = AdapterMetrics(server)
    REGISTRY.register(metrics)
    return metrics
