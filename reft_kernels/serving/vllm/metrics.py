"""Counters of the adapters beside vLLM's own at ``/metrics``.

The engine counts in its process. It is asked when ``/metrics`` is read, before the answer is made.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reft_kernels.serving.vllm.adapter_names import AdapterNames
from reft_kernels.serving.vllm.admission import Admission

PATH = "/metrics"
PATIENCE = 5.0  # seconds that a reading waits for a busy engine
logger = logging.getLogger("vllm.reft_kernels.metrics")
_ENGINE_COUNTERS = {
    "hits": "Weight sets that a step needed and found in a slot",
    "loads": "Weight sets that were copied into a slot",
    "evictions": "Weight sets that lost their slot to another",
}


class AdapterMetrics(Collector):
    """Metrics of one server.

    Args:
        names: the adapters.
        admission: counts requests.
        stats: asks the engine for the counters of its bank.
    """

    def __init__(
        self,
        names: AdapterNames,
        admission: Admission,
        stats: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        self._names, self._admission, self._stats = names, admission, stats
        self.engine: dict[str, Any] = {}

    async def refresh(self) -> None:
        """Ask the engine for its counters. Those of the last time stay if it does not answer."""
        try:
            self.engine = await asyncio.wait_for(self._stats(), PATIENCE)
        except Exception as error:
            logger.warning("counters of the adapters are not fresh: %r", error)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics in Prometheus' form."""
        names, admission = self._names, self._admission
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
            "bank_resident": ("Slots that hold a weight set", self.engine.get("resident", 0)),
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


def register(metrics: AdapterMetrics) -> AdapterMetrics:
    """Add metrics to Prometheus' registry, which vLLM's ``/metrics`` shows, and return them."""
    REGISTRY.register(metrics)
    return metrics
