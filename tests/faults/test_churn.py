"""Ten thousand requests, sixty-four at once: nothing is left of them, and answers stay exact."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.churn import check_answers, churn
from tests.faults.conftest import Held
from tests.harness.kinds import NO_KERNEL_CACHE
from tests.harness.server import NUM_BLOCKS, Server

REQUESTS, AT_ONCE, EVERY = 10_000, 64, 250
GROWTH_MIB = 24
"""How far all processes together may grow in the second half: by 5 kB for each request."""


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_requests(
    tiny: Callable[[str], Path], adapters: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    model = tiny("llama")
    served = {rule: adapters(model, rank=8, rule=rule) for rule in ("ridge", "paper")}
    served["plain"] = adapters(model, plain=True, rank=8)
    server = serve(model, served, env=NO_KERNEL_CACHE)
    churn(server, 200, at_once=AT_ONCE, seed=0)
    server.wait_idle()
    before, samples = Held.by(server), []

    def sample(done: int) -> None:
        if done % EVERY == 0:
            samples.append((done, Held.by(server).resident_mib))

    outcome = churn(server, REQUESTS, at_once=AT_ONCE, seed=1, keep=24, on_progress=sample)
    report = server.wait_idle()
    assert report["free_blocks"] == report["usable_blocks"] == NUM_BLOCKS
    after = Held.by(server)
    half = [(done, mib) for done, mib in samples if done > REQUESTS // 2]
    slope, _ = statistics.linear_regression(*zip(*half, strict=True))
    print(
        f"{dict(outcome.counts)}; {before} to {after}; {slope * 1000:.2f} MiB per 1000 requests "
        f"in the second half; {[round(mib) for _, mib in samples[::4]]}"
    )
    assert outcome.counts["left"] > REQUESTS // 8
    assert after.files <= before.files + 5 and after.threads <= before.threads + 5
    assert slope * REQUESTS / 2 < GROWTH_MIB, samples
    check_answers(server, outcome)
