"""The base model of the memory experiment: it solves the tasks with full attention."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pte_vllm.train.data.memory_tasks import TASKS, MemorySequence, sample_batch
from pte_vllm.train.experiments.small_llama import SmallLlama, accuracy_of

_EXAM_SEQUENCES = 48
"""Of each task."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig(SmallLlama):
    """The sizes of the model, and its training on gaps of growing length."""

    max_gap_tokens: int = 128
    """The longest gap that the model is trained on, and must solve."""
    max_facts: int = 24
    tasks: tuple[str, ...] = tuple(TASKS)


class MemoryCourse:
    """The memory tasks, with gaps that grow."""

    first_length = 16.0

    def __init__(self, config: BaseConfig) -> None:
        self._config = config
        self.longest = float(config.max_gap_tokens)
        # Which of two facts is the later one is learned last: more of that.
        self._mixture = (*config.tasks, *(task for task in config.tasks if task == "state"))

    def batch(self, rng: random.Random, length: float) -> Sequence[MemorySequence]:
        """Make the sequences of one step; gaps are alike within it: little padding."""
        gap = rng.randint(round(length) // 2, round(length))
        return sample_batch(
            rng,
            self._config.batch_size,
            gap_tokens=(gap // 2, gap),
            tasks=self._mixture,
            facts=rng.randint(3, self._config.max_facts),
        )

    def exam(self, model: Any) -> dict[str, float]:
        """Compute by task the share of right answers at the longest gap, with six facts."""
        gap = self._config.max_gap_tokens
        return {
            task: accuracy_of(
                model,
                sample_batch(
                    random.Random(f"1 {task} {gap} 6"),
                    _EXAM_SEQUENCES,
                    gap_tokens=(gap, gap),
                    tasks=[task],
                ),
            )
            for task in self._config.tasks
        }
