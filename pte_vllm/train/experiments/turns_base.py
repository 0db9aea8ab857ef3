"""The base model of the experiment about conversations: it solves the tasks with full attention."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pte_vllm.train.data.turn_tasks import TURN_TASKS, Conversation, draw_batch
from pte_vllm.train.experiments.small_llama import SmallLlama, accuracy_of

_EXAM_CONVERSATIONS, _EXAM_FACTS = 16, 4


@dataclass(frozen=True, kw_only=True)
class TurnsBase(SmallLlama):
    """The sizes of the model, and its training on conversations that become longer."""

    max_turns: int = 24
    """Turns of the longest conversations that the model is trained on, and must solve."""
    max_facts: int = 8
    tasks: tuple[str, ...] = TURN_TASKS


class TurnsCourse:
    """Conversations with ever more turns."""

    first_length = 6.0

    def __init__(self, config: TurnsBase) -> None:
        self._config = config
        self.longest = float(config.max_turns)
        # Which of two values is the later one is learned last: more of that.
        self._mixture = (*config.tasks, *(task for task in config.tasks if task == "tool"))

    def batch(self, rng: random.Random, length: float) -> Sequence[Conversation]:
        """Make the conversations of one step, of this many turns or somewhat fewer."""
        turns = rng.randint(max(4, round(length) // 2), round(length))
        facts = rng.randint(1, min(self._config.max_facts, turns // 2 - 1))
        return draw_batch(
            rng,
            self._config.batch_size,
            turns=turns,
            facts=facts,
            distances=(1, turns - 1 - facts),
            tasks=self._mixture,
        )

    def exam(self, model: Any) -> dict[str, float]:
        """Compute by task the share of right answers in the longest conversations."""
        turns = self._config.max_turns
        return {
            task: accuracy_of(
                model,
                draw_batch(
                    random.Random(f"exam {task} {turns}"),
                    _EXAM_CONVERSATIONS,
                    turns=turns,
                    facts=_EXAM_FACTS,
                    distances=(1, turns - 1 - _EXAM_FACTS),
                    tasks=[task],
                ),
            )
            for task in self._config.tasks
        }
