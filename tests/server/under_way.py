"""The tests of control routes and trainers share requests under way, and checks of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from pte_vllm.method.plan import FoldPlan
from tests.harness.engine import BLOCK
from tests.harness.parity import TOLERANCE, replayed
from tests.harness.server import WINDOW, Server

TEMPERATURE = 0.8
IN_FLIGHT = 1500
"""How many tokens a request samples that something is to happen to while it runs."""

_CLIENT = httpx.Client(timeout=120)  # a new one for each call would cost time


def check(
    server: Server,
    adapter: Path | None,
    prompt: list[int],
    answer: list[int],
    logprobs: list[float],
    *,
    pin_tokens: int | None = None,
    window_tokens: int = WINDOW,
    rule: str | None = None,
    start: int = 0,
    **draws: Any,
) -> float:
    """Assert that log-probs of `answer[start:]` are the replay's of one sequence of this plan."""
    plan = FoldPlan(
        pin_tokens=len(prompt) if pin_tokens is None else pin_tokens,
        window_tokens=window_tokens,
        block_size=BLOCK,
        **draws,
    )
    tokens = [*prompt, *answer]
    expected = replayed(server.model, adapter, tokens, plan, rule=rule, temperature=TEMPERATURE)
    found = torch.tensor(logprobs)
    assert len(found) == len(answer) - start > 0
    worst = (found - expected[len(prompt) - 1 + start :]).abs().max().item()
    folds = plan.folded_blocks(len(prompt) + len(answer) - 1) // plan.evict_blocks
    print(f"{len(answer) - start} tokens, {folds} folds, max |Δ log p| {worst:.1e}")
    assert worst <= TOLERANCE
    return worst


def post(server: Server, path: str, body: Any = None, **options: Any) -> httpx.Response:
    """POST to the server, with a body of JSON unless it is None."""
    if body is not None:
        options["json"] = body
    return _CLIENT.post(server.url + path, **options)


def wait_folds(server: Server, folds: int, count: int = 1) -> None:
    """Wait until `count` requests make progress, each with at least this many folds.

    Progress, as the report still shows requests whose end the worker has not heard of.
    """
    seen: dict[str, int] = {}
    for _ in range(1000):
        running = _CLIENT.get(f"{server.url}/pte/v1/requests").json()["running"]
        under_way = [
            request
            for request in running
            if request["folds"] >= folds
            and request["num_tokens"] > seen.get(request["request_id"], request["num_tokens"])
        ]
        if len(under_way) >= count:
            return
        seen = {request["request_id"]: request["num_tokens"] for request in running}
        time.sleep(0.02)
    raise AssertionError(f"not under way: {running}")


@contextmanager
def under_way(*calls: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run `calls` in threads during the block; their results are in the list after it."""
    results: list[Any] = []
    with ThreadPoolExecutor(max_workers=len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        yield results
        results += [future.result(timeout=120) for future in futures]
