"""The tasks of an environment as a source of questions, by their numbers."""

from __future__ import annotations

from pte_vllm.train.data.questions import Problem


class TaskSource:
    """Tasks that the worker knows; here they are numbers.

    Args:
        name: of the taskset.
        size: how many there are; None: as many as are asked for.
    """

    def __init__(self, name: str, size: int | None) -> None:
        self._name = name
        self._size = size

    @property
    def size(self) -> int | None:
        """How many tasks there are."""
        return self._size

    def problem(self, index: int) -> Problem:
        """Task number `index`; the worker has its prompt, and rewards it."""
        return Problem(
            key=f"{self._name}/{index}",
            prompt="",
            answer="",
            reward="environment",
            meta={"task": index},
        )
