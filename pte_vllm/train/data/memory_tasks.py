"""Generated memory tasks, as token ids: what was said must be known long after it left the window.

One small world for all tasks. A *fact* `a→b` is one token that maps a node to a node; where a node
is mapped twice, the later fact holds. A node token asks for the node it maps to, so a question and
its answer are the tokens `a b`. A sequence is

    pinned instruction | body, with the facts that will be asked | gap | questions and answers

Between the last fact that is asked and the first question lie exactly `gap_tokens` tokens. They
hold nothing that answers a question: distractor facts about other nodes, or noise.

Standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NODES = 32
"""Nodes, and so keys and values of facts. A blind guess is right once in `NODES` times."""
NOISE_TOKENS = 16
PIN_TOKENS = 8
"""How many tokens the instruction has."""

_INSTRUCTION = 1  # one id for each task
_MAX_TASKS = 7  # the last three ids are markers of conversations
_NODE = _INSTRUCTION + _MAX_TASKS
_NOISE = _NODE + NODES
_FACT = _NOISE + NOISE_TOKENS
VOCABULARY = _FACT + NODES * NODES
BOS = 0
USER, ASSISTANT, RESULT = range(_NODE - 3, _NODE)
"""Tokens that no task of this module uses; conversations do (`turn_tasks`)."""


def node_token(node: int) -> int:
    """Return the token that names a node: an answer, or a question about it."""
    return _NODE + node


def fact_token(key: int, value: int) -> int:
    """Return the token that says `key→value`."""
    return _FACT + key * NODES + value


def fact_of(token: int) -> tuple[int, int] | None:
    """Return `(key, value)` of a fact's token; None for any other token."""
    return divmod(token - _FACT, NODES) if token >= _FACT else None


@dataclass(frozen=True, kw_only=True)
class MemoryQuestion:
    """One question, for reinforcement learning: the answer is to be generated."""

    prompt_ids: list[int]
    answer_ids: list[int]
    pin_tokens: int
    """Tokens at the start that are never folded; the rest of the prompt counts as thoughts."""


@dataclass(frozen=True, kw_only=True)
class MemorySequence:
    """One sequence with questions and answers, for supervised training and scoring."""

    task: str
    ids: list[int]
    pin_tokens: int
    gap_tokens: int
    """Tokens between the last fact that is asked and the first question."""
    answers: list[bool]
    """By token: whether it is an answer that counts."""

    def problem(self) -> MemoryQuestion:
        """Cut the sequence off at its first answer, which is then to be generated."""
        first = self.answers.index(True)
        last = next((t for t in range(first, len(self.ids)) if not self.answers[t]), len(self.ids))
        return MemoryQuestion(
            prompt_ids=self.ids[:first],
            answer_ids=self.ids[first:last],
            pin_tokens=self.pin_tokens,
        )


Body = tuple[list[int], list[list[int]], set[int]]
"""Tokens up to the last fact asked; questions as nodes `[asked, answer, ...]`; their keys."""


def _recall(rng: random.Random, facts: int) -> Body:
    keys = rng.sample(range(NODES), facts)
    pairs = [(key, rng.randrange(NODES)) for key in keys]
    body = [fact_token(*pair) for pair in pairs]
    rng.shuffle(pairs)
    return body, [list(pair) for pair in pairs], set(keys)


def _passkey(rng: random.Random, facts: int) -> Body:
    """State a third of the facts that `recall` has, each after some noise."""
    keys = rng.sample(range(NODES), max(1, facts // 3))
    pairs = [(key, rng.randrange(NODES)) for key in keys]
    body = []
    for pair in pairs:
        body += [*noise(rng, rng.randrange(4)), fact_token(*pair)]
    rng.shuffle(pairs)
    return body, [list(pair) for pair in pairs], set(keys)


ASSIGNMENTS = 3


def _state(rng: random.Random, facts: int) -> Body:
    """Assign to each of a few variables several times; asked is what holds at the end."""
    variables = rng.sample(range(NODES), max(1, facts // 3))
    body, values = [], dict.fromkeys(variables, 0)
    for turn in range(ASSIGNMENTS):
        body += noise(rng, 8 if turn else 0)
        for variable in rng.sample(variables, len(variables)):
            values[variable] = rng.randrange(NODES)
            body.append(fact_token(variable, values[variable]))
    questions = [list(pair) for pair in values.items()]
    rng.shuffle(questions)
    return body, questions, set(variables)


HOPS = 3


def _chase(rng: random.Random, facts: int) -> Body:
    """State chains of `HOPS` facts, in any order; an answer names each node on the way."""
    chains = max(1, facts // HOPS)
    nodes = rng.sample(range(NODES), chains * (HOPS + 1))
    questions = [nodes[i : i + HOPS + 1] for i in range(0, len(nodes), HOPS + 1)]
    pairs = [pair for chain in questions for pair in zip(chain, chain[1:], strict=False)]
    rng.shuffle(pairs)
    return [fact_token(*pair) for pair in pairs], questions, {key for key, _ in pairs}


def noise(rng: random.Random, count: int) -> list[int]:
    """Return tokens that say nothing."""
    return [_NOISE + rng.randrange(NOISE_TOKENS) for _ in range(count)]


def _distractors(rng: random.Random, count: int, asked: set[int]) -> list[int]:
    others = [node for node in range(NODES) if node not in asked]
    return [fact_token(rng.choice(others), rng.randrange(NODES)) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class Task:
    """How one task makes its sequences."""

    name: str
    about: str
    body: Callable[[random.Random, int], Body]
    distractors: bool
    """Whether the gap holds facts about other nodes; else it holds noise."""

    def sample(self, rng: random.Random, *, gap_tokens: int, facts: int = 6) -> MemorySequence:
        """Make one sequence.

        Args:
            rng: makes all choices.
            gap_tokens: how many tokens lie between the last fact that is asked and the first
                question.
            facts: how many facts the sequence holds; tasks that ask less per fact hold fewer.

        Raises:
            ValueError: if a number is out of range.
        """
        if gap_tokens < 0:
            raise ValueError(f"gap_tokens must not be negative, got {gap_tokens}")
        if not 1 <= facts <= MAX_FACTS:
            raise ValueError(f"facts must lie in [1, {MAX_FACTS}], got {facts}")
        index = list(TASKS).index(self.name)
        body, questions, asked = self.body(rng, facts)
        ids = [BOS] + [_INSTRUCTION + index] * (PIN_TOKENS - 1) + body
        fill = _distractors(rng, gap_tokens, asked) if self.distractors else noise(rng, gap_tokens)
        ids += fill
        answers = [False] * len(ids)
        for question in questions:
            ids += [node_token(node) for node in question]
            answers += [False] + [True] * (len(question) - 1)
        return MemorySequence(
            task=self.name, ids=ids, pin_tokens=PIN_TOKENS, gap_tokens=gap_tokens, answers=answers
        )


MAX_FACTS = 24
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="recall", about="facts, then distractors", body=_recall, distractors=True),
        Task(name="passkey", about="few facts within noise", body=_passkey, distractors=False),
        Task(name="state", about="the last of several values", body=_state, distractors=True),
        Task(name="chase", about=f"{HOPS} hops along facts", body=_chase, distractors=True),
    )
}


def sample_batch(
    rng: random.Random,
    size: int,
    *,
    gap_tokens: tuple[int, int],
    tasks: Sequence[str] = tuple(TASKS),
    facts: int = 6,
) -> list[MemorySequence]:
    """Make `size` sequences that take turns among `tasks`, with gaps drawn from `[low, high]`.

    Raises:
        ValueError: on an unknown task.
    """
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return [
        TASKS[tasks[i % len(tasks)]].sample(rng, gap_tokens=rng.randint(*gap_tokens), facts=facts)
        for i in range(size)
    ]
