"""Generated conversations: answers follow from what was told, as many turns before as they say."""

from __future__ import annotations

import random

import pytest

from pte_vllm.train.data.memory_tasks import ASSISTANT, NODES, USER, VOCABULARY, fact_of, node_token
from pte_vllm.train.data.turn_tasks import (
    TURN_TASKS,
    Conversation,
    Layout,
    draw_batch,
    draw_conversation,
)


def solve(conversation: Conversation) -> tuple[list[int], list[int]]:
    """Every answer by looking up what was told last, and how many turns ago that was."""
    known: dict[int, tuple[int, int]] = {}
    turn, found, distances = -1, [], []
    for t, token in enumerate(conversation.ids):
        turn += token == USER
        fact = fact_of(token)
        if fact is not None:
            known[node_token(fact[0])] = (node_token(fact[1]), turn)
        if conversation.answers[t]:
            value, told = known[conversation.ids[t - 1]]
            found.append(value)
            distances.append(turn - told)
    return found, distances


@pytest.mark.parametrize("distances", [(1, 1), (1, 8), (15, 15)])
@pytest.mark.parametrize("task", TURN_TASKS)
def test_answers_follow_from_what_was_told(task: str, distances: tuple[int, int]) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        made = draw_batch(rng, 3, turns=20, facts=4, distances=distances, tasks=[task])
        assert len({(c.questions, len(c.ids)) for c in made}) == 1  # one layout
        for conversation in made:
            right = [t for t, w in zip(conversation.ids, conversation.answers, strict=True) if w]
            found, since = solve(conversation)
            assert found == right and since == conversation.distances and len(found) == 4
            assert all(distances[0] <= distance <= distances[1] for distance in since)
            assert max(conversation.ids) < VOCABULARY


def test_questions_reach_from_header_to_header() -> None:
    conversation = draw_conversation(
        random.Random(3), "tool", Layout.draw(random.Random(3), 12), facts=3, distances=(2, 6)
    )
    assert len(conversation.questions) == 12
    for number, (first, end) in enumerate(conversation.questions):
        assert conversation.ids[first if number else 1] == USER
        assert conversation.ids[end - 1] == ASSISTANT
        assert conversation.ids[first + 1 : end].count(USER) == (number == 0)
    assert conversation.pin_tokens == conversation.questions[0][1]
    assert conversation.pin_spans == conversation.questions[1:]
    told = next(t for t, token in enumerate(conversation.ids) if fact_of(token) is not None)
    assert told > conversation.questions[1][0]  # nothing in the turn that is pinned for ever


def test_a_tool_sets_what_is_asked_for_twice() -> None:
    """What was set last holds: whoever remembers the first value only is wrong."""
    stale = 0
    for seed in range(20):
        (conversation,) = draw_batch(
            random.Random(seed), 1, turns=20, facts=4, distances=(4, 4), tasks=["tool"]
        )
        asked = {conversation.ids[t - 1] for t, a in enumerate(conversation.answers) if a}
        told = [node_token(fact[0]) for fact in map(fact_of, conversation.ids) if fact is not None]
        assert asked <= set(told) and set(told) - asked
        stale += sum(told.count(key) > 1 for key in asked)
    assert stale > 60  # of 80; for some there was no turn before


def test_what_does_not_fit() -> None:
    layout = Layout.draw(random.Random(0), 8)
    for task, facts, distances, message in (
        ("walk", 1, (1, 2), "walk"),
        ("facts", 1, (0, 2), "must be positive"),
        ("facts", 0, (1, 2), "must be positive"),
        ("facts", 3, (6, 6), "8 turns have no room for 3 facts that are asked 6 later"),
        ("facts", NODES, (1, 2), "no room"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_conversation(random.Random(0), task, layout, facts=facts, distances=distances)
