"""Requests start when their whole windows fit, so that a small pool computes nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.engine import BLOCK, Engine, Job, lora
from tests.harness.models import random_tokens
from tests.harness.parity import assert_parity

WINDOW = 2 * BLOCK
PEAK = 1 + 2 + 1
"""Blocks of a sequence with one block of question, its window, and one to run ahead."""


class Watched:
    """An engine that counts what it preempts and how many run in a step.

    Args:
        options: What its engine is made with.
    """

    def __init__(self, model: Path, **options) -> None:
        self.engine = Engine(
            model,
            window_tokens=WINDOW,
            lora_rank=8,
            max_num_seqs=32,
            max_model_len=1024,
            max_prompt_tokens=4 * BLOCK,
            **options,
        )
        self.preemptions = 0
        self.running: list[int] = []
        original = self.engine.scheduler._preempt_request

        def preempt(*args, **kwargs):
            self.preemptions += 1
            return original(*args, **kwargs)

        self.engine.scheduler._preempt_request = preempt

    def run(self, jobs: list[Job]) -> list[Job]:
        """Run jobs to the end."""

        def on_step(step: int, request_ids: list[str]) -> None:
            self.running.append(len(self.engine.scheduler.running))
            self.engine.scheduler.pte_check_integrity()

        return self.engine.run(jobs, on_step)


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture
def watched(model: Path) -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(**options) -> Watched:
        made.append(Watched(model, **options))
        return made[-1]

    yield make
    for each in made:
        each.engine.check_idle()
        each.engine.close()


def questions(count: int, tokens: int, adapter=None, **options) -> list[Job]:
    return [Job(random_tokens(20, 500, i), tokens, adapter, dict(options)) for i in range(count)]


@pytest.mark.parametrize("async_scheduling", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_full_pool_computes_nothing_twice(
    async_scheduling: bool,
    model: Path,
    watched: Callable[..., Watched],
    adapters: Callable[..., Path],
) -> None:
    thoughts = lora("ridge", adapters(model, rank=8, rule="ridge"), 1)
    roomy = watched(num_blocks=5 * PEAK, async_scheduling=async_scheduling)
    jobs = roomy.run(questions(20, 200, thoughts))
    assert roomy.preemptions == 0
    assert max(roomy.running) == 5  # the pool is used, too
    assert_parity(model, jobs, WINDOW, min_folds=3)
    crowded = watched(num_blocks=5 * PEAK, async_scheduling=async_scheduling, reserve_windows=False)
    crowded.run(questions(20, 200, thoughts))
    assert crowded.preemptions > 0


def test_short_answers_need_no_whole_window(watched: Callable[..., Watched]) -> None:
    engine = watched(num_blocks=5 * PEAK)
    engine.run(questions(20, 8))
    assert max(engine.running) == 20  # a block each
    assert engine.preemptions == 0


def test_a_shared_question_counts_once(watched: Callable[..., Watched]) -> None:
    engine = watched(num_blocks=4 + 6 * 3, enable_prefix_caching=True)
    question = random_tokens(4 * BLOCK, 500, 1)
    engine.run([Job(question, 1)])
    jobs = [Job(question, 200, None, {}, seed=i) for i in range(6)]
    engine.run(jobs)
    # Three of its four blocks are found by all; each computes the fourth, and has its window.
    assert engine.preemptions == 0
    assert max(engine.running) == (4 + 6 * 3 - 3) // (1 + 2 + 1)


def test_what_exceeds_the_room_waits_and_runs_alone(watched: Callable[..., Watched]) -> None:
    engine = watched(num_blocks=12)
    large = Job(random_tokens(20, 500, 99), 150, None, {"pte_window": 9 * BLOCK})  # 11 blocks
    unbounded = Job(random_tokens(20, 500, 98), 300, None, {"pte_window": 0})
    jobs = [*questions(3, 150), large, *questions(3, 150), unbounded]
    engine.run(jobs)
    assert all(len(job.tokens) == job.max_tokens for job in jobs)
