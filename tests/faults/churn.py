"""Many short requests of every kind are sent, some dropped, and a few answers kept to check."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.server import WINDOW, Server
from tests.server.under_way import TEMPERATURE, check

ABORTED = 0.25
"""The part of the requests that their clients leave."""


@dataclass
class Answer:
    """An answer that came whole."""

    model: str
    prompt: list[int]
    window_tokens: int
    tokens: list[int]
    logprobs: list[float]


@dataclass
class Outcome:
    counts: Counter[str] = field(default_factory=Counter)
    """How many requests ended as `whole` or `left`."""
    answers: list[Answer] = field(default_factory=list)
    """Some of the whole answers."""


def churn(
    server: Server,
    count: int,
    *,
    at_once: int,
    seed: int,
    keep: int = 12,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Send `count` requests, `at_once` at a time; fail on any error of the server.

    `on_progress` is called with the number of requests that have ended.
    """
    return asyncio.run(_Churn(server, count, at_once, seed, keep, on_progress).run())


class _Churn:
    def __init__(
        self,
        server: Server,
        count: int,
        at_once: int,
        seed: int,
        keep: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self._server, self._at_once, self._on_progress = server, at_once, on_progress
        self._rng = random.Random(seed)
        self._numbers = iter(range(count))
        self._kept = set(self._rng.sample(range(count), min(4 * keep, count)))
        self._max_kept = keep
        self._outcome = Outcome()

    async def run(self) -> Outcome:
        limits = httpx.Limits(max_connections=self._at_once)
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=300, limits=limits
        ) as client:
            await asyncio.gather(*(self._work(client) for _ in range(self._at_once)))
        return self._outcome

    async def _work(self, client: httpx.AsyncClient) -> None:
        for number in self._numbers:
            await self._request(client, number)
            self._on_progress(self._outcome.counts.total())

    async def _request(self, client: httpx.AsyncClient, number: int) -> None:
        rng = self._rng
        model = rng.choice(["base", *self._server.adapters])
        window = rng.choice([WINDOW, 0, 2 * BLOCK, 3 * BLOCK])
        prompt = random_tokens(rng.randrange(1, 120), 500, rng.randrange(2**31))
        body: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": rng.choice([1, 7, 20, 60, 150]),
            "temperature": TEMPERATURE,
            "logprobs": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "vllm_xargs": {"pte_window": window},
        }
        if number in self._kept:
            body["max_tokens"] = 150
        elif rng.random() < ABORTED:
            await self._leave(client, {**body, "stream": rng.random() < 0.7}, rng.randrange(20))
            return
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        self._outcome.counts["whole"] += 1
        (choice,) = answer.json()["choices"]
        assert len(choice["token_ids"]) == body["max_tokens"]
        if number in self._kept and len(self._outcome.answers) < self._max_kept:
            logprobs = choice["logprobs"]["token_logprobs"]
            self._outcome.answers.append(
                Answer(model, prompt, window, choice["token_ids"], logprobs)
            )

    async def _leave(self, client: httpx.AsyncClient, body: dict[str, Any], after: int) -> None:
        """Drop the connection, of a stream after some chunks, of others after some milliseconds."""
        try:
            async with asyncio.timeout(None if body["stream"] else after / 100):
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    assert answer.status_code == 200, await answer.aread()
                    seen = 0
                    async for _ in answer.aiter_lines():
                        seen += 1
                        if seen > after:
                            break
        except TimeoutError:
            pass
        self._outcome.counts["left"] += 1


def check_answers(server: Server, outcome: Outcome) -> None:
    """Compare each answer with the replay."""
    for answer in outcome.answers:
        check(
            server,
            server.adapters.get(answer.model),
            answer.prompt,
            answer.tokens,
            answer.logprobs,
            window_tokens=answer.window_tokens,
        )
