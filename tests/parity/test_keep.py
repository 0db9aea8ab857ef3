"""Kept tokens beside every kind of adapter, and beside requests that keep none, in one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.kept import assert_selected
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity

WINDOW = 2 * BLOCK
LENGTH = WINDOW + 5 * BLOCK + 5
DRAWN = {"pte_keep_score": "random", "pte_evict_seed": 7}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3")]


@pytest.mark.parametrize("architecture", ["llama", *SLOW])
def test_mixed_batch(
    architecture: str, tiny: Callable[[str], Path], adapters: Callable[..., Path], probes: Path
) -> None:
    model = tiny(architecture)
    given = [
        lora("ridge", adapters(model, rank=8, rule="ridge", features="squared"), 1),
        lora("paper", adapters(model, rank=8, rule="paper", layers=[0, 2]), 2),
        lora("plain", adapters(model, plain=True), 3),
        None,
    ]
    # Of each the same request three times, which differ in what they keep.
    options: tuple[dict[str, object], ...] = ({}, {"pte_keep": BLOCK}, {"pte_keep": 2 * BLOCK})
    jobs = [
        Job(random_tokens(9 + 21 * i, 500, i), LENGTH, adapter, dict(more), seed=i)
        for i, adapter in enumerate(given)
        for more in options
    ]
    jobs.append(Job(jobs[-1].prompt, LENGTH, None, {"pte_keep": 2 * BLOCK, **DRAWN}, seed=3))
    engine = Engine(model, window_tokens=WINDOW, lora_rank=8, probes=probes, max_num_seqs=16)
    together = 0

    def on_step(step: int, request_ids: list[str]) -> None:
        nonlocal together
        together = max(together, len(engine.scheduler.running))

    try:
        engine.run(jobs, on_step)
        engine.check_idle()
    finally:
        engine.close()
    assert together == len(jobs)
    worst = assert_parity(model, jobs, WINDOW, min_folds=5)
    chosen = assert_selected([job for job in jobs if job.keeps], WINDOW)
    assert not any(job.kept for job in jobs if not job.keeps)
    print(f"{architecture}: {chosen} choices, max |Δ log p| {worst:.1e}")
    for i in range(0, len(jobs), 3):
        alike = jobs[i : i + 3] if i + 3 <= len(jobs) else jobs[-2:]
        assert len({tuple(job.tokens) for job in alike}) == len(alike)
