"""What other API servers of this server do has effects here: new versions, and aborts."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from pte_vllm.server.adapters.catalog import Catalog
from pte_vllm.server.sharing.aborts import Abort, Aborts

logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose level and form it takes

POLL_S = 0.1
PATIENCE_S = 2.0
"""How long a route waits for the others; one of them may be busy."""


class Others:
    """Follows the other API servers from a task; with only one it does nothing.

    Args:
        engine: AsyncLLM. Its `abort` also reaches requests of the others from now on.
        catalog: the served versions.
        aborts: what is to be aborted by whoever runs it; None with only one API server.
        count: how many others there are.
    """

    def __init__(
        self, engine: EngineClient, catalog: Catalog, aborts: Aborts | None, *, count: int
    ) -> None:
        self._engine: Any = engine
        self._catalog, self._aborts, self.count = catalog, aborts, count
        self._following: asyncio.Task[None] | None = None
        self._abort = engine.abort
        if aborts is not None:
            self._engine.abort = self._abort_anywhere

    def follow(self) -> None:
        """Start to follow; call it in the event loop."""
        if self._aborts is not None:
            self._following = asyncio.create_task(self._follow(self._aborts))

    async def abort_all(self) -> int:
        """Have the others abort all that they run; return how many requests those were."""
        if self._aborts is None:
            return 0
        number, deadline = self._aborts.ask(None), time.monotonic() + PATIENCE_S
        while len(self._aborts.answers(number)) < self.count and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S / 2)
        return sum(self._aborts.answers(number))

    async def _abort_anywhere(self, request_id: Any, internal: bool = False) -> None:
        """Do as vLLM's `abort`, also where another API server runs some of the requests."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        known = self._engine.output_processor.external_req_ids
        elsewhere = [] if internal else [name for name in ids if name not in known]
        if elsewhere and self._aborts is not None:
            self._aborts.ask(elsewhere)
        await self._abort(ids, internal)

    async def _follow(self, aborts: Aborts) -> None:
        while True:
            try:
                self._catalog.refresh()
                for asked in aborts.unread():
                    aborts.done(asked.number, await self._abort_here(asked))
            except (sqlite3.Error, EngineDeadError) as error:  # tried again, until the server ends
                logger.warning("what other API servers do is not known: %s", error)
            await asyncio.sleep(POLL_S)

    async def _abort_here(self, asked: Abort) -> int:
        processor = self._engine.output_processor
        if asked.request_ids is None:
            ids = [*processor.request_states, *processor.parent_requests]
        else:
            ids = [name for name in asked.request_ids if name in processor.external_req_ids]
        if ids:
            await self._abort(ids, asked.request_ids is None)
        return len(ids)
