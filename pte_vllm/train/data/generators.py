"""Questions that are generated: tasks of reasoning-gym, synthetic memory tasks, long ledgers.

All are endless and need no download; question `i` is made from seed `first + i`.
"""

from __future__ import annotations

import random
from typing import Any

from pte_vllm.train.data.gym_tasks import gym_dataset
from pte_vllm.train.data.ledger import NAMES, SHOWN, Ledger
from pte_vllm.train.data.questions import Problem, ask, is_count, reward_of
from pte_vllm.train.options.runs import DataOptions

TAGGED = "{prompt}\n\nReason step by step, and put the final answer between <answer> and </answer>."

_GYM_CHUNK = 500  # questions of one reasoning-gym object; some of them list all of theirs


def _first_seed(options: DataOptions) -> int:
    """Return the seed of question 0, far from that of any other `--data.seed` or split."""
    return random.Random(f"{options.seed}/{options.split}").randrange(2**31)


class GymSource:
    """An endless source of one task of reasoning-gym; question `i` is made from seed `first + i`.

    Raises:
        ValueError: naming the flag, if there is no such task, or it does not take the options.
    """

    size = None

    def __init__(self, options: DataOptions) -> None:
        for name in ("seed", "size"):
            if name in options.task_options:
                raise ValueError(
                    f"--data.task_options: {name} is set by the trainer; use --data.seed"
                )
        self._options = options
        self._first_seed = _first_seed(options)
        self._chunk: tuple[int, Any] | None = None  # number, its questions
        self.problem(0)  # a wrong option shows now

    def problem(self, index: int) -> Problem:
        options = self._options
        assert options.task is not None  # DataOptions sees to it
        chunk, place = divmod(index, _GYM_CHUNK)
        if self._chunk is None or self._chunk[0] != chunk:
            seed = self._first_seed + chunk * _GYM_CHUNK
            made = gym_dataset(options.task, options.task_options, seed=seed, size=_GYM_CHUNK)
            self._chunk = chunk, made
        entry = self._chunk[1][place]
        return Problem(
            key=f"reasoning-gym/{options.task}/{self._first_seed + index}",
            prompt=ask(options, entry["question"], TAGGED),
            answer=str(entry["answer"]),
            reward=reward_of(options, "reasoning-gym"),
            meta={"task": options.task, "task_options": options.task_options, "entry": entry},
        )


class MemorySource:
    """An endless source of one of `memory_tasks.TASKS`, as token ids.

    Question `i` is made from seed `first + i`.

    Its options are `gap_tokens`, a number or `[low, high]`, and `facts`.

    Raises:
        ValueError: naming the flag, if there is no such task, or it does not take the options.
    """

    size = None

    def __init__(self, options: DataOptions) -> None:
        from pte_vllm.train.data.memory_tasks import TASKS

        if options.task not in TASKS:
            raise ValueError(f"--data.task must be one of {', '.join(TASKS)}, got {options.task!r}")
        given = dict(options.task_options)
        gap = given.pop("gap_tokens", 128)
        self._gap_tokens = gap if isinstance(gap, list) else [gap, gap]
        self._facts = given.pop("facts", 6)
        if given:
            raise ValueError(
                f"--data.task_options: {', '.join(given)} unknown; there are gap_tokens and facts"
            )
        numbers = [*self._gap_tokens, self._facts]
        if len(numbers) != 3 or not all(map(is_count, numbers)) or numbers[0] > numbers[1]:
            raise ValueError(
                "--data.task_options: gap_tokens must be a count or [low, high] and facts a "
                f"count, got {gap!r} and {self._facts!r}"
            )
        self._task = TASKS[options.task]
        self._options = options
        self._first_seed = _first_seed(options)
        self.problem(0)  # a wrong option shows now

    def problem(self, index: int) -> Problem:
        seed = self._first_seed + index
        rng = random.Random(seed)
        gap_tokens = rng.randint(*self._gap_tokens)
        sample = self._task.sample(rng, gap_tokens=gap_tokens, facts=self._facts)
        made = sample.problem()
        return Problem(
            key=f"memory/{self._task.name}/{seed}",
            prompt=list(made.prompt_ids),
            answer=list(made.answer_ids),
            reward=reward_of(self._options, "memory"),
            pin_tokens=made.pin_tokens,
            meta={"task": self._task.name, "gap_tokens": gap_tokens},
        )


class LedgerSource:
    """An endless source of ledgers (`data.ledger`): long chains of thought in plain text.

    Its options are `people` and `events`.

    Raises:
        ValueError: naming the flag, if it does not take the options.
    """

    size = None

    def __init__(self, options: DataOptions) -> None:
        given = {"people": 5, "events": 24, **options.task_options}
        self._people, self._events = given.pop("people"), given.pop("events")
        if given:
            raise ValueError(
                f"--data.task_options: {', '.join(given)} unknown; there are people and events"
            )
        least = {"people": 2, "events": SHOWN + 1}
        for name, count in (("people", self._people), ("events", self._events)):
            if not is_count(count) or count < least[name]:
                raise ValueError(
                    f"--data.task_options: {name} must be at least {least[name]}, got {count!r}"
                )
        if self._people > len(NAMES):
            raise ValueError(f"--data.task_options: people must be at most {len(NAMES)}")
        self._options = options
        self._first_seed = _first_seed(options)

    def problem(self, index: int) -> Problem:
        seed = self._first_seed + index
        made = Ledger.draw(random.Random(seed), people=self._people, events=self._events)
        return Problem(
            key=f"ledger/{self._people}-{self._events}/{seed}",
            prompt=ask(self._options, made.question(), "{prompt}"),
            answer="\n".join(made.lines()),
            reward=reward_of(self._options, "ledger"),
            meta=made.to_meta(),
        )
