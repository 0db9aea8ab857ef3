"""More requests than the pool has room for are preempted again and again, and stay exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity

WINDOW, PINNED_BLOCKS = 2 * BLOCK, 2
POOL_BLOCKS = 2 * (PINNED_BLOCKS + WINDOW // BLOCK + 1)
"""The size of the pool is twice what one sequence holds at most."""
REQUESTS = 32


@pytest.mark.parametrize(
    ("length", "async_scheduling"),
    [
        (90, False),
        pytest.param(WINDOW + 8 * BLOCK + 5, False, marks=pytest.mark.slow),
        pytest.param(WINDOW + 8 * BLOCK + 5, True, marks=pytest.mark.slow),
    ],
)
def test_pool_of_two_sequences(
    tiny: Callable[[str], Path],
    adapters: Callable[..., Path],
    length: int,
    async_scheduling: bool,
) -> None:
    model = tiny("llama")
    choices = [
        lora("ridge", adapters(model, rank=8, rule="ridge"), 1),
        lora("paper", adapters(model, rank=8, rule="paper"), 2),
        None,
    ]
    jobs = [
        Job(random_tokens(33 + i % 31, 500, i), length + i, choices[i % 3], seed=i)
        for i in range(REQUESTS)
    ]
    engine = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        num_blocks=POOL_BLOCKS,
        max_prompt_tokens=PINNED_BLOCKS * BLOCK,
        max_num_seqs=REQUESTS,
        async_scheduling=async_scheduling,
        reserve_windows=False,  # so that they preempt each other
    )
    preempted: Counter[str] = Counter()
    original = engine.scheduler._preempt_request

    def count(request, *args, **kwargs):  # and leave it to the real one
        preempted[request.request_id] += 1
        return original(request, *args, **kwargs)

    engine.scheduler._preempt_request = count
    steps = 0

    def on_step(step: int, request_ids: list[str]) -> None:
        nonlocal steps
        steps = step

    try:
        engine.run(jobs, on_step)
        engine.check_idle()
    finally:
        engine.close()
    print(f"{preempted.total()} preemptions of {len(preempted)} requests in {steps} steps")
    assert preempted.total() > REQUESTS // 4
    assert_parity(model, jobs, WINDOW, min_folds=length // BLOCK - 2)
