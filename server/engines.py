"""The engines behind this API server: what all of them say, put together.

With data parallelism vLLM runs several engines that know nothing of each other's requests. It sends
a call to all of them, and hands back what the first one answers (`DPLBAsyncMPClient` in
vllm/v1/engine/core_client.py). Questions about requests need the answers of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm.engine.protocol import EngineClient

from pte_vllm.engine.earlier import EARLIER


class Engines:
    """Asks the workers of every engine, and puts the answers together.

    Args:
        client: vLLM's client of the engines. It is made to tell which engine gets which request.
    """

    def __init__(self, client: EngineClient) -> None:
        self._core: Any = client.engine_core  # type: ignore[attr-defined]
        choose = getattr(self._core, "get_core_engine_for_request", None)
        if self.count > 1 and choose is not None:
            self._core.get_core_engine_for_request = self._noting(choose)

    @property
    def count(self) -> int:
        """How many engines there are."""
        return len(self._core.core_engines)

    def _noting(self, choose: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def get_core_engine_for_request(request: Any) -> Any:
            engine = choose(request)
            EARLIER.place(request.request_id, self._core.core_engines.index(engine))
            return engine

        return get_core_engine_for_request

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """Return what a method of the workers answers, by engine: the first rank's, as all agree.

        Raises:
            Exception: what the method raised in some worker, or EngineDeadError.
        """
        answers = await self._core.call_utility_all_async("collective_rpc", method, None, args, {})
        return [by_rank[0] for by_rank in answers]

    async def find(
        self, method: str, name: str, *args: Any, unknown: Callable[[Any], bool] | None = None
    ) -> Any:
        """Return what the engine that has a request answers; None where no engine knows it.

        Args:
            method: the worker's method, which takes the name first.
            name: what the client calls the request.
            args: what the method takes besides.
            unknown: what tells that an answer means that the engine does not know the request;
                default: that it is None.
        """
        answers = await self.ask(method, name, *args)
        at = EARLIER.engine_of(name)
        if at is not None:  # first, as an older request of that name may be elsewhere
            answers.insert(0, answers[at])
        unknown = unknown or (lambda answer: answer is None)
        return next((answer for answer in answers if not unknown(answer)), answers[0])

    async def each(self, method: str, names: list[str]) -> list[Any]:
        """Return what a method that takes many names answers for each, from whoever knows it."""
        answers = await self.ask(method, names)
        return [
            next((found for found in by_engine if found is not None), None)
            for by_engine in zip(*answers, strict=True)
        ]

    async def requests(self) -> dict[str, Any]:
        """Return running and recently finished requests, and the pools as of the last step."""
        reports = await self.ask("pte_requests")
        lines = {
            kind: [{**line, "engine": i} for i, one in enumerate(reports) for line in one[kind]]
            for kind in ("running", "finished")
        }
        lines["finished"].sort(key=lambda line: line["ended_s"])  # stable: each engine's in order
        pools = ("usable_blocks", "free_blocks")
        return {
            "block_size": reports[0]["block_size"],
            **{name: sum(report[name] for report in reports) for name in pools},
            "adapters_in_use": sorted({name for one in reports for name in one["adapters_in_use"]}),
            "engines": [
                {**{name: report[name] for name in pools}, "running": len(report["running"])}
                for report in reports
            ],
            **lines,
        }

    async def counters(self) -> dict[str, Any]:
        """Return the sums of what the workers of all engines count."""
        first, *others = await self.ask("pte_counters")
        for other in others:
            first = {name: _added(value, other[name]) for name, value in first.items()}
        return first


def _added(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return dict(Counter(one) + Counter(other))
    if isinstance(one, list):
        return [a + b for a, b in zip(one, other, strict=True)]
    return one + other
