"""Memory is bounded, nothing leaks, and a pool smaller than its sequences gives exact answers."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pte_vllm.engine.sequences import LoadedEncoder
from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity

WINDOW = 4 * BLOCK


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def adapter(model: Path, adapters: Callable[..., Path]) -> Path:
    return adapters(model, rank=8, rule="ridge")


@pytest.mark.parametrize(
    ("tokens", "async_scheduling"),
    [
        *((1_500, is_async) for is_async in (False, True)),
        *(pytest.param(15_000, is_async, marks=pytest.mark.slow) for is_async in (False, True)),
    ],
)
def test_peak_blocks_of_long_thoughts(
    model: Path, adapter: Path, tokens: int, async_scheduling: bool
) -> None:
    engine = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        max_model_len=17000,
        num_blocks=60,
        max_prompt_tokens=128,
        async_scheduling=async_scheduling,
    )
    thoughts = lora("ridge", adapter, 1)
    # 40 tokens of question, thoughts to resume, more to generate; and a shorter one.
    jobs = [
        Job(random_tokens(tokens, 500, 1), tokens * 2 // 25, thoughts, {"pte_pin_tokens": 40}),
        Job(random_tokens(40, 500, 2), tokens // 10, thoughts),
    ]
    peaks: dict[str, int] = {}

    def on_step(step: int, request_ids: list[str]) -> None:
        for request_id, held in engine.scheduler.pte_pool_report().held_blocks.items():
            peaks[request_id] = max(peaks.get(request_id, 0), held)

    try:
        engine.run(jobs, on_step)
        finished = {r["request_id"]: r for r in engine.worker.pte_requests()["finished"]}
        engine.check_idle()
    finally:
        engine.close()
    bound = 2 + 4 + 1  # pinned + window + 1
    assert len(peaks) == 2
    for request_id, peak in peaks.items():
        assert peak <= bound
        summary = next(r for i, r in finished.items() if i == request_id)
        assert summary["peak_blocks"] <= bound
        assert summary["folded_tokens"] >= summary["num_tokens"] - (2 + 4 + 1) * BLOCK
    print("peak blocks", sorted(peaks.values()))


def test_pool_of_640_tokens_serves_four_generations_of_1000(model: Path, adapter: Path) -> None:
    engine = Engine(
        model,
        window_tokens=WINDOW,
        lora_rank=8,
        num_blocks=640 // BLOCK,
        max_model_len=1_280,
        max_prompt_tokens=64,
        reserve_windows=False,  # so that they crowd each other out
    )
    thoughts = lora("ridge", adapter, 1)
    jobs = [Job(random_tokens(30 + 9 * i, 500, i), 1_000, thoughts) for i in range(4)]
    preemptions = 0
    original = engine.scheduler._preempt_request

    def count(*args, **kwargs):
        nonlocal preemptions
        preemptions += 1
        return original(*args, **kwargs)

    engine.scheduler._preempt_request = count
    try:
        engine.run(jobs)
        engine.check_idle()
    finally:
        engine.close()
    assert preemptions > 0
    print(f"{preemptions} preemptions")
    assert_parity(model, jobs, WINDOW, min_folds=25)


def test_no_leaks_over_300_requests(model: Path, adapter: Path, adapters: Callable) -> None:
    engine = Engine(
        model,
        window_tokens=2 * BLOCK,
        lora_rank=8,
        num_blocks=48,
        max_num_seqs=16,
        max_prompt_tokens=128,
    )
    choices = [
        None,
        lora("ridge", adapter, 1),
        lora("paper", adapters(model, rank=8, rule="paper"), 2),
        lora("plain", adapters(model, plain=True, rank=8), 3),
    ]
    probes = [Job(random_tokens(40, 500, 1), 200, a, seed=5) for a in choices]
    engine.run(probes)
    before = [job.tokens for job in probes]
    rng = random.Random(0)
    aborted = 0

    def disturb(step: int, request_ids: list[str]) -> None:
        nonlocal aborted
        running = engine.scheduler.running
        if step % 5 == 4 and running:
            victim = rng.choice([r.request_id for r in engine.scheduler.requests.values()])
            engine.engine.abort_request([victim], internal=True)
            aborted += 1
        if step % 11 == 10 and len(engine.scheduler.running) > 1:
            engine.preempt(rng.randrange(-1, 1))

    try:
        for batch in range(6):
            jobs = [
                Job(
                    random_tokens(rng.randrange(1, 120), 500, batch * 50 + i),
                    rng.randrange(1, 90),
                    rng.choice(choices),
                    {"pte_window": rng.choice([0, 2 * BLOCK, 3 * BLOCK])},
                )
                for i in range(50)
            ]
            engine.run(jobs, disturb)
            engine.check_idle()
        assert aborted > 60
        again = [Job(job.prompt, job.max_tokens, job.adapter, seed=5) for job in probes]
        engine.run(again)
        assert [job.tokens for job in again] == before
        engine.check_idle()
    finally:
        engine.close()


def test_window_zero_is_vllm(model: Path, adapters: Callable[..., Path]) -> None:
    """With the plugin and `pte_window: 0`, the tokens are those of vLLM started without it."""
    plain = adapters(model, plain=True, rank=8)

    def jobs() -> list[Job]:
        return [
            Job(
                random_tokens(20 + 31 * i, 500, i),
                200,
                None if i % 2 else lora("p", plain, 1),
                seed=i,
            )
            for i in range(6)
        ]

    ours, theirs = jobs(), jobs()
    engine = Engine(model, window_tokens=WINDOW, lora_rank=8)
    for job in ours:
        job.options["pte_window"] = 0
    try:
        engine.run(ours)
        engine.check_idle()
    finally:
        engine.close()
    vanilla = Engine(model, pte=False, lora_rank=8)
    try:
        vanilla.run(theirs)
    finally:
        vanilla.close()
    assert [job.tokens for job in ours] == [job.tokens for job in theirs]


def test_parallel_samples(model: Path, adapter: Path) -> None:
    """n > 1: each choice has its own state."""
    engine = Engine(model, window_tokens=2 * BLOCK, lora_rank=8)
    try:
        collected = {}
        engine.engine.add_request(
            "group",
            {"prompt_token_ids": random_tokens(50, 500, 1)},
            Job([], 200, n=3, temperature=1.0).params(3),
            lora_request=lora("ridge", adapter, 1),
        )
        while engine.engine.has_unfinished_requests():
            for output in engine.engine.step():
                collected = {c.index: c for c in output.outputs}
        assert sorted(collected) == [0, 1, 2]
        jobs = []
        for choice in collected.values():
            job = Job(random_tokens(50, 500, 1), 200, lora("ridge", adapter, 1))
            job.tokens, job.finished = list(choice.token_ids), True
            job.logprobs = [e[t].logprob for t, e in zip(job.tokens, choice.logprobs, strict=True)]
            jobs.append(job)
        assert len({tuple(job.tokens) for job in jobs}) == 3
        assert_parity(model, jobs, 2 * BLOCK, min_folds=4)
        engine.check_idle()
    finally:
        engine.close()


def test_adapters_leave_no_memory_behind(model: Path, adapter: Path) -> None:
    """As trainers push: ever new adapters, of which vLLM keeps four."""
    engine = Engine(model, window_tokens=WINDOW, num_blocks=130, lora_rank=8)
    try:
        before = _encoders_in_memory()
        for number in range(1, 12):
            engine.engine.add_lora(lora(f"v{number}", adapter, number))
        assert engine.engine.list_loras() == {8, 9, 10, 11}
        assert _encoders_in_memory() - before == 4
        # The oldest is gone; a request that names it has it again, exactly.
        jobs = [Job(random_tokens(40, 500, 3), 300, lora("v1", adapter, 1))]
        assert_parity(model, engine.run(jobs), WINDOW, min_folds=4)
        assert engine.engine.list_loras() == {1, 9, 10, 11}
        assert _encoders_in_memory() - before == 4
    finally:
        engine.close()


def _encoders_in_memory() -> int:
    """Count the encoders that this process holds, whoever holds them."""
    gc.collect()
    return sum(type(thing) is LoadedEncoder for thing in gc.get_objects())
