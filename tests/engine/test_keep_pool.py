"""Kept tokens where blocks are scarce, so that one sequence's are another's at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.engine.kept import same
from tests.harness.engine import BLOCK, Engine, Job
from tests.harness.models import random_tokens

WINDOW = 3 * BLOCK


def test_in_a_tight_pool(tiny: Callable[[str], Path], probes: Path) -> None:
    """They share a prefix, leave blocks to each other, end early, and are preempted."""
    prefix = random_tokens(4 * BLOCK, 500, 77)

    def make(i: int) -> Job:
        options = {"pte_keep": [BLOCK, 2 * BLOCK, 0, BLOCK][i % 4], "pte_pin_tokens": 20 + 7 * i}
        if options["pte_keep"] and i % 3 == 0:
            options |= {"pte_keep_score": "random", "pte_evict_seed": i}
        return Job(prefix + random_tokens(3 * i, 500, i), 100 + 20 * i, None, options, seed=i)

    wanted, jobs = [make(i) for i in range(12)], [make(i) for i in range(12)]
    tight = Engine(
        tiny("llama"),
        window_tokens=WINDOW,
        probes=probes,
        num_blocks=40,
        reserve_windows=False,
        max_model_len=600,
    )
    for job in wanted:
        tight.run([job])
        tight.scheduler.reset_prefix_cache()
    preemptions = 0
    preempt = tight.scheduler._preempt_request

    def counted(*args: object, **kwargs: object) -> None:
        nonlocal preemptions
        preemptions += 1
        preempt(*args, **kwargs)

    tight.scheduler._preempt_request = counted

    def on_step(step: int, request_ids: list[str]) -> None:
        tight.scheduler.pte_check_integrity()
        if step == 90:
            tight.engine.abort_request(request_ids[3:4])

    tight.run(jobs, on_step)
    assert preemptions > 2
    assert jobs[3].finish_reason == "abort" or not jobs[3].finished
    for i, (job, alone) in enumerate(zip(jobs, wanted, strict=True)):
        if i != 3:
            same(job, alone)
    tight.check_idle()
    tight.close()
