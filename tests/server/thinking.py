"""The tests of thought states share a request, its thoughts at its end, and its replay."""

from __future__ import annotations

import time

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import ReplayResult
from pte_vllm.train.replay.segments import log_probs
from tests.harness.engine import BLOCK
from tests.harness.models import random_tokens
from tests.harness.parity import load_model
from tests.harness.server import WINDOW, Server

PROMPT, LENGTH = random_tokens(50, 500, 1), WINDOW + 6 * BLOCK + 9


def complete(server: Server, model: str, length: int = LENGTH, n: int = 1, **options: object):
    return server.complete(model, PROMPT, length, options=options, n=n, seed=3)


def finished(server: Server, name: str) -> dict:
    """Return a request's thoughts once the worker has heard of its end."""
    for _ in range(100):
        found = server.get(f"/pte/v1/thoughts/{name}")
        if found["status"] == "finished":
            return found
        time.sleep(0.05)
    raise AssertionError(f"still running: {found}")


def replay(
    server: Server, model: str, tokens: list[int], plan: FoldPlan, rule: str | None = None
) -> ReplayResult:
    attached = PTEModel(load_model(server.model), Adapter.load(server.adapters[model]))
    try:
        keeper = Keeper(attached, Probes.load(server.probes)) if plan.keep_tokens else None
        return log_probs(attached, tokens, plan, rule=rule, keeper=keeper)
    finally:
        attached.detach()
