"""Ledgers: the task, and what of an answer is judged."""

from __future__ import annotations

import random

import pytest

from pte_vllm.eval.benchmarks import load_problems
from pte_vllm.train.data.ledger import Ledger, look_ups, share_right
from pte_vllm.train.data.sources import open_source
from pte_vllm.train.options.runs import DataOptions
from pte_vllm.train.rewards.functions import score

LEDGER = Ledger(
    start={"Anna": 30, "Ben": 42, "Carl": 9},
    events=(("Anna", "Ben", 4), ("Carl", "Anna", 2), ("Ben", "Carl", 5)),
)
ANSWER = """\
1. Anna gives Ben 4 coins: Anna had 30 and now has 30 - 4 = 26. Ben had 42 and now has 42 + 4 = 46.
2. Carl gives Anna 2 coins: Carl had 9 and now has 9 - 2 = 7. Anna had 26 and now has 26 + 2 = 28.
3. Ben gives Carl 5 coins: Ben had 46 and now has 46 - 5 = 41. Carl had 7 and now has 7 + 5 = 12."""


def test_the_right_answer() -> None:
    assert "\n".join(LEDGER.lines()) == ANSWER
    assert share_right(LEDGER, ANSWER) == 1
    assert [(x.event, x.name, x.since) for x in look_ups(LEDGER, ANSWER)] == [
        *((1, "Anna", 1), (1, "Ben", 1)),
        *((2, "Carl", 2), (2, "Anna", 1)),
        *((3, "Ben", 2), (3, "Carl", 1)),
    ]


@pytest.mark.parametrize(
    ("wrong", "right", "share"),
    [
        ("Anna had 26", "Anna had 27", 5 / 6),
        # A wrong sum is no wrong look-up where the answer goes on from it, and is one where not.
        ("= 46.", "= 47.", 5 / 6),
        ("46", "47", 1),
        ("2. Carl", "7. Carl", 3 / 6),  # a line is missing, and Carl is then not at 7 but at 9
        ("3. Ben", "4. Ben", 4 / 6),
    ],
)
def test_mistakes(wrong: str, right: str, share: float) -> None:
    changed = ANSWER.replace(wrong, right)
    assert changed != ANSWER
    assert share_right(LEDGER, changed) == pytest.approx(share)


def test_drawn() -> None:
    for seed in range(50):
        made = Ledger.draw(random.Random(seed), people=3, events=40)
        held = dict(made.start)
        for giver, receiver, coins in made.events:
            held[giver] -= coins
            held[receiver] += coins
            assert giver != receiver and coins > 0 and min(held.values()) >= 0
        assert share_right(made, "\n".join(made.lines())) == 1
        assert share_right(made, "") == 0
        assert Ledger.from_meta(made.to_meta()) == made


def test_as_questions() -> None:
    options = DataOptions(source="ledger", task_options={"people": 4, "events": 30})
    source = open_source(options)
    problem = source.problem(7)
    assert problem.reward == "ledger" and "30. " in problem.prompt[0]["content"]  # type: ignore[index]
    assert score(problem, str(problem.answer), ()) == 1
    assert source.problem(7) == problem != source.problem(8)
    assert len(load_problems("ledger-48", limit=3)) == 3
    for wrong, message in (
        ({"people": 1}, "people must be at least 2"),
        ({"people": 99}, "people must be at most 12"),
        ({"events": 2}, "events must be at least 3"),
        ({"event": 5}, "event unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(DataOptions(source="ledger", task_options=wrong))
