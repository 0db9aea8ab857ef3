"""ρ of finished rollouts, asked of the worker for many at once.

Each question is a message to the engine, and has the worker wait for its device. What finishes
while one is under way goes into the next.
"""

from __future__ import annotations

import asyncio

from vllm.engine.protocol import EngineClient

Measured = list[float] | None


class RhoReader:
    """Reads ρ of requests; one question at a time is under way, however many ask.

    Args:
        engine: the engine that ran them.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._waiting: list[tuple[str, asyncio.Future[Measured]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def read(self, request_id: str) -> Measured:
        """Return ρ of each fold of a request; None if the worker does not know it any more."""
        answer: asyncio.Future[Measured] = asyncio.get_running_loop().create_future()
        self._waiting.append((request_id, answer))
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await answer

    async def _ask(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            names = [name for name, _ in batch]
            try:
                (found,) = await self._engine.collective_rpc("pte_rho", args=(names,))
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():  # its client has left
                        answer.set_exception(error)
                continue
            for (_, answer), measured in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(measured)
