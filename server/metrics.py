"""What the API server counts itself for `/metrics`, in vLLM's own registry of metrics.

What the worker counts is in `scrape`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import REGISTRY, Gauge, Histogram
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

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


Load = Callable[..., Awaitable[ErrorResponse | str]]


async def timed_load(load: Load, *args: Any) -> ErrorResponse | str:
    """Call `OpenAIServingModels.load_lora_adapter` of vLLM, and count and time it."""
    start, outcome = time.monotonic(), "refused"
    try:
        result = await load(*args)
        if not isinstance(result, ErrorResponse):
            outcome = "loaded"
        return result
    finally:
        _loads.labels(outcome).observe(time.monotonic() - start)


def in_many_processes() -> bool:
    """Return whether several API servers count together, in files of prometheus_client."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR") is not None


def delete_adapter_series(engine_name: str) -> None:
    """Delete the series of `vllm:lora_requests_info` that name an adapter which will not come back.

    vLLM adds one for every set of adapters that ever ran together, and keeps it: with a version a
    step, `/metrics` would grow for as long as a trainer runs.
    """
    # The registry has no public way to find a metric by its name.
    gauge = REGISTRY._names_to_collectors.get("vllm:lora_requests_info")
    if not isinstance(gauge, Gauge) or in_many_processes():
        return  # statistics are off, there were no adapters, or files that only grow hold them
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
