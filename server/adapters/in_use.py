"""Who runs on which version of an adapter, who hears of a new one, and when files are deleted."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pte_vllm.server.adapters.spool import Spool, Version
from pte_vllm.server.engines import Engines
from pte_vllm.server.metrics import delete_adapter_series
from pte_vllm.server.sharing.counts import Counts

GRACE_S = 10.0
"""More than the time between an adapter's last use by name and its first step in the engine."""

Listener = Callable[[Version], None]


class AdapterUse:
    """Knows the rollouts on each version, and versions that were retired but may still be read.

    vLLM may load an adapter's files again in the middle of a step, and would die without them: so
    files of a retired version stay until no request of any route uses it.

    Args:
        engines: those that know what adapters their requests use.
        spool: the files.
        rollouts: counts rollouts and scores by the engine's name of their version.
        on_idle: what is called when the last rollout on some version ends.
    """

    def __init__(
        self, engines: Engines, spool: Spool, rollouts: Counts, on_idle: Callable[[], None]
    ) -> None:
        self._engines = engines
        self._spool = spool
        self._on_idle = on_idle
        self._rollouts = rollouts
        self._retired: list[tuple[float, Version]] = []  # when, by the monotonic clock
        self._listeners: defaultdict[str, set[Listener]] = defaultdict(set)  # by pushed name

    def rollouts(self, engine_name: str) -> int:
        """Return how many rollouts and scores run on a version."""
        return self._rollouts.get(engine_name)

    @contextmanager
    def using(self, engine_name: str | None) -> Iterator[None]:
        """Keep a version's files for the length of the block; None is the base model."""
        if engine_name is None:
            yield
            return
        self._rollouts.add(engine_name, 1)
        try:
            yield
        finally:
            self._rollouts.add(engine_name, -1)
            if not self._rollouts.get(engine_name):
                self._on_idle()

    @contextmanager
    def listening(self, name: str | None, listener: Listener) -> Iterator[None]:
        """Call `listener` with every new version of `name` for the length of the block."""
        if name is None:
            yield
            return
        self._listeners[name].add(listener)
        try:
            yield
        finally:
            self._listeners[name].discard(listener)
            if not self._listeners[name]:
                del self._listeners[name]

    def announce(self, version: Version) -> None:
        """Tell those who listen that there is a new version."""
        for listener in tuple(self._listeners.get(version.name, ())):
            listener(version)

    def retire(self, version: Version) -> None:
        """Have the files of a version deleted once nothing uses them."""
        self._retired.append((time.monotonic(), version))

    async def delete_unused(self) -> bool:
        """Delete files of retired versions that no request, running or waiting, uses.

        Returns:
            Whether files of retired versions are left.

        The worker knows the requests of its last step. One that named the version just before it
        was retired may not be among them yet, hence the time of grace.
        """
        due = [r for r in self._retired if time.monotonic() - r[0] > GRACE_S]
        if not due:
            return bool(self._retired)
        report = await self._engines.requests()
        in_use = {*report["adapters_in_use"], *self._rollouts.keys()}
        self._rollouts.clean()
        for retired in due:
            if retired[1].engine_name not in in_use:
                delete_adapter_series(retired[1].engine_name)
                await asyncio.to_thread(self._spool.delete, retired[1])
                self._retired.remove(retired)
        return bool(self._retired)
