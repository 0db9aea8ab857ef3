"""The scorers that `ScoringWorker` makes and asks; all of this runs in its process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pte_vllm.train.data.gym_tasks import dodges, gym_dataset, may_be_evaluated


def math_scorer() -> Callable[[str, str], bool]:
    """Make a scorer that says whether an answer equals the right one as mathematics.

    `math-verify` decides. Both answers are LaTeX or plain text, without dollars or box.

    Raises:
        ModuleNotFoundError: if math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error} (install pte-vllm[train])") from error

    def equal(right: str, answer: str) -> bool:
        # The trainer keeps the time, hence no timeouts here. Both return a value on any error.
        first, second = (
            parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (right, answer)
        )
        return bool(first and second) and verify(first, second, timeout_seconds=None)

    equal("1", "1")  # what it imports late would count as the first answer's time
    return equal


def gym_scorer(task: str, task_options: str) -> Callable[[str, Mapping[str, Any]], float]:
    """Make a scorer that gives what a task of reasoning-gym gives for an answer to an entry.

    Args:
        task: the name of the task.
        task_options: the task's options, as a JSON object.
    """
    made = gym_dataset(task, json.loads(task_options), seed=0, size=1)

    def scored(answer: str, entry: Mapping[str, Any]) -> float:
        if not may_be_evaluated(task, answer) or dodges(task, answer, str(entry["answer"])):
            return 0.0
        return float(made.score_answer(answer, entry))

    return scored
