"""Questions for training: what one is, and a stream of them whose position can be saved.

`data.sources` says where they come from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

from pte_vllm.train.options.runs import DataOptions

_MAX_REJECTED = 10_000
"""Questions of an endless source rejected in a row before it is called hopeless."""


class Message(TypedDict):
    """A message for a chat template."""

    role: str
    content: str


Prompt = str | list[Message] | list[int]
"""Plain text, messages for the model's chat template, or token ids."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question, and what is needed to ask it and to reward an answer."""

    key: str
    """Names it within its source, such as `gsm8k/train/17`; the same in every run."""
    prompt: Prompt
    answer: str | list[int]
    """What its reward compares with: text, or token ids."""
    reward: str
    """The name of its reward function in `rewards.functions.REWARDS`."""
    pin_tokens: int | None = None
    """How many tokens at the start are never evicted; None: the whole prompt."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What else the source says about it."""


class QuestionSource(Protocol):
    """Questions by number; the same number gives the same question in every process."""

    @property
    def size(self) -> int | None:
        """How many there are; None: as many as are asked for."""

    def problem(self, index: int) -> Problem:
        """Question number `index`, which is less than `size`."""


class ListSource:
    """A finite source that makes a question from its row when it is asked for."""

    def __init__(self, rows: Sequence[Any], make: Callable[[int, Any], Problem]) -> None:
        self._rows = rows
        self._make = make

    @property
    def size(self) -> int:
        return len(self._rows)

    def problem(self, index: int) -> Problem:
        return self._make(index, self._rows[index])


class StreamState(TypedDict):
    """Position of a stream; plain integers, for a checkpoint."""

    seed: int
    size: int
    """How many questions the source holds; 0 for an endless source."""
    drawn: int
    """How many questions were taken from the source so far, rejected ones included."""


class QuestionStream:
    """An endless sequence of questions, a pure function of source and seed.

    A finite source is shuffled anew for each epoch; an endless one is read in order, as it has its
    own seed.

    Args:
        source: where questions come from.
        seed: decides the order of a finite source.
        keep: says whether a question is used, such as whether its prompt is short enough; None:
            all are.

    Raises:
        ValueError: if the source is empty.
    """

    def __init__(
        self, source: QuestionSource, *, seed: int, keep: Callable[[Problem], bool] | None = None
    ) -> None:
        if source.size == 0:
            raise ValueError("--data.source: it holds no questions")
        self.source = source
        self.seed = seed
        self._keep = keep
        self._drawn = 0
        self._order: tuple[int, Sequence[int]] | None = None  # epoch, its indices

    @property
    def epoch(self) -> int:
        """The epoch of the next question; stays 0 for an endless source."""
        return self._drawn // self.source.size if self.source.size else 0

    def take(self, count: int) -> list[Problem]:
        """Return the next `count` questions."""
        return [self.next() for _ in range(count)]

    def next(self) -> Problem:
        """Return the next question.

        Raises:
            ValueError: if a whole epoch, or 10,000 questions in a row, are left out.
        """
        for _ in range(self.source.size or _MAX_REJECTED):
            problem = self.source.problem(self._index())
            self._drawn += 1
            if self._keep is None or self._keep(problem):
                return problem
        raise ValueError(
            "--data.max_prompt_tokens leaves out every question; give a larger bound or other data"
        )

    def _index(self) -> int:
        size = self.source.size
        if size is None:
            return self._drawn
        epoch, place = divmod(self._drawn, size)
        if self._order is None or self._order[0] != epoch:
            order = list(range(size))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)  # of text: alike everywhere
            self._order = epoch, order
        return self._order[1][place]

    def state(self) -> StreamState:
        """Return the position, for `restore`."""
        return StreamState(seed=self.seed, size=self.source.size or 0, drawn=self._drawn)

    def restore(self, state: StreamState) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: if it belongs to another order or other data.
        """
        own = self.state()
        if state["seed"] != own["seed"]:
            raise ValueError(
                f"--data.seed is {own['seed']}, but the checkpoint was made with {state['seed']}"
            )
        if state["size"] != own["size"]:
            raise ValueError(
                f"--data.source holds {own['size']} questions, but held {state['size']} when the "
                "checkpoint was made"
            )
        self._drawn = state["drawn"]


def ask(options: DataOptions, question: str, template: str) -> Prompt:
    """Write the prompt that asks `question`, by the given template unless the options have one."""
    # Not str.format: questions and templates are full of braces.
    text = (options.prompt_template or template).replace("{prompt}", question)
    if not options.chat:
        return text
    system = [Message(role="system", content=options.system)] if options.system else []
    return [*system, Message(role="user", content=text)]


def reward_of(options: DataOptions, fitting: str) -> str:
    """Return the name of the reward: the one asked for, or the one that fits the source."""
    return fitting if options.reward == "auto" else options.reward


def is_count(value: Any) -> bool:
    """Say whether a value from a file is an integer from 0, such as a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def prompt_ids(problem: Problem, tokenizer: Any) -> list[int]:
    """Turn a question's prompt into token ids, ready for an answer to follow.

    Args:
        problem: the question that is asked.
        tokenizer: a transformers tokenizer; None will do where the prompt is token ids.

    Raises:
        ValueError: if the prompt is messages and the tokenizer has no chat template.
    """
    prompt = problem.prompt
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if prompt and isinstance(prompt[0], int):
        return list(prompt)
    if tokenizer.chat_template is None:
        raise ValueError("--data.chat: the model has no chat template; give --data.chat false")
    return chat_ids(prompt, tokenizer)


def chat_ids(messages: Sequence[Any], tokenizer: Any) -> list[int]:
    """Turn messages into token ids by the model's chat template, ready for an answer to follow."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def at_most(max_prompt_tokens: int, tokenizer: Any) -> Callable[[Problem], bool]:
    """Make a `keep` for `QuestionStream`: whether a prompt has at most so many tokens."""
    return lambda problem: len(prompt_ids(problem, tokenizer)) <= max_prompt_tokens
