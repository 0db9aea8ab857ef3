"""Conversations for a chat model: facts told early, small talk, and questions about the facts.

Everything is drawn by a seed. Facts are about the user, their values common words that no other
turn is about: what counts is what is remembered, and a small model errs with rare ones even if it
sees them. The first turn tells nothing, as it is pinned for ever.

Replies to all but the questions about facts are given, so that conversations are the same under
every memory: what a small model says of itself derails some of them. Standard library only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

SYSTEM = "You are a friendly assistant. Answer in one short sentence."
FIRST = "Hello! I would like to talk with you about this and that. Is that all right?"
YES = "Yes, of course. Tell me whatever you like."
NOTED = "All right, I will remember that."


@dataclass(frozen=True)
class _Kind:
    """How a fact is told and asked for, and what it may be."""

    told: str
    asked: str
    values: str
    """Words with blanks between them."""


_KINDS = (
    _Kind("my dog is called {}", "What is my dog called?", "Rocky Bella Max Daisy Bruno Pepper"),
    _Kind("my sister is called {}", "What is my sister called?", "Anna Clara Emma Julia Nora Rosa"),
    _Kind("I was born in {}", "In which city was I born?", "Rome Lisbon Vienna Oslo Madrid Dublin"),
    _Kind("I work as a {}", "What is my job?", "teacher nurse pilot farmer dentist lawyer"),
    _Kind("I love to eat {}", "What do I love to eat?", "pizza soup rice pasta sushi chocolate"),
    _Kind("I am afraid of {}", "What am I afraid of?", "spiders snakes ghosts heights mice"),
    _Kind("my hobby is {}", "What is my hobby?", "chess tennis dancing swimming fishing"),
    _Kind("my exam is on {}", "On which day is my exam?", "Monday Tuesday Thursday Friday Sunday"),
    _Kind("my car is {}", "Which color does my car have?", "red blue green white yellow silver"),
    _Kind("I play the {}", "Which instrument do I play?", "piano guitar violin flute drums"),
    _Kind("my birthday is in {}", "In which month is my birthday?", "March April June August May"),
    _Kind("I am learning {}", "Which language am I learning?", "Greek Polish Turkish Dutch Korean"),
)
_TOPICS = (
    *("rivers", "bread", "bicycles", "libraries", "bees", "trains", "snow", "bridges", "clouds"),
    *("paper", "glass", "tea", "mountains", "lamps", "boats", "gardens", "stars", "shoes", "wind"),
    *("candles", "chairs", "the moon", "salt", "windows", "umbrellas", "roofs", "maps", "coins"),
    *("trees", "rain", "keys", "lighthouses", "ladders", "volcanoes", "pencils", "deserts"),
    *("elevators", "soap", "clocks", "buttons", "islands", "mirrors", "tunnels", "honey", "wool"),
    *("magnets", "waterfalls", "gravity", "sand", "thunder", "kites", "fountains", "stairs"),
    *("caves", "baskets", "cement", "compasses", "rope", "lakes", "brooms"),
)
_SMALL_TALK = (
    ("Tell me something about {}.", "People have known {} for a very long time."),
    ("What is interesting about {}?", "There is more to {} than one sees at first."),
    ("What should a child know about {}?", "One should be careful with {}, and look closely."),
    ("Why do people like {}?", "Many people say that {} make their days a little better."),
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of the user."""

    text: str
    reply: str | None = None
    """What the assistant said to it; None where the model is to answer."""
    wanted: str | None = None
    """The word that answers it, where it asks for a fact."""
    distance: int | None = None
    """How many turns before it that was told."""

    def is_right(self, answer: str) -> bool:
        """Return whether the wanted word is in an answer."""
        return self.wanted is not None and bool(
            re.search(rf"\b{re.escape(self.wanted)}\b", answer, re.IGNORECASE)
        )


def draw_talk(seed: str, *, turns: int, distances: Sequence[int]) -> list[Turn]:
    """Draw a conversation in which one fact is asked for at each of some distances.

    Those that are asked long after are told first, so that all lie as early as they can.

    Args:
        seed: one seed gives one conversation.
        turns: messages of the user.
        distances: turns between telling and asking; a distance may come several times.

    Raises:
        ValueError: naming the flag, if there is no room for them.
    """
    rng = random.Random(seed)
    if len(distances) > len(_KINDS):
        raise ValueError(
            f"--distances: {len(distances)} facts, and there are {len(_KINDS)} kinds of them"
        )
    if not 2 <= turns <= len(_TOPICS):
        raise ValueError(f"--turns must lie in [2, {len(_TOPICS)}], got {turns}")
    topics = rng.sample(_TOPICS, turns)
    talk = []
    for topic in topics:
        said, reply = rng.choice(_SMALL_TALK)
        talk.append(Turn(text=said.format(topic), reply=reply.format(topic)))
    talk[0] = Turn(text=FIRST, reply=YES)
    taken = {0}
    kinds = rng.sample(_KINDS, len(distances))
    for kind, distance in zip(kinds, sorted(distances, reverse=True), strict=True):
        free = [t for t in range(1, turns - distance) if not {t, t + distance} & taken]
        if distance < 1 or not free:
            raise ValueError(f"--distances: {turns} turns have no room for {list(distances)}")
        told = free[0]
        taken |= {told, told + distance}
        value = rng.choice(kind.values.split())
        talk[told] = Turn(text=f"Please remember that {kind.told.format(value)}.", reply=NOTED)
        talk[told + distance] = Turn(text=kind.asked, wanted=value, distance=distance)
    return talk
