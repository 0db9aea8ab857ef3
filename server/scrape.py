"""What `/metrics` says of the worker and of the adapters that are served, asked for at a scrape.

Folds are counted in the worker (`pte_vllm/engine/counters.py`). A scrape asks for its totals first,
so nothing runs while nobody looks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import REGISTRY, make_asgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.logger import init_logger
from vllm.v1.metrics.prometheus import get_prometheus_registry

from pte_vllm.engine.counters import RHO_EDGES
from pte_vllm.method.names import RULE_NAMES
from pte_vllm.server.metrics import in_many_processes
from pte_vllm.server.service import Service

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

MIN_INTERVAL_S = 1.0
"""Scrapes that come faster get the totals of the one before."""
PATIENCE_S = 2.0
"""How long a scrape waits for the worker before it shows older totals."""


class ServiceCollector(Collector):
    """Shows the worker's totals, as of the last scrape, and how many adapters are served."""

    def __init__(self) -> None:
        self._service: Service | None = None
        self._totals: dict[str, Any] | None = None
        self._at = float("-inf")
        self._adapters = self._versions = 0
        self._pending: asyncio.Task[None] | None = None

    def watch(self, service: Service) -> None:
        """Ask this service from now on."""
        self._service = service

    async def refresh(self) -> None:
        """Ask the worker for its totals; the old ones stay if it is slow or gone."""
        if self._service is None:
            return
        catalog = self._service.registry.catalog
        versions = [len(catalog.versions(name)) for name in catalog.names()]
        self._adapters, self._versions = len(versions), sum(versions)
        at, _ = self._service.totals.get()
        if self._pending is None and time.monotonic() - at > MIN_INTERVAL_S:
            self._pending = asyncio.create_task(self._ask(self._service))
        if self._pending is not None:
            # One question at a time: a worker that hangs is not asked again.
            await asyncio.wait([self._pending], timeout=PATIENCE_S)
        self._at, self._totals = self._service.totals.get()

    async def _ask(self, service: Service) -> None:
        try:
            if not service.engine.errored:
                asked = time.monotonic()
                service.totals.put(asked, await service.engines.counters())
        except Exception as error:  # a dead engine must not take its metrics along
            logger.warning("/metrics: the worker did not answer: %s", error)
        finally:
            self._pending = None

    def describe(self) -> Iterator[Metric]:
        return iter(())  # else the registry would collect at once, to learn the names

    def collect(self) -> Iterator[Metric]:
        # In a thread of its own, so only what `refresh` left is read.
        if self._service is None:
            return
        yield _gauge("pte_adapters", "Names of pushed adapters", self._adapters)
        yield _gauge(
            "pte_adapter_versions", "Versions of pushed adapters that are served", self._versions
        )
        if self._totals is None:
            return
        totals = self._totals
        yield _gauge(
            "pte_worker_age_seconds",
            "Since the worker last told its totals; grows when it hangs or has died",
            time.monotonic() - self._at,
        )
        folds = CounterMetricFamily(
            "pte_folds",
            "Folds, replays after a preemption included; rule none: nothing was kept",
            labels=["rule"],
        )
        for rule in RULE_NAMES:
            folds.add_metric([rule], totals["folds"].get(rule, 0))
        yield folds
        yield CounterMetricFamily(
            "pte_folded_tokens", "Tokens that folds took out of the cache", totals["folded_tokens"]
        )
        yield CounterMetricFamily(
            "pte_freed_blocks", "KV blocks that folds gave back", totals["freed_blocks"]
        )
        yield _gauge("pte_state_slots", "Thought states there is room for", totals["slots"])
        yield _gauge(
            "pte_state_slots_in_use", "Thought states of running sequences", totals["slots_in_use"]
        )
        edges = [*map(str, RHO_EDGES), "+Inf"]
        yield HistogramMetricFamily(
            "pte_fold_rho_ratio",
            "How far a fold moved the state of a layer: norm of the change over norm of the state",
            buckets=list(zip(edges, accumulate(totals["rho_bins"]), strict=True)),
            sum_value=totals["rho_sum"],
        )


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


COLLECTOR = ServiceCollector()
REGISTRY.register(COLLECTOR)


class RefreshOnScrape:
    """ASGI middleware that asks the worker before `/metrics` answers.

    Of several API servers vLLM's route adds up what prometheus_client's files hold, and knows of no
    collector. So this answers in its place, with both.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._metrics: ASGIApp | None = None
        if in_many_processes():
            registry = get_prometheus_registry()
            registry.register(COLLECTOR)
            self._metrics = make_asgi_app(registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path.rstrip("/") == "/metrics":
                await COLLECTOR.refresh()
                app = self._metrics or app
        await app(scope, receive, send)
