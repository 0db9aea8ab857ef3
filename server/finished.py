"""What a worker knows of finished rollouts, asked of it for many at once.

Each question is a message to the engine, and has the worker wait for its device. What finishes
while one is under way goes into the next.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from vllm.exceptions import GenerationError

from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.plan import FoldPlan
from pte_vllm.server.engines import Engines
from pte_vllm.wire.folds import num_folds, rho_of_folds

Answer = TypeVar("Answer")


class FinishedReader(Generic[Answer]):
    """Reads one thing about requests; one question at a time is under way, however many ask.

    Args:
        engines: the engines that ran them.
        method: the worker's method, which takes the names of requests and answers for each.
    """

    def __init__(self, engines: Engines, method: str) -> None:
        self._engines, self._method = engines, method
        self._waiting: list[tuple[str, asyncio.Future[Answer | None]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def read(self, request_id: str) -> Answer | None:
        """Return the worker's answer for a request; None if it does not know it any more."""
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((request_id, answer))
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await answer

    async def _ask(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            names = [name for name, _ in batch]
            try:
                found = await self._engines.each(self._method, names)
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():  # its client has left
                        answer.set_exception(error)
                continue
            for (_, answer), measured in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(measured)


async def read_kept(
    kept: FinishedReader[KeptRecord], request_id: str, plan: FoldPlan, num_tokens: int
) -> KeptRecord | None:
    """Return what the folds of a finished sequence kept; None where its plan keeps nothing.

    Args:
        kept: asks the worker.
        request_id: a name of the request.
        plan: of the sequence.
        num_tokens: of question and answer together.

    Raises:
        GenerationError: if the worker has forgotten it; without it nobody can replay the sequence.
    """
    count = num_folds(plan, num_tokens)
    if not plan.keep_tokens or not count:
        return None
    found = await kept.read(request_id)
    if found is None or len(found) < count:
        raise GenerationError(f"{request_id}: what its folds kept is not known any more")
    return found[:count]  # the engine may have folded once more


async def read_rho(
    rho: FinishedReader[list[float]], request_id: str, plan: FoldPlan, num_tokens: int
) -> tuple[float, ...] | None:
    """Return ρ of the folds of a finished sequence with an adapter; None where it is unknown.

    Args:
        rho: asks the worker.
        request_id: a name of the request.
        plan: of the sequence.
        num_tokens: of question and answer together.
    """
    if not num_folds(plan, num_tokens):
        return None
    return rho_of_folds(plan, num_tokens, await rho.read(request_id))
