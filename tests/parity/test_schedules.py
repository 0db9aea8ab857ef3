"""The same requests under every schedule: each must match the replay, which knows no schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity, replayed

WINDOW = 4 * BLOCK
LENGTH = WINDOW + 8 * BLOCK + 5
RANDOM = {"pte_evict": "random"}


@pytest.fixture(scope="module")
def engine(model: Path, probes: Path) -> Iterator[Engine]:
    engine = Engine(model, window_tokens=WINDOW, lora_rank=8, probes=probes)
    yield engine
    engine.check_idle()
    engine.close()


@pytest.fixture(scope="module")
def make_jobs(model: Path, adapters: Callable[..., Path]) -> Callable[[], list[Job]]:
    """Seven requests under test: two PTE rules, one of them also with random blocks, and none.

    With an adapter and without, they keep tokens too; one adapter brings probes of its own.
    """
    paper = lora("paper", adapters(model, rank=8, rule="paper"), 1)
    ridge = lora("ridge", adapters(model, rank=8, rule="ridge"), 2)
    own = lora("own", adapters(model, rank=8, rule="ridge", own_probes=9), 4)

    def make() -> list[Job]:
        return [
            Job(random_tokens(45, 500, 1), LENGTH, paper, seed=1),
            Job(random_tokens(70, 500, 2), LENGTH, ridge, seed=2),
            Job(random_tokens(20, 500, 3), LENGTH, seed=3),
            Job(random_tokens(33, 500, 4), LENGTH, ridge, {**RANDOM, "pte_evict_seed": 8}, seed=4),
            Job(random_tokens(50, 500, 5), LENGTH, ridge, {"pte_keep": 2 * BLOCK}, seed=5),
            Job(random_tokens(25, 500, 6), LENGTH, None, {"pte_keep": BLOCK}, seed=6),
            Job(random_tokens(35, 500, 7), LENGTH, own, {"pte_keep": BLOCK}, seed=7),
        ]

    return make


def test_alone(engine: Engine, model: Path, make_jobs: Callable[[], list[Job]]) -> None:
    for job in make_jobs():
        engine.run([job])
        assert_parity(model, [job], WINDOW, min_folds=8)


def test_mixed_with_others(
    engine: Engine, model: Path, make_jobs: Callable[[], list[Job]], adapters: Callable[..., Path]
) -> None:
    """Fifteen others of different lengths, plans and adapters in the same batches."""
    plain = lora("plain", adapters(model, plain=True, rank=8), 3)
    others = []
    for i in range(15):
        window = [0, 2 * BLOCK, 3 * BLOCK, 8 * BLOCK][i % 4]
        prompt = random_tokens(5 + 17 * i, 500, 100 + i)
        options = {"pte_window": window}
        if i % 3 == 0:
            options["pte_pin_tokens"] = len(prompt) // 2
        if window and i % 2:  # windows of two and of eight blocks, of which two leave
            options |= {**RANDOM, "pte_evict_seed": i}
        elif window and i % 5 < 3:
            options |= {"pte_keep": (1 + i % 3) * BLOCK}
            if i % 5 == 0:
                options |= {"pte_keep_score": "random", "pte_evict_seed": i}
        adapter = [None, plain, *(j.adapter for j in make_jobs()[:2])][i % 4]
        others.append(Job(prompt, 60 + 23 * i, adapter, options))
    jobs = make_jobs()
    engine.run(jobs + others)
    assert_parity(model, jobs, WINDOW, min_folds=8)
    assert_parity(model, others, WINDOW)


def test_forced_preemption(engine: Engine, model: Path, make_jobs: Callable[[], list[Job]]) -> None:
    undisturbed, jobs = make_jobs(), make_jobs()
    engine.run(undisturbed)
    others = [Job(random_tokens(30, 500, 200 + i), 150) for i in range(5)]
    preempted = []

    def on_step(step: int, request_ids: list[str]) -> None:
        engine.scheduler.pte_check_integrity()
        if step % 37 == 36:
            for position in (0, -1):
                if len(engine.scheduler.running) > 1:
                    preempted.append(engine.scheduler.running[position].request_id)
                    engine.preempt(position)

    engine.run(jobs + others, on_step)
    assert len(preempted) > 10
    assert_parity(model, jobs, WINDOW, min_folds=8)
    # Seeds survive the replayed prefill.
    assert [job.tokens for job in jobs] == [job.tokens for job in undisturbed]
    assert_parity(model, others, WINDOW)


def test_prefix_hits(engine: Engine, model: Path, make_jobs: Callable[[], list[Job]]) -> None:
    """A group shares its question; a longer request shares it with a full-attention one."""
    adapter = make_jobs()[0].adapter
    question = random_tokens(5 * BLOCK, 500, 7)
    first = Job(question, LENGTH, adapter, seed=1)
    engine.run([first])
    pool = engine.scheduler.kv_cache_manager
    group = [Job(question, LENGTH, adapter, seed=10 + i) for i in range(4)]
    engine.run(group)
    # 300 tokens under full attention leave 9 cached blocks; a windowed reader may use those before
    # its own first fold only.
    long = random_tokens(300, 500, 8)
    full = Job(long, 40, adapter, {"pte_window": 0})
    engine.run([full])
    hits = []
    original = engine.scheduler._get_local_prefix_cache_hit

    def spy(request):  # records what the real method returned
        result = original(request)
        hits.append(result[1])
        return result

    engine.scheduler._get_local_prefix_cache_hit = spy
    try:
        windowed = Job(long, LENGTH, adapter, {"pte_pin_tokens": 40})
        again = Job(long, 40, adapter, {"pte_window": 0}, seed=5)
        engine.run([windowed, again])
    finally:
        del engine.scheduler._get_local_prefix_cache_hit
    assert sorted(hits) == [5 * BLOCK, 9 * BLOCK], hits  # cut before (2 + 4) blocks, and uncut
    assert pool.enable_caching
    assert_parity(model, [first, *group, full, windowed, again], WINDOW)


def test_rule_overrides_do_not_share_blocks(
    engine: Engine, model: Path, make_jobs: Callable[[], list[Job]]
) -> None:
    """Before the first fold `paper` stands at S_0 and `ridge` at zero: other keys and values."""
    question, adapter = random_tokens(4 * BLOCK + 3, 500, 9), make_jobs()[0].adapter
    jobs = [
        Job(question, 200, adapter, {"pte_update": rule} if rule else {})
        for rule in (None, "ridge", "paper", "ridge", "none")
    ]
    for job in jobs:
        engine.run([job])
    assert_parity(model, jobs, WINDOW)


def test_thoughts_in_the_prompt(
    engine: Engine, model: Path, make_jobs: Callable[[], list[Job]]
) -> None:
    """Prefill folds too: prompt log-probs of a resumed chain of thoughts."""
    adapter = make_jobs()[1].adapter
    for pin, more in ((10, RANDOM), (BLOCK, {}), (100, RANDOM), (40, {"pte_keep": 2 * BLOCK})):
        prompt = random_tokens(600, 500, pin)
        options = {"pte_pin_tokens": pin, **more}
        job = Job(prompt, 50, adapter, options, prompt_logprobs=True)
        engine.run([job])
        assert_parity(model, [job], WINDOW, min_folds=8)
        expected = replayed(
            *(model, Path(adapter.lora_path), prompt, job.plan(WINDOW)),
            probes=job.probes,
            record=job.kept,
        )
        worst = max(abs(a - b) for a, b in zip(job.prompt_scores, expected.tolist(), strict=True))
        assert worst <= 2e-4


@pytest.mark.parametrize("chunk", [pytest.param(16, marks=pytest.mark.slow), 50])
def test_small_prefill_chunks(
    model: Path, make_jobs: Callable[[], list[Job]], probes: Path, chunk: int
) -> None:
    engine = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        probes=probes,
        max_num_batched_tokens=chunk,
        max_num_seqs=8,
    )
    jobs = make_jobs()
    for options in ({}, RANDOM, {"pte_keep": BLOCK}):
        options = {"pte_pin_tokens": 30, **options}
        jobs.append(Job(random_tokens(400, 500, 4), 60, jobs[0].adapter, options))
    try:
        engine.run(jobs)
        engine.check_idle()
    finally:
        engine.close()
    assert_parity(model, jobs, WINDOW, min_folds=8)


def test_async_scheduling(model: Path, make_jobs: Callable[[], list[Job]], probes: Path) -> None:
    engine = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        probes=probes,
        async_scheduling=True,
        num_blocks=40,
        max_prompt_tokens=128,
    )
    assert type(engine.scheduler).__name__ == "PTEAsyncScheduler"
    jobs = make_jobs()
    jobs.append(Job(random_tokens(400, 500, 4), 200, jobs[0].adapter, {"pte_pin_tokens": 30}))
    others = [Job(random_tokens(30 + i, 500, 300 + i), 150, jobs[i % 2].adapter) for i in range(6)]

    def on_step(step: int, request_ids: list[str]) -> None:
        if step % 61 == 60 and len(engine.scheduler.running) > 1:
            engine.preempt()

    try:
        engine.run(jobs + others, on_step)
        engine.check_idle()
    finally:
        engine.close()
    assert_parity(model, jobs, WINDOW, min_folds=8)
    assert_parity(model, others, WINDOW)
