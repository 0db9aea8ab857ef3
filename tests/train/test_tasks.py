"""The memory tasks: answers follow from the facts, and nothing in the gap gives them away."""

from __future__ import annotations

import random

import pytest

from pte_vllm.train.data.memory_tasks import (
    MAX_FACTS,
    NODES,
    TASKS,
    VOCABULARY,
    MemorySequence,
    fact_of,
    node_token,
    sample_batch,
)


def solve(sample: MemorySequence) -> list[int]:
    """Every answer by looking facts up, the latest first; 0 where nothing is asked."""
    known: dict[int, int] = {}
    found = [0] * len(sample.ids)
    for t, token in enumerate(sample.ids):
        fact = fact_of(token)
        if fact is not None:
            known[node_token(fact[0])] = node_token(fact[1])
        if sample.answers[t]:
            found[t] = known[sample.ids[t - 1]]
    return found


@pytest.mark.parametrize("facts", [1, 6, MAX_FACTS])
@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_facts(task: str, facts: int) -> None:
    if task == "chase" and facts > 18:
        facts = 18  # chains of four nodes each, out of NODES
    for seed in range(20):
        sample = TASKS[task].sample(random.Random(seed), gap_tokens=48, facts=facts)
        solved = solve(sample)
        assert any(sample.answers) and max(sample.ids) < VOCABULARY
        for t, counts in enumerate(sample.answers):
            if counts:
                assert sample.ids[t] == solved[t]


@pytest.mark.parametrize("gap_tokens", [0, 5, 100])
@pytest.mark.parametrize("task", TASKS)
def test_the_gap_holds_no_answer(task: str, gap_tokens: int) -> None:
    sample = TASKS[task].sample(random.Random(1), gap_tokens=gap_tokens, facts=6)
    first = sample.answers.index(True) - 1
    asked = {sample.ids[t - 1] for t, counts in enumerate(sample.answers) if counts}
    gap = sample.ids[first - gap_tokens : first]
    keys = {node_token(fact[0]) for fact in map(fact_of, gap) if fact is not None}
    assert len(gap) == gap_tokens and not keys & asked
    assert fact_of(sample.ids[first - gap_tokens - 1]) is not None


def test_problems_ask_the_first_question() -> None:
    sample = TASKS["recall"].sample(random.Random(2), gap_tokens=20, facts=3)
    problem = sample.problem()
    assert problem.prompt_ids + problem.answer_ids == sample.ids[: len(problem.prompt_ids) + 1]
    assert problem.pin_tokens == sample.pin_tokens


def test_batches_take_turns_and_refuse_what_does_not_fit() -> None:
    batch = sample_batch(random.Random(3), 8, gap_tokens=(10, 20), facts=3)
    assert [sample.task for sample in batch] == [*TASKS, *TASKS]
    assert all(10 <= sample.gap_tokens <= 20 for sample in batch)
    with pytest.raises(ValueError, match="walk"):
        sample_batch(random.Random(3), 8, gap_tokens=(10, 20), tasks=["walk"])
    for options in ({"gap_tokens": -1}, {"gap_tokens": 3, "facts": NODES}):
        with pytest.raises(ValueError, match="must"):
            TASKS["recall"].sample(random.Random(3), **options)
