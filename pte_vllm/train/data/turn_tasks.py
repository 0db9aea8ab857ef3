"""Generated conversations, as token ids: what one turn told, a turn long after it asks for.

The world is that of `memory_tasks`: a fact is one token that maps a key to a value. A turn is

    USER … [fact] … [key] ASSISTANT | [key value] [RESULT fact] …
    question, pinned until the next one    answer, a thought

and all else in it is noise. Two tasks:

- `facts`: the user tells a fact. A later turn asks for the key, and its answer is the value.
- `tool`: a store of values. An answer calls the tool, which returns a fact. What is asked for later
  was set twice, and the last value holds. Half of the other turns call the tool for other keys.

The first turn tells nothing, as it is pinned for ever. How many turns lie between telling and
asking is what counts, so each question says how many. Conversations of one layout have their turns
in the same places, so that they can be replayed side by side.

Standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from pte_vllm.train.data.memory_tasks import (
    ASSISTANT,
    BOS,
    NODES,
    RESULT,
    USER,
    fact_token,
    node_token,
    noise,
)

TURN_TASKS = ("facts", "tool")
QUESTION_TOKENS, ANSWER_TOKENS = (4, 6), (4, 6)
"""Least and most tokens of a question, its markers included, and of an answer."""
_TRIES = 200
"""How often to draw turns anew, before there is found to be no room."""


@dataclass(frozen=True)
class Layout:
    """How long each question and each answer of a conversation is, in tokens."""

    turns: tuple[tuple[int, int], ...]

    @classmethod
    def draw(cls, rng: random.Random, turns: int) -> Layout:
        """Draw the lengths of so many turns."""
        drawn = ((rng.randint(*QUESTION_TOKENS), rng.randint(*ANSWER_TOKENS)) for _ in range(turns))
        return cls(tuple(drawn))

    @property
    def questions(self) -> tuple[tuple[int, int], ...]:
        """Return the tokens of each question, as ranges `[start, end)`; the first begins at 0."""
        starts = accumulate((q + a for q, a in self.turns[:-1]), initial=1)  # after BOS
        spans = [(start, start + q) for start, (q, _) in zip(starts, self.turns, strict=True)]
        return ((0, spans[0][1]), *spans[1:])


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation, for supervised training and scoring."""

    task: str
    ids: list[int]
    questions: tuple[tuple[int, int], ...]
    """The tokens of each question, as ranges `[start, end)`."""
    answers: list[bool]
    """By token: whether it is a value that was asked for."""
    distances: list[int]
    """By value asked for, in order: how many turns before it was told."""

    @property
    def pin_tokens(self) -> int:
        """Return how many tokens the first question has, which is pinned for ever."""
        return self.questions[0][1]

    @property
    def pin_spans(self) -> tuple[tuple[int, int], ...]:
        """Return the later questions, each pinned until the next one begins."""
        return self.questions[1:]


@dataclass
class _Turn:
    """What one turn holds besides noise."""

    told: int | None = None
    """A fact that the user tells."""
    called: int | None = None
    """A fact that a tool returns."""
    asked: tuple[int, int] | None = None
    """A key and the value that it has."""
    since: int = field(default=0)
    """How many turns ago that was told."""


def draw_conversation(
    rng: random.Random,
    task: str,
    layout: Layout,
    *,
    facts: int,
    distances: tuple[int, int],
) -> Conversation:
    """Make a conversation.

    Args:
        rng: makes all choices.
        task: of `TURN_TASKS`.
        layout: the lengths of its turns.
        facts: how many values are told and asked for.
        distances: least and most turns between telling and asking.

    Raises:
        ValueError: on an unknown task, or if the turns have no room for so many facts.
    """
    if task not in TURN_TASKS:
        raise ValueError(f"task must be one of {', '.join(TURN_TASKS)}, got {task!r}")
    count = len(layout.turns)
    places = _places(rng, count, facts, distances)
    keys = rng.sample(range(NODES), facts)
    turns = [_Turn() for _ in range(count)]
    for key, (told, asked) in zip(keys, places, strict=True):
        value = rng.randrange(NODES)
        fact = fact_token(key, value)
        if task == "facts":
            turns[told].told = fact
        else:
            turns[told].called = fact
            free = [t for t in range(1, told) if turns[t].called is None]
            free = [t for t in free if all(t != place[0] for place in places)]
            if free:  # what was set before no longer holds
                turns[rng.choice(free)].called = fact_token(key, rng.randrange(NODES))
        turns[asked].asked = (key, value)
        turns[asked].since = asked - told
    if task == "tool":
        others = [node for node in range(NODES) if node not in keys]
        for turn in turns[1:]:
            if turn.called is None and turn.asked is None and rng.random() < 0.5:
                turn.called = fact_token(rng.choice(others), rng.randrange(NODES))
    return _written(rng, task, layout, turns)


def _places(
    rng: random.Random, turns: int, facts: int, distances: tuple[int, int]
) -> list[tuple[int, int]]:
    """Draw for each fact the turn that tells it and the one that asks; no two share either."""
    low, high = distances
    if not 1 <= low <= high or facts < 1:
        raise ValueError(f"facts and distances must be positive, got {facts} and {distances}")
    if high <= turns - 2:
        for _ in range(_TRIES):
            told: dict[int, int] = {}
            for _ in range(facts):
                distance = rng.randint(low, high)
                taken = set(told.values())
                free = [t for t in range(1, turns - distance) if t not in told]
                free = [t for t in free if t + distance not in taken]
                if free:
                    first = rng.choice(free)
                    told[first] = first + distance
            if len(told) == facts:
                return list(told.items())
    raise ValueError(f"{turns} turns have no room for {facts} facts that are asked {high} later")


def _written(rng: random.Random, task: str, layout: Layout, turns: Sequence[_Turn]) -> Conversation:
    ids, answers, distances = [BOS], [False], []
    for turn, (question_tokens, answer_tokens) in zip(turns, layout.turns, strict=True):
        said = [turn.told] if turn.told is not None else []
        named = [node_token(turn.asked[0])] if turn.asked is not None else []
        room = question_tokens - 2 - len(said) - len(named)
        before = rng.randint(0, room)
        ids += [USER, *noise(rng, before), *said, *noise(rng, room - before), *named, ASSISTANT]
        answer = [] if turn.asked is None else [node_token(node) for node in turn.asked]
        marks = [False] * question_tokens + [False, True][: len(answer)]
        if turn.called is not None:
            answer += [RESULT, turn.called]
        answers += marks + [False] * (question_tokens + answer_tokens - len(marks))
        ids += answer + noise(rng, answer_tokens - len(answer))
        if turn.asked is not None:
            distances.append(turn.since)
    return Conversation(
        task=task,
        ids=ids,
        questions=layout.questions,
        answers=answers,
        distances=distances,
    )


def draw_batch(
    rng: random.Random,
    size: int,
    *,
    turns: int,
    facts: int,
    distances: tuple[int, int],
    tasks: Sequence[str] = TURN_TASKS,
) -> list[Conversation]:
    """Make `size` conversations of one layout, which take turns among `tasks`.

    Raises:
        ValueError: as `draw_conversation` does.
    """
    layout = Layout.draw(rng, turns)
    return [
        draw_conversation(rng, tasks[i % len(tasks)], layout, facts=facts, distances=distances)
        for i in range(size)
    ]
