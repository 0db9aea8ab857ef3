"""What is known of many rollouts is asked for at once, and each gets its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pte_vllm.server.finished import FinishedReader


class Worker:
    """Answers as a worker does, a question at a time, once it is let go on."""

    def __init__(self) -> None:
        self.questions: list[list[str]] = []
        self.go_on = asyncio.Event()
        self.broken = False

    async def each(self, method: str, names: list[str]) -> list[Any]:
        assert method == "pte_rho"
        self.questions.append(names)
        await self.go_on.wait()
        if self.broken:
            raise RuntimeError("no worker")
        return [None if name == "unknown" else [float(name)] for name in names]


async def _under_way(reader: FinishedReader[list[float]], *names: str) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(reader.read(name)) for name in names]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


def test_what_waits_is_asked_together() -> None:
    async def run() -> None:
        worker = Worker()
        reader = FinishedReader[list[float]](worker, "pte_rho")
        first = await _under_way(reader, "1")
        rest = await _under_way(reader, *(str(i) for i in range(2, 500)), "unknown")
        rest[3].cancel()  # its client left
        worker.go_on.set()
        assert await first[0] == [1.0]
        found = await asyncio.gather(*rest, return_exceptions=True)
        assert isinstance(found.pop(3), asyncio.CancelledError)
        assert found == [[float(i)] for i in range(2, 500) if i != 5] + [None]
        assert [len(question) for question in worker.questions] == [1, 499]
        assert await reader.read("7") == [7.0]

    asyncio.run(run())


def test_a_failure_reaches_all_who_asked_and_no_others() -> None:
    async def run() -> None:
        worker = Worker()
        reader = FinishedReader[list[float]](worker, "pte_rho")
        worker.broken = True
        asked = await _under_way(reader, "1", "2")
        worker.go_on.set()
        for task in asked:
            with pytest.raises(RuntimeError, match="no worker"):
                await task
        worker.broken = False
        assert await reader.read("3") == [3.0]

    asyncio.run(run())
