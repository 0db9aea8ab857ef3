"""Work for a `ScoringWorker` that runs whatever it is given: what its process must hold against."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable


def evaluator(setup: str = "") -> Callable[[str], float]:
    """Scores an expression by its value, statements by 1 if they come to their end."""
    if setup:
        raise ValueError(setup)

    def evaluate(code: str) -> float:
        try:
            ast.parse(code, mode="eval")
        except SyntaxError:
            exec(code, {})
            return 1.0
        return float(eval(code))

    return evaluate


def sleeper() -> Callable[[float], float]:
    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return 1.0

    return sleep
