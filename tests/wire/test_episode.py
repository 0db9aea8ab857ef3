"""Records of an episode's requests become one record for each conversation in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pte_vllm.method.plan import FoldPlan
from pte_vllm.wire.episode import join_episodes, join_turns
from pte_vllm.wire.rollout import Rollout, WeightSpan

PLAN = FoldPlan(pin_tokens=2, window_tokens=64, block_size=16)


def _turn(prompt: tuple[int, ...], answer: tuple[int, ...], **plan: object) -> Rollout:
    spans = (WeightSpan(version=3, start=0, end=len(answer)),) if answer else ()
    return Rollout(
        prompt_ids=prompt,
        completion_ids=answer,
        logprobs=(-0.5,) * len(answer),
        mask=(1,) * len(answer),
        finish_reason="stop",
        adapter="policy@3",
        weight_versions=spans,
        plan=replace(PLAN, **plan),
        group_id="episode",
        index=0,
        num_preempted=0,
    )


def test_turns_that_go_on_are_one() -> None:
    turns = [
        _turn((1, 2), (3, 4)),
        _turn((1, 2, 3, 4, 5, 6), (7,), pin_spans=((4, 6),)),
        _turn((1, 2, 3, 4, 5, 6, 7, 8), (9, 10), pin_spans=((4, 6),)),
    ]
    (episode,) = join_episodes(turns)
    assert episode == join_turns(turns)
    assert episode.token_ids == tuple(range(1, 11))
    assert episode.mask == (1, 1, 0, 0, 1, 0, 1, 1)
    assert episode.logprobs == (-0.5, -0.5, 0, 0, -0.5, 0, -0.5, -0.5)
    assert episode.plan.pin_spans == ((4, 6),)


@pytest.mark.parametrize(
    "other",
    [
        _turn((1, 2, 9, 5), (7,)),  # an answer that was rewritten
        _turn((8, 8), (7,)),  # another agent
        _turn((1, 2, 3, 4, 5), (7,), pin_tokens=5),  # another plan
        _turn((1, 2, 3), (7,)),  # another answer to the same question
    ],
)
def test_what_does_not_go_on_is_a_conversation_of_its_own(other: Rollout) -> None:
    first, later = _turn((1, 2), (3, 4)), _turn((1, 2, 3, 4, 5, 6), (7,))
    assert join_episodes([first, other]) == [first, other]
    assert join_episodes([first, other, later]) == [join_turns([first, later]), other]


def test_the_longest_conversation_goes_on() -> None:
    """Where two agents began alike, a turn belongs to the one that said more of it."""
    first, second = _turn((1, 2), (3, 4)), _turn((1, 2, 3), (4, 5))
    later = _turn((1, 2, 3, 4, 5, 6), (7,))
    assert join_episodes([first, second, later]) == [first, join_turns([second, later])]
    assert join_episodes([first, _turn((1, 2), ())]) == [first] and join_episodes([]) == []
