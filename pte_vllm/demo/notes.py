"""What the demo asks: notes with facts at their start, other text, then a question about a fact.

Everything is drawn by a seed, so that the same command asks the same. Answers are common words:
the demo is about what is remembered, and a small model errs with rare ones even if it sees them.
None is the one that a model would guess.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SYSTEM = "You answer questions about a text in one short sentence."
"""The system message. It is pinned; the notes and the question are thoughts."""
INTRO = "Read this text. It is about people that I know, and about other things."
NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivan", "Julia"),
    *("Karen", "Leo", "Maria", "Nora", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Victor"),
)


@dataclass(frozen=True)
class Kind:
    """One kind of fact: how it is said, how it is asked for, and what it may be."""

    fact: str
    question: str
    values: str
    """Words with blanks between them."""


KINDS = (
    Kind(
        "{name}'s dog is called {value}.",
        "What is the name of {name}'s dog?",
        "Rocky Bella Max Luna Buddy Daisy Coco Milo Bruno Pepper",
    ),
    Kind(
        "{name} was born in {value}.",
        "Where was {name} born?",
        "Rome Paris Lisbon Vienna Oslo Madrid Dublin Prague Athens Berlin",
    ),
    Kind(
        "{name} works as a {value}.",
        "What is {name}'s job?",
        "teacher nurse waiter pilot farmer dentist plumber lawyer painter",
    ),
    Kind(
        "{name}'s favorite food is {value}.",
        "What is {name}'s favorite food?",
        "pizza soup rice salad pasta chicken chocolate",
    ),
    Kind(
        "{name} speaks {value} at home.",
        "Which language does {name} speak at home?",
        "Greek Polish Turkish Spanish Italian French Dutch",
    ),
    Kind(
        "{name} is afraid of {value}.",
        "What is {name} afraid of?",
        "spiders snakes ghosts dogs heights thunder mice",
    ),
    Kind(
        "{name}'s hobby is {value}.",
        "What is {name}'s hobby?",
        "chess tennis dancing cooking swimming photography fishing",
    ),
    Kind(
        "{name}'s exam is on {value}.",
        "On which day is {name}'s exam?",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    ),
)
OTHER_TEXT = (
    "The river rises in the hills north of the town and runs through three villages before it "
    "meets the sea. In spring, when the snow melts, the water is high and brown. In late summer "
    "children can walk across it without getting their knees wet.",
    "Bread is made from flour, water, salt and yeast. The dough has to rest in a warm place until "
    "it has doubled in size. After that it is shaped, left to rest once more, and baked in a hot "
    "oven until the crust is dark and hard.",
    "The old library was closed for two years while the roof was repaired. When it opened again, "
    "most of the shelves had been moved to the ground floor. The reading room upstairs is now used "
    "for concerts and for talks about the history of the region.",
    "A bicycle needs little care. The chain should be cleaned and oiled once a month, and the "
    "brakes should be checked before every long ride. Tires lose air slowly, so it helps to keep a "
    "small pump close to the door.",
    "In autumn the market moves from the square to the hall behind the station. Farmers bring "
    "apples, pumpkins and cheese. Most people come early, because the best things are gone before "
    "noon, and because the coffee is free until nine.",
    "Bees find their way by the sun. When one of them has found flowers, it returns to the hive "
    "and dances, and the others learn from the dance how far they have to fly. On cloudy days they "
    "use the polarized light of the sky.",
    "The train to the coast takes a little over two hours. It leaves the valley through a long "
    "tunnel, passes a lake with a small island in it, and then follows the shore. Travelers like "
    "to sit on the left side because of the view.",
    "Snow fell for three days, and nobody could leave the village. The baker gave away what he had "
    "left, and the children built a tower in front of the church. On the fourth morning a plow "
    "came up the road, and everybody cheered.",
)
FACTS = 3
"""Facts of one text; one of them is asked for."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A text, a question about it, and the word that answers it."""

    facts: tuple[str, ...]
    other_text: str
    question: str
    asked: int
    """Which of the facts answers it."""
    answer: str

    @property
    def prompt(self) -> str:
        """The user's message."""
        return f"{INTRO}\n\n{' '.join(self.facts)}\n\n{self.other_text}\n\n{self.question}"

    @property
    def since_fact(self) -> str:
        """What stands between the fact that answers the question and the question."""
        return f"{' '.join(self.facts[self.asked + 1 :])}\n\n{self.other_text}\n\n"


def draw(count: int, seed: str) -> list[Question]:
    """Draw questions; one seed gives the same ones, however many are asked."""
    rng = random.Random(seed)
    return [_draw_one(rng) for _ in range(count)]


def _draw_one(rng: random.Random) -> Question:
    kinds, names = rng.sample(KINDS, FACTS), rng.sample(NAMES, FACTS)
    values = [rng.choice(kind.values.split()) for kind in kinds]
    drawn = list(zip(kinds, names, values, strict=True))
    asked = rng.randrange(FACTS)
    return Question(
        facts=tuple(kind.fact.format(name=name, value=value) for kind, name, value in drawn),
        other_text=" ".join(rng.sample(OTHER_TEXT, len(OTHER_TEXT))),
        question=kinds[asked].question.format(name=names[asked]),
        asked=asked,
        answer=values[asked],
    )
