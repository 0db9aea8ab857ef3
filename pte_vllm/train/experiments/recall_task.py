"""Recall in plain text: facts, filler sentences, then the facts' sentences to complete.

    [ instruction, pinned ] Alice has number 48. … | filler … | … Alice has number → 48

Only the digits of the numbers count. What decides is how many tokens lie between.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NAMES = (
    "Alice",
    "Bob",
    "Carol",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Irene",
    "Jack",
    "Karen",
    "Leo",
    "Maria",
    "Nick",
    "Olga",
    "Paul",
    "Quinn",
    "Rosa",
    "Sam",
    "Tina",
    "Victor",
    "Wendy",
    "Xavier",
    "Yara",
    "Zoe",
)
FILLER = (
    "The sun rose slowly over the quiet hills.",
    "A small boat drifted along the river.",
    "People walked through the market talking about the weather.",
    "The old clock on the wall kept ticking.",
    "Birds gathered on the roof before the rain.",
    "Someone played a song on the piano next door.",
    "The train left the station on time.",
    "Leaves covered the path to the garden.",
)
PIN_TOKENS = 32
"""How many tokens of the instruction are pinned."""
INSTRUCTION = (
    "Remember the number of each person, then repeat the numbers when asked about them later on "
    "please. Here are the numbers and a story."
)


@dataclass(frozen=True, kw_only=True)
class RecallSequence:
    """One sequence with facts, filler and questions."""

    token_ids: list[int]
    wanted: list[bool]
    """By token, whether it is a digit to recall."""
    spans: list[tuple[int, int]]
    """The tokens of each answer, in the order asked, as half-open intervals."""
    distances: list[int]
    """For each answer, how many tokens before it the fact was stated."""
    pin_tokens: int
    """The first tokens that stay."""
    trained: list[bool]
    """By token, whether an adapter is trained to predict it."""


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """Makes sequences of one length.

    Raises:
        ValueError: if the length has no room for the facts.
    """

    tokenizer: Any
    num_tokens: int = 224
    num_facts: int = 3
    pin_tokens: int = PIN_TOKENS
    _pieces: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def sample(self, rng: random.Random) -> RecallSequence:
        """Make one sequence."""
        names = rng.sample(NAMES, self.num_facts)
        numbers = {name: rng.randint(10, 99) for name in names}
        pinned = self._encode(INSTRUCTION)[: self.pin_tokens]
        pinned = pinned + [self.tokenizer.eos_token_id] * (self.pin_tokens - len(pinned))
        head, stated = list(pinned), {}
        for i, name in enumerate(names):
            stated[name] = len(head)
            head += self._encode(f"{' ' if i else ''}{name} has number {numbers[name]}.")
        tail: list[int] = []
        marks: list[bool] = []
        spans: list[tuple[int, int]] = []
        asked = rng.sample(names, len(names))
        for name in asked:
            question, digits = self._encode(f" {name} has number"), f" {numbers[name]}"
            answer = self._encode(digits)[1:]  # the space before it says nothing
            space = self._encode(digits)[:1]
            first = len(tail) + len(question) + len(space)
            spans.append((first, first + len(answer)))
            end = self._encode(".")
            tail += question + space + answer + end
            marks += [False] * (len(question) + 1) + [True] * len(answer) + [False] * len(end)
        room = self.num_tokens - len(head) - len(tail)
        if room < 0:
            raise ValueError(
                f"{self.num_facts} facts need {len(head) + len(tail)} tokens, more than the "
                f"{self.num_tokens} of a sequence"
            )
        filler: list[int] = []
        while len(filler) < room:
            filler += self._encode(" " + rng.choice(FILLER))
        offset = len(head) + room
        spans = [(a + offset, b + offset) for a, b in spans]
        wanted = [False] * offset + marks
        return RecallSequence(
            token_ids=head + filler[:room] + tail,
            wanted=wanted,
            spans=spans,
            distances=[s[0] - stated[n] for s, n in zip(spans, asked, strict=True)],
            pin_tokens=self.pin_tokens,
            trained=wanted,
        )

    def samples(self, count: int, rng: random.Random) -> list[RecallSequence]:
        """Make `count` sequences."""
        return [self.sample(rng) for _ in range(count)]

    def _encode(self, text: str) -> list[int]:
        if text not in self._pieces:
            ids: Sequence[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._pieces[text] = list(ids)
        return self._pieces[text]
