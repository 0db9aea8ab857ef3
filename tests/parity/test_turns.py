"""Conversations: the newest question stays, everything between folds, and nothing is lost by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness.conversations import WINDOW, Conversation, conversations, talk
from tests.harness.engine import BLOCK, Engine, lora
from tests.harness.models import random_tokens


@pytest.fixture(scope="module")
def engine(model: Path, probes: Path) -> Iterator[Engine]:
    engine = Engine(
        model, window_tokens=WINDOW, lora_rank=8, probes=probes, num_blocks=600, max_model_len=8192
    )
    yield engine
    engine.check_idle()
    engine.close()


@pytest.fixture
def started(model: Path, adapters: Callable[..., Path]) -> list[Conversation]:
    return conversations(model, adapters)


def test_twelve_turns_of_five_conversations(
    engine: Engine, model: Path, started: list[Conversation]
) -> None:
    most = 0

    def on_step(step: int, request_ids: list[str]) -> None:
        nonlocal most
        manager = engine.scheduler.pte_manager
        engine.scheduler.pte_check_integrity()
        held = [manager.num_held_blocks(r.request_id) for r in engine.scheduler.running]
        most = max(most, *held, 0)

    talk(engine, started, on_step)
    for i, conversation in enumerate(started):
        worst = conversation.assert_parity(model)
        plan = conversation.jobs[-1].plan(WINDOW)
        # Hits take the place of most of the history.
        cached = [job.cached_tokens / len(job.prompt) for job in conversation.jobs[1:]]
        print(
            f"conversation {i}: {len(conversation.history)} tokens, "
            f"{plan.folds(len(conversation.history) - 1)} folds, "
            f"{sum(cached) / len(cached):.2f} cached, max |Δ log p| {worst:.1e}"
        )
        assert sum(cached) / len(cached) > 0.5
    # Whatever the number of turns: two questions, what is kept, a window and the newest block.
    bound = max(c.jobs[-1].plan(WINDOW).peak_blocks(10**6) for c in started)
    print(f"at most {most} blocks at once, {bound} may be held")
    assert 0 < most <= bound


@pytest.mark.slow
def test_a_hundred_turns(engine: Engine, model: Path, adapters: Callable[..., Path]) -> None:
    """The longest question has 70 tokens: what is held stays within the bound to the end."""
    adapter = lora("ridge", adapters(model, rank=8, rule="ridge", features="squared"), 1)
    started = [Conversation(7, adapter, answers=(9, 2, 14), pte_keep=BLOCK)]
    held: list[int] = []

    def on_step(step: int, request_ids: list[str]) -> None:
        manager = engine.scheduler.pte_manager
        held.extend(manager.num_held_blocks(r.request_id) for r in engine.scheduler.running)

    talk(engine, started, on_step, turns=100)
    plan = started[0].jobs[-1].plan(WINDOW)
    print(f"{len(started[0].history)} tokens, {max(held)} blocks of {plan.peak_blocks(10**6)}")
    assert max(held[-100:]) <= max(held) <= plan.peak_blocks(10**6) <= 13
    started[0].assert_parity(model)


def test_preempted(engine: Engine, model: Path, started: list[Conversation]) -> None:
    preempted = 0

    def on_step(step: int, request_ids: list[str]) -> None:
        nonlocal preempted
        if step % 23 == 22 and len(engine.scheduler.running) > 1:
            engine.preempt(preempted % 2 - 1)
            preempted += 1

    talk(engine, started, on_step)
    assert preempted > 10
    for conversation in started:
        conversation.assert_parity(model)


def test_forks(engine: Engine, model: Path, started: list[Conversation]) -> None:
    """Two answers to one question, each of which goes on by itself."""
    for conversation in started:
        for _ in range(6):
            engine.run([conversation.next_turn()])
            conversation.finish_turn()
        last = conversation.jobs[-1]
        question = random_tokens(20, 500, 77)
        branches = []
        for seed in (1, 2):
            prompt = conversation.history + question
            spans = (*last.options["pte_pin_spans"], (len(conversation.history), len(prompt)))
            options = last.options | {"pte_pin_spans": spans}
            branches.append(replace(last, prompt=prompt, options=options, seed=seed, max_tokens=99))
        engine.run(branches)
        assert branches[0].tokens != branches[1].tokens
        for branch in branches:
            conversation.jobs.append(branch)
            conversation.finish_turn()
            conversation.assert_parity(model)
            conversation.jobs.pop()
