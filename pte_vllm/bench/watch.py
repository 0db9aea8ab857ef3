"""What a server holds while it is under load: memory of its processes, KV blocks, state slots."""

from __future__ import annotations

import json
import math
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psutil

from pte_vllm.launch import Server, http_get

_BINS = 10
_MIN_GROWTH_MIB = 8.0
_SLOTS_METRIC = "pte_state_slots_in_use "
_NAMES = {"EngineCore": "engine core", "Worker": "worker"}
"""Of processes, by a part of their command line; the rest belongs to the API server."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A trend in memory, over the second half of a run."""

    mib_per_minute: float
    standard_error: float
    minutes: float
    """Of which it is the trend."""

    @property
    def significant(self) -> bool:
        """Whether it is neither noise nor too small to matter."""
        mib = self.mib_per_minute * self.minutes
        return self.mib_per_minute > 3 * self.standard_error and mib > _MIN_GROWTH_MIB


def growth(seconds: Sequence[float], mib: Sequence[float]) -> Growth:
    """A line through the least memory in each of ten parts of the second half: before, caches fill.

    The least, as memory that is used for a while and given back is no growth.
    """
    start = (seconds[0] + seconds[-1]) / 2 if seconds else 0.0
    kept = [(s, m) for s, m in zip(seconds, mib, strict=True) if s >= start]
    minutes = (kept[-1][0] - kept[0][0]) / 60 if kept else 0.0
    size = max(2, math.ceil(len(kept) / _BINS))
    parts = [kept[i : i + size] for i in range(0, len(kept), size)]
    xs = [statistics.fmean(s for s, _ in part) / 60 for part in parts]
    ys = [min(m for _, m in part) for part in parts]
    if len(parts) < 4:
        return Growth(mib_per_minute=0.0, standard_error=math.inf, minutes=minutes)
    slope, offset = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(xs)
    residual = math.fsum((y - offset - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    spread = math.fsum((x - mean) ** 2 for x in xs)
    error = math.sqrt(residual / (len(xs) - 2) / spread)
    return Growth(mib_per_minute=slope, standard_error=error, minutes=minutes)


@dataclass(kw_only=True)
class Series:
    """Samples; `resident_mib` by process."""

    seconds: list[float] = field(default_factory=list)
    resident_mib: dict[str, list[float]] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    """In use, of the pool."""
    slots: list[int] = field(default_factory=list)
    """Thought states of running sequences."""


class Watch:
    """Samples a server from a thread for the length of the block.

    Args:
        server: a running one.
        interval_s: from sample to sample.
    """

    def __init__(self, server: Server, *, interval_s: float) -> None:
        self.series = Series()
        self.failure: Exception | None = None
        """Why it ended early."""
        self._server, self._interval_s = server, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            while not self._stop.wait(self._interval_s):
                blocks, slots, _ = held(self._server.url)
                resident = resident_mib(self._server.pid)
                self.series.seconds.append(time.monotonic() - began)
                self.series.blocks.append(blocks)
                self.series.slots.append(slots)
                for name, mib in resident.items():
                    self.series.resident_mib.setdefault(name, []).append(mib)
        except (OSError, psutil.Error) as error:
            self.failure = error


def held(url: str) -> tuple[int, int, int]:
    """KV blocks and state slots in use, and requests that run."""
    report = json.loads(http_get(f"{url}/pte/v1/requests", timeout_s=60.0))
    lines = http_get(f"{url}/metrics", timeout_s=60.0).decode().splitlines()
    slots = sum(float(line.split()[-1]) for line in lines if line.startswith(_SLOTS_METRIC))
    return report["usable_blocks"] - report["free_blocks"], int(slots), len(report["running"])


def resident_mib(pid: int) -> dict[str, float]:
    """Resident memory of a server's processes, shared pages counted in each."""
    root = psutil.Process(pid)
    found = {"API server": 0.0, **dict.fromkeys(_NAMES.values(), 0.0)}
    for process in (root, *root.children(recursive=True)):
        line = " ".join(process.cmdline())
        name = next((name for part, name in _NAMES.items() if part in line), "API server")
        found[name] += process.memory_info().rss / 2**20
    return {name: mib for name, mib in found.items() if mib}
