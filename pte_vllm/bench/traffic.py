"""Mixed requests for a server, checked as they are answered: chats, rollouts, scores, pushes."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from pte_vllm.bench.turns import BLOCK_TOKENS
from pte_vllm.method.names import RULE_NAMES
from pte_vllm.wire.client import RolloutClient
from pte_vllm.wire.rollout import Rollout
from pte_vllm.wire.transport import ServerError

NAME = "soak"
KEPT_VERSIONS = 8
MAX_PROMPT_TOKENS = 200
_WEIGHTS = {"chat": 4, "rollout": 3, "score": 2}
_LEFT = 0.15
"""Part of the requests that are left before their end."""
_WORDS = ("the", "birds", "on", "roof", "count", "while", "it", "rains", "and", "nobody", "asks")
_UNFOLDED = 0.2
"""Part of the scores of folded rollouts that are asked for under full attention."""
_RECENT = 2
"""Versions that a rollout may be behind to be scored: the server keeps `KEPT_VERSIONS`."""


class WrongAnswer(Exception):
    """The server answered, but not with what was asked for."""


@dataclass
class Tally:
    """What came of the requests."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By kind, of each that came whole."""
    left: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    """Sampled, of answers that came whole."""
    drift: list[float] = field(default_factory=list)
    """Mean |Δ log p| between a rollout and its score."""
    surprise: list[float] = field(default_factory=list)
    """Mean −log p of those rollouts: where it is zero, drift is too, whatever goes wrong."""
    unfolded: list[float] = field(default_factory=list)
    """As drift, of scores under full attention: others can agree to the last bit, in bf16 too, and
    these show that the comparison sees something."""

    @property
    def done(self) -> int:
        return sum(map(len, self.seconds.values()))

    def add(self, kind: str, began: float) -> None:
        self.seconds.setdefault(kind, []).append(time.monotonic() - began)


class Traffic:
    """Streams that send one request after the other, and a trainer that pushes versions.

    Args:
        url: of the server.
        adapters: directories that take turns as versions.
        streams: requests at once.
        every_s: from push to push.
        tokens: longest answer.
        window_tokens: the server's; requests have that or another.
        max_drift: largest mean |Δ log p| between a rollout and its score.
        seed: of all that is drawn.
    """

    def __init__(
        self,
        url: str,
        adapters: list[str],
        *,
        streams: int,
        every_s: float,
        tokens: int,
        window_tokens: int,
        max_drift: float,
        seed: int,
    ) -> None:
        self.tally = Tally()
        self._url, self._adapters, self._streams = url, adapters, streams
        self._every_s, self._tokens, self._max_drift = every_s, tokens, max_drift
        self._windows = [None, None, 0, 2 * BLOCK_TOKENS, 2 * max(window_tokens, BLOCK_TOKENS)]
        self._rng = random.Random(seed)
        self._newest = 0
        self._recent: deque[Rollout] = deque(maxlen=32)
        self._ask = {"chat": self._chat, "rollout": self._rollout, "score": self._score}

    async def run(self, seconds: float, *, give_up: Callable[[], bool]) -> None:
        """Go on for that long, or until `give_up()`; then let what runs finish."""
        deadline = time.monotonic() + seconds

        def over() -> bool:
            return time.monotonic() > deadline or give_up()

        limits = httpx.Limits(max_connections=self._streams)
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as client:
            await self._guarded("push", self._push)
            await asyncio.gather(
                self._trainer(over), *(self._stream(client, over) for _ in range(self._streams))
            )

    async def _trainer(self, over: Callable[[], bool]) -> None:
        pushed = time.monotonic()
        while not over():
            await asyncio.sleep(0.1)
            if time.monotonic() - pushed > self._every_s:
                pushed = time.monotonic()
                await self._guarded("push", self._push)

    async def _stream(self, client: httpx.AsyncClient, over: Callable[[], bool]) -> None:
        while not over():
            (kind,) = self._rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
            await self._guarded(kind, partial(self._ask[kind], client))

    async def _guarded(self, kind: str, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except (httpx.HTTPError, ServerError, WrongAnswer, ValueError, KeyError) as error:
            self.tally.errors.append(f"{kind}: {type(error).__name__}: {error}"[:500])
            await asyncio.sleep(1.0)

    # -- kinds of requests ------------------------------------------------------------------------

    async def _push(self) -> None:
        """Push a version, and sample a token of it."""
        began, number = time.monotonic(), self._newest + 1
        with RolloutClient(self._url, retry_s=0.0) as client:
            adapter = self._adapters[number % len(self._adapters)]
            await asyncio.to_thread(client.push, adapter, NAME, number)
            self._newest = number
            records = await asyncio.to_thread(
                lambda: list(
                    client.rollouts(
                        [[7]],
                        adapter=NAME,
                        min_weight_version=number,
                        sampling={"max_tokens": 1},
                    )
                )
            )
        self.tally.add("push", began)
        if records[0].weight_versions[0].version < number:
            raise WrongAnswer(f"version {number} was pushed, {records[0].adapter} sampled")

    async def _chat(self, client: httpx.AsyncClient) -> None:
        rng, began, length = self._rng, time.monotonic(), self._length()
        streamed = rng.random() < 0.6
        options = {"pte_window": rng.choice(self._windows), "pte_update": self._rule()}
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": " ".join(rng.choices(_WORDS, k=20))}],
            "max_completion_tokens": length,
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "ignore_eos": True,
            "vllm_xargs": {name: value for name, value in options.items() if value is not None},
        }
        if not streamed:
            answer = await client.post("/v1/chat/completions", json=body)
            if answer.status_code != 200:
                raise WrongAnswer(f"{answer.status_code} {answer.text}")
            found = answer.json()["usage"]["completion_tokens"]
        else:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            leave_after = self._leave_after(length)
            found = chunks = 0
            async with aclosing(self._lines(client, "/v1/chat/completions", body)) as lines:
                async for line in lines:
                    text = line.removeprefix("data: ")
                    if text == "[DONE]":
                        break
                    chunk = json.loads(text)
                    if "error" in chunk:
                        raise WrongAnswer(text)
                    chunks += 1
                    if chunks == 1:
                        self.tally.add("chat, first chunk", began)
                    if chunks == leave_after:
                        self.tally.left["chat"] += 1
                        return
                    if chunk.get("usage"):
                        found = chunk["usage"]["completion_tokens"]
        if found != length:
            raise WrongAnswer(f"{found} tokens, asked for were {length}")
        self.tally.add("chat", began)
        self.tally.tokens += found

    async def _rollout(self, client: httpx.AsyncClient) -> None:
        rng, began = self._rng, time.monotonic()
        length, n = self._length(), rng.choice([1, 1, 2, 4])
        window_tokens = rng.choice(self._windows)
        prompt = [rng.randrange(10, 500) for _ in range(rng.randrange(1, MAX_PROMPT_TOKENS))]
        body = {
            "token_ids": [prompt],
            "n": n,
            "adapter": NAME,
            "window_tokens": window_tokens,
            "sampling": {"max_tokens": length, "ignore_eos": True, "seed": rng.randrange(2**31)},
            "in_flight": rng.choice(["pin", "switch_rebuild"]),
        }
        leave_after = self._leave_after(n)
        records: list[Rollout] = []
        async with aclosing(self._lines(client, "/pte/v1/rollouts", body)) as lines:
            async for line in lines:
                record = _record(line)
                if list(record.prompt_ids) != prompt or len(record.completion_ids) != length:
                    found = len(record.completion_ids)
                    raise WrongAnswer(f"{found} tokens, asked for were {length}")
                records.append(record)
                if len(records) == leave_after:
                    self.tally.left["rollout"] += 1
                    return
        if sorted(record.index for record in records) != list(range(n)):
            raise WrongAnswer(f"{len(records)} of {n} records")
        self._recent += [record for record in records if len(record.weight_versions) == 1]
        self.tally.add("rollout", began)
        self.tally.tokens += n * length

    async def _score(self, client: httpx.AsyncClient) -> None:
        """Score a rollout on the version that sampled it: the log-probs must be the same."""
        fresh = [
            record
            for record in self._recent
            if record.weight_versions[0].version >= self._newest - _RECENT
        ]
        if not fresh:
            return await self._rollout(client)
        began, record = time.monotonic(), self._rng.choice(fresh)
        folded = record.plan.folded_blocks(len(record.token_ids) - 1) > 0
        unfolded = folded and self._rng.random() < _UNFOLDED
        body = {
            "token_ids": [list(record.token_ids)],
            "prompt_tokens": [len(record.prompt_ids)],
            "adapter": record.adapter,
            "window_tokens": 0 if unfolded else record.plan.window_tokens,
        }
        scored = [_record(line) async for line in self._lines(client, "/pte/v1/score", body)]
        if len(scored) != 1:
            raise WrongAnswer(f"{len(scored)} records of 1")
        pairs = list(zip(record.logprobs, scored[0].logprobs, strict=True))
        drift = sum(abs(a - b) for a, b in pairs) / len(pairs)
        if unfolded:
            self.tally.unfolded.append(drift)
            return None
        self.tally.drift.append(drift)
        self.tally.surprise.append(-sum(record.logprobs) / len(pairs))
        if drift > self._max_drift:
            raise WrongAnswer(
                f"a rollout of {record.adapter} and its score differ by {drift:.1e} in the mean; "
                f"{record.plan}, {len(pairs)} tokens"
            )
        self.tally.add("score", began)
        return None

    async def _lines(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any]
    ) -> AsyncGenerator[str, None]:
        """Lines of a streamed answer, blank ones left out."""
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                raise WrongAnswer(f"{answer.status_code} {(await answer.aread()).decode()}")
            # By hand: httpx also splits at U+2028 and the like, which texts may hold as they are.
            rest = b""
            async for chunk in answer.aiter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield line.decode()
            if rest.strip():
                yield rest.decode()

    def _length(self) -> int:
        return self._rng.randrange(1, self._tokens + 1)

    def _rule(self) -> str | None:
        return self._rng.choice([None, None, *RULE_NAMES])

    def _leave_after(self, most: int) -> int | None:
        return self._rng.randrange(1, most + 1) if self._rng.random() < _LEFT else None


def _record(line: str) -> Rollout:
    if line.startswith('{"error"'):
        raise WrongAnswer(line)
    return Rollout.from_json(line)
