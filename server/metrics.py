"""What `/metrics` says of PTE, in vLLM's own registry.

Requests and adapters are counted here, in the API server. Folds are counted in the worker
(`pte_vllm/engine/counters.py`); a scrape asks for its totals first, so nothing runs while nobody
looks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.logger import init_logger

from pte_vllm.engine.counters import RHO_EDGES
from pte_vllm.method.names import RULE_NAMES

if TYPE_CHECKING:
    from pte_vllm.server.service import Service

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

MIN_INTERVAL_S = 1.0
"""Scrapes that come faster get the totals of the one before."""
PATIENCE_S = 2.0
"""How long a scrape waits for the worker before it shows older totals."""

_LOAD_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_REQUEST_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)

_loads = Histogram(
    "pte_adapter_load_seconds",
    "Time to load a version of an adapter into the engine, by outcome",
    ["outcome"],
    buckets=_LOAD_EDGES,
)
_in_flight = {
    "rollout": Gauge(
        "pte_rollouts_in_flight",
        "Samples that run or wait, of POST /pte/v1/rollouts",
        multiprocess_mode="livesum",
    ),
    "score": Gauge(
        "pte_scores_in_flight",
        "Sequences that run or wait, of POST /pte/v1/score",
        multiprocess_mode="livesum",
    ),
}
_seconds = {
    "rollout": Histogram(
        "pte_rollout_seconds",
        "Time from request to record of a finished sample",
        buckets=_REQUEST_EDGES,
    ),
    "score": Histogram(
        "pte_score_seconds",
        "Time from request to record of a scored sequence",
        buckets=_REQUEST_EDGES,
    ),
}
for _outcome in ("loaded", "refused"):
    _loads.labels(_outcome)  # there from the start, so that rates have a zero to rise from


async def timed_load(
    models: OpenAIServingModels, body: LoadLoRAAdapterRequest
) -> ErrorResponse | str:
    """`models.load_lora_adapter`, counted and timed."""
    start, outcome = time.monotonic(), "refused"
    try:
        result = await models.load_lora_adapter(body)
        if not isinstance(result, ErrorResponse):
            outcome = "loaded"
        return result
    finally:
        _loads.labels(outcome).observe(time.monotonic() - start)


def forget_adapter(engine_name: str) -> None:
    """Drop the series of `vllm:lora_requests_info` that name an adapter which will not come back.

    vLLM adds one for every set of adapters that ever ran together, and keeps it: with a version a
    step, `/metrics` would grow for as long as a trainer runs.
    """
    # The registry has no public way to find a metric by its name.
    gauge = REGISTRY._names_to_collectors.get("vllm:lora_requests_info")
    if not isinstance(gauge, Gauge):
        return  # statistics are off, or there were no adapters
    for family in gauge.collect():
        for sample in family.samples:
            named = (
                sample.labels["running_lora_adapters"],
                sample.labels["waiting_lora_adapters"],
            )
            if any(engine_name in names.split(",") for names in named):
                gauge.remove_by_labels(sample.labels)


@contextmanager
def counted(kind: str) -> Iterator[None]:
    """Count a sequence, `rollout` or `score`, while it runs, and time it if it finishes."""
    start = time.monotonic()
    with _in_flight[kind].track_inprogress():
        yield
    _seconds[kind].observe(time.monotonic() - start)


class ServiceCollector(Collector):
    """Totals of the worker, as of the last scrape, and adapters that are live."""

    def __init__(self) -> None:
        self._service: Service | None = None
        self._totals: dict[str, Any] | None = None
        self._at = float("-inf")
        self._adapters = self._versions = 0
        self._pending: asyncio.Task[None] | None = None

    def watch(self, service: Service) -> None:
        self._service = service

    async def refresh(self) -> None:
        """Ask the worker for its totals; keeps the old ones if it is slow or gone."""
        if self._service is None:
            return
        registry = self._service.registry
        versions = [len(registry.versions(name)) for name in registry.names()]
        self._adapters, self._versions = len(versions), sum(versions)
        if self._pending is None and time.monotonic() - self._at > MIN_INTERVAL_S:
            self._pending = asyncio.create_task(self._ask(self._service))
        if self._pending is not None:
            # One question at a time: a worker that hangs is not asked again.
            await asyncio.wait([self._pending], timeout=PATIENCE_S)

    async def _ask(self, service: Service) -> None:
        try:
            if not service.engine.errored:
                # All ranks fold alike: one is enough.
                self._totals = (await service.engine.collective_rpc("pte_counters"))[0]
                self._at = time.monotonic()
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
    """ASGI middleware: before `/metrics` answers, the worker is asked."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path.rstrip("/") == "/metrics":
                await COLLECTOR.refresh()
        await self.app(scope, receive, send)
