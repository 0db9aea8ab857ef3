"""Tasks of reasoning-gym: their data sets, and what an answer to one may say.

Scorers of some tasks evaluate the answer as Python, directly or through sympy's `parse_expr`. An
answer reaches them only if all that it says is numbers, names, operators and known functions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

LITERAL_TASKS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks whose scorer calls `eval(answer)`, to read a list where it asked for text."""

FORMULA_TASKS = frozenset(
    {
        "countdown",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
    }
)
"""Tasks whose scorer calls sympy's `parse_expr(answer)`, which calls `eval`."""

_NAN_TASKS = frozenset({"complex_arithmetic", "number_sorting"})
_INTEGRATION_TASKS = frozenset({"intermediate_integration", "simple_integration"})
_NAN = re.compile(r"\bnan\b", re.IGNORECASE)

_LITERAL_NODES = (ast.Expression, ast.List, ast.Tuple, ast.Constant, ast.Name, ast.Load)
_FORMULA_NODES = (ast.Expression, ast.BinOp, ast.Call, ast.Constant, ast.Name, ast.Load)
_SIGNS = (ast.UnaryOp, ast.UAdd, ast.USub)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
# fmt: off
_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc",
    "sinh", "cosh", "tanh", "coth", "sech", "csch", "asinh", "acosh", "atanh", "acoth",
    "exp", "log", "ln", "sqrt", "cbrt", "abs", "Abs", "erf", "erfc", "erfi", "Ei", "li", "Si", "Ci",
    "gamma", "Integer", "Rational", "Float",
    "Integral",  # of what sympy cannot integrate, in answers of the data set itself
}
# fmt: on


def may_be_evaluated(task: str, answer: str) -> bool:
    """Say whether the scorer of a task may see an answer: always, if it does not evaluate it.

    Text that is no expression of Python is left to scorers that call `eval`, where it means itself
    (`1 2 3`), and kept from sympy's, which would make an expression of some of it.
    """
    if task not in LITERAL_TASKS | FORMULA_TASKS:
        return True
    if "__" in answer:
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except SyntaxError:
        return task in LITERAL_TASKS
    except (ValueError, MemoryError, RecursionError):  # a null byte; too deep
        return False
    return all(map(_is_literal if task in LITERAL_TASKS else _is_formula, ast.walk(tree)))


def dodges(task: str, answer: str, right: str) -> bool:
    """Say whether an answer would earn a reward without being right, by a gap in the scorer.

    NaN passes the comparisons of some, which refuse what differs by too much; an integral of what
    was asked has the right derivative. Seen in reasoning-gym 0.1.25.
    """
    if task in _NAN_TASKS:
        return _NAN.search(answer) is not None
    return task in _INTEGRATION_TASKS and "Integral" in answer and "Integral" not in right


def _is_literal(node: ast.AST) -> bool:
    """Say whether a node belongs to a list of constants, or is a name: an answer in letters."""
    return isinstance(node, _LITERAL_NODES + _SIGNS)


def _is_formula(node: ast.AST) -> bool:
    """Say whether a node is a number, a symbol, an operator or a known function of these.

    Text is none of these: sympy's functions evaluate it.
    """
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float | complex)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    return isinstance(node, _FORMULA_NODES + _SIGNS + _OPERATORS)


def gym_dataset(task: str, task_options: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """Make a data set of reasoning-gym: `size` questions of one task.

    Raises:
        ValueError: naming the flag, if there is no such task, or it does not take the options.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"--data.task: reasoning-gym has no task {task!r}{_similar(task)}")
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **task_options)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ValueError(
            f"--data.task_options {dict(task_options)} do not suit {task}: {error}"
        ) from error


def _similar(task: str) -> str:
    import difflib

    from reasoning_gym.factory import DATASETS

    close = difflib.get_close_matches(task, list(DATASETS), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
