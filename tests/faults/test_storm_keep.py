"""A storm of requests that keep tokens, in a pool with room for a third of them.

They share the beginning of their prompts, preempt each other, and some are aborted. Whoever is left
must have the tokens that it has alone, and every block must come back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engine.kept import assert_selected, same
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity


@dataclass(frozen=True)
class Storm:
    """How many requests, and of what length in tokens."""

    requests: int
    prompt_tokens: int
    shared_tokens: int
    """Those that all prompts begin with."""
    new_tokens: int
    abort_every: int
    """One request of so many is aborted."""
    alone_every: int
    """One request of so many runs again, alone."""
    window_tokens: int
    keep_tokens: int

    @property
    def num_blocks(self) -> int:
        """A third of what all would hold at once; what they share is counted once."""
        shared = self.shared_tokens // BLOCK
        own = -(-self.prompt_tokens // BLOCK) - shared + 1
        own += (self.window_tokens + self.keep_tokens) // BLOCK
        return (shared + self.requests * own) // 3


SMALL = Storm(
    requests=24,
    prompt_tokens=150,
    shared_tokens=96,
    new_tokens=200,
    abort_every=8,
    alone_every=5,
    window_tokens=2 * BLOCK,
    keep_tokens=BLOCK,
)
LARGE = Storm(
    requests=256,
    prompt_tokens=700,
    shared_tokens=512,
    new_tokens=1024,
    abort_every=16,
    alone_every=32,
    window_tokens=4 * BLOCK,
    keep_tokens=2 * BLOCK,
)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("storm", "async_scheduling"),
    [
        pytest.param(SMALL, False, id="small"),
        pytest.param(SMALL, True, id="small-async", marks=pytest.mark.slow),
        pytest.param(LARGE, False, id="large", marks=pytest.mark.slow),
    ],
)
def test_storm(
    storm: Storm,
    async_scheduling: bool,
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    probes: Path,
) -> None:
    """Every third request has an adapter with a state."""
    model = tiny("llama")
    ridge = lora("ridge", adapters(model, rank=8, rule="ridge"), 1)
    shared = random_tokens(storm.shared_tokens, 500, 1)

    def make(i: int, keep: int = storm.keep_tokens) -> Job:
        prompt = shared + random_tokens(storm.prompt_tokens - len(shared), 500, 100 + i)
        adapter = ridge if i % 3 == 0 else None
        return Job(prompt, storm.new_tokens, adapter, {"pte_keep": keep}, seed=i)

    jobs = [make(i) for i in range(storm.requests)]
    aborted = [i for i in range(storm.requests) if i % storm.abort_every == 1]
    # All in the time that the first ones need, so that none has finished.
    abort_at = {storm.new_tokens * (k + 1) // (len(aborted) + 1): i for k, i in enumerate(aborted)}
    engine = Engine(
        model,
        window_tokens=storm.window_tokens,
        lora_rank=8,
        probes=probes,
        num_blocks=storm.num_blocks,
        max_num_seqs=storm.requests,
        max_prompt_tokens=1024,
        async_scheduling=async_scheduling,
        reserve_windows=False,  # so that they preempt each other
    )
    preempted = engine.count_preemptions()
    steps = 0

    def on_step(step: int, request_ids: list[str]) -> None:
        nonlocal steps
        steps = step
        if step in abort_at:
            engine.engine.abort_request([request_ids[abort_at[step]]])
        if step % 8 == 0:
            engine.scheduler.pte_check_integrity()

    started = time.monotonic()
    try:
        engine.run(jobs, on_step)
        took_s = time.monotonic() - started
        engine.check_idle()
        again = [make(i) for i in range(0, storm.requests, storm.alone_every)]
        for job in (*again, without := make(0, keep=0)):
            engine.scheduler.reset_prefix_cache()
            engine.run([job])
            assert not job.cached_tokens
        engine.check_idle()
    finally:
        engine.close()
    hits = sum(job.cached_tokens >= storm.shared_tokens for job in jobs)
    rest = [job for i, job in enumerate(jobs) if i not in aborted]
    print(
        f"{storm.num_blocks} blocks: {preempted.total()} preemptions of {len(preempted)} requests "
        f"and {hits} prefix hits in {steps} steps, {took_s:.0f} s"
    )
    assert preempted.total() > storm.requests // 4
    assert hits > storm.requests // 2
    assert not any(jobs[i].finished for i in aborted)
    chosen = assert_selected(rest, storm.window_tokens)
    assert again[0].tokens != without.tokens  # what is kept matters
    for job, alone in zip(jobs[:: storm.alone_every], again, strict=True):
        same(job, alone)
    worst = assert_parity(model, rest, storm.window_tokens, min_folds=4)
    print(f"{chosen} choices; max |Δ log p| {worst:.1e}")
