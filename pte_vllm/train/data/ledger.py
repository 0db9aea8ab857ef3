"""Long chains of thought whose steps depend on earlier ones: people give each other coins.

    At first Anna has 30 coins, Ben has 42 coins. 1. Anna gives Ben 4 coins. 2. …
    → 1. Anna gives Ben 4 coins: Anna had 30 and now has 30 - 4 = 26. Ben had 42 and now has …

Each line of an answer takes up what was written of two people before, anywhere from one line to
many lines back. Only that is judged: whether a line begins from what the answer itself wrote last.
So a wrong sum costs nothing by itself, and an answer of any length has as many places where a
memory can fail as it has look-ups.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = (
    "Anna",
    "Ben",
    "Carl",
    "Dora",
    "Emil",
    "Fay",
    "Gus",
    "Hana",
    "Ivan",
    "Jill",
    "Kurt",
    "Lena",
)
SHOWN = 2
"""Events whose lines stand in the question, as examples of the form."""
_LINE = re.compile(r"^\s*(\d+)\.", re.MULTILINE)
_STEP = re.compile(r"(\w+) had (-?\d+)[^.=]*=\s*(-?\d+)")


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """One task: who has what at first, and who gives whom how much."""

    start: Mapping[str, int]
    events: Sequence[tuple[str, str, int]]
    """Giver, receiver, and how many coins."""

    @classmethod
    def draw(cls, rng: random.Random, *, people: int, events: int) -> Ledger:
        """Draw a task in which nobody's coins become negative."""
        names = rng.sample(NAMES, people)
        start = {name: rng.randint(30, 60) for name in names}
        held, made = dict(start), []
        for _ in range(events):
            giver = rng.choice([name for name in names if held[name]])
            receiver = rng.choice([name for name in names if name != giver])
            coins = rng.randint(1, min(9, held[giver]))
            held[giver] -= coins
            held[receiver] += coins
            made.append((giver, receiver, coins))
        return cls(start=start, events=tuple(made))

    def question(self) -> str:
        """Return the question, with the lines of the first events as examples."""
        start = ", ".join(f"{name} has {coins} coins" for name, coins in self.start.items())
        events = "\n".join(
            f"{i}. {giver} gives {receiver} {coins} coins."
            for i, (giver, receiver, coins) in enumerate(self.events, 1)
        )
        shown = "\n".join(self.lines()[:SHOWN])
        return (
            f"At first {start}.\n{events}\n\nGo through all {len(self.events)} events in order, "
            "and write one line for each. Always begin from what you wrote last about a person. "
            f"The first lines are:\n{shown}\n\nNow write all lines, from 1 to "
            f"{len(self.events)}."
        )

    def lines(self) -> list[str]:
        """Return the right answer, line by line."""
        held, found = dict(self.start), []
        for i, (giver, receiver, coins) in enumerate(self.events, 1):
            parts = []
            for name, sign, change in ((giver, "-", -coins), (receiver, "+", coins)):
                had = held[name]
                held[name] = had + change
                parts.append(f"{name} had {had} and now has {had} {sign} {coins} = {held[name]}.")
            found.append(f"{i}. {giver} gives {receiver} {coins} coins: {' '.join(parts)}")
        return found

    def to_meta(self) -> dict[str, Any]:
        """Return the task as JSON has it."""
        return {"start": dict(self.start), "events": [list(event) for event in self.events]}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Ledger:
        """Read what `to_meta` returned."""
        return cls(
            start=dict(meta["start"]), events=tuple((a, b, int(n)) for a, b, n in meta["events"])
        )


@dataclass(frozen=True, kw_only=True)
class LookUp:
    """One place where an answer has to know what it wrote before."""

    event: int
    """The number of the line, from 1."""
    name: str
    since: int
    """How many lines ago the person was last written of; those in the question count as line 0."""
    right: bool


def look_ups(ledger: Ledger, answer: str) -> Iterator[LookUp]:
    """Yield two look-ups for each event in order; those of a line that is missing are wrong.

    A person's last number is what the answer wrote last, right or wrong; before that, what the
    question says.
    """
    written = _lines(answer)
    held, seen = dict(ledger.start), dict.fromkeys(ledger.start, 0)
    for number, (giver, receiver, _) in enumerate(ledger.events, 1):
        line = written.get(number, "")
        steps = {name: (int(had), int(now)) for name, had, now in _STEP.findall(line)}
        for name in (giver, receiver):
            step = steps.get(name)
            right = step is not None and step[0] == held[name]
            yield LookUp(event=number, name=name, since=number - seen[name], right=right)
        for name, (_, now) in steps.items():
            if name in held:
                held[name], seen[name] = now, number


def share_right(ledger: Ledger, answer: str) -> float:
    """Return the share of right look-ups, from 0 to 1."""
    found = [look_up.right for look_up in look_ups(ledger, answer)]
    return sum(found) / len(found)


def _lines(answer: str) -> dict[int, str]:
    """Return the text of each numbered line by its number, the first of a number."""
    marks = list(_LINE.finditer(answer))
    ends = [*(mark.start() for mark in marks), len(answer)][1:]
    found: dict[int, str] = {}
    for mark, end in zip(marks, ends, strict=True):
        found.setdefault(int(mark.group(1)), answer[mark.end() : end])
    return found
