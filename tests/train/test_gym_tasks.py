"""Which answers reach scorers that evaluate them, and which scorers of reasoning-gym those are."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import pytest

from pte_vllm.train.data.gym_tasks import (
    FORMULA_TASKS,
    LITERAL_TASKS,
    gym_dataset,
    may_be_evaluated,
)
from pte_vllm.train.rewards.scorers import gym_scorer

EVALUATED = sorted(LITERAL_TASKS | FORMULA_TASKS)
_OF_THE_QUESTION = {"bitwise_arithmetic", "number_sorting"}
"""They evaluate what the data set itself wrote: the question, and the right answer."""


def _evaluates(found: object) -> bool:
    """Whether a function runs text, or may hand it on: sympy's functions make formulas of text."""
    if found in (builtins.eval, builtins.exec, builtins.compile, builtins.__import__):
        return True
    package = str(getattr(found, "__module__", "")).partition(".")[0]
    return callable(found) and package in ("sympy", "pickle", "yaml", "importlib", "numexpr")


def _parts(found: object) -> Iterator[FunctionType]:
    """The functions of reasoning-gym that calling `found` may run; of a class, all its methods."""
    if isinstance(found, MethodType | staticmethod | classmethod):
        found = found.__func__
    if not str(getattr(found, "__module__", "")).startswith("reasoning_gym"):
        return
    if isinstance(found, FunctionType):
        if not inspect.unwrap(found).__code__.co_filename.startswith("<"):  # of dataclasses
            yield found
    elif isinstance(found, type):
        for member in vars(found).values():
            yield from _parts(member)


def _called(function: FunctionType, owner: type) -> Iterator[object]:
    """What a function calls or hands on, as far as names tell; `self` is of class `owner`."""
    names = vars(builtins) | function.__globals__
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Name) and node.id in names:
            yield names[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            of = owner if node.value.id in ("self", "cls") else names.get(node.value.id)
            if of is not None and hasattr(of, node.attr):
                yield getattr(of, node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module:
            __import__(node.module)
            for alias in node.names:
                yield getattr(sys.modules[node.module], alias.name, None)


def _reaches_eval(owner: type, start: Callable[..., object]) -> bool:
    seen: set[FunctionType] = set()
    left = list(_parts(start))
    while left:
        function = left.pop()
        if function in seen:
            continue
        seen.add(function)
        for found in _called(function, owner):
            if _evaluates(found):
                return True
            if not (isinstance(found, type) and issubclass(found, owner)):
                left += _parts(found)
    return False


def test_the_lists_name_every_task_whose_scorer_evaluates() -> None:
    """Fails when a new reasoning-gym has another one: it must be read, and listed."""
    from reasoning_gym.factory import DATASETS

    found = {task for task, (made, _) in DATASETS.items() if _reaches_eval(made, made.score_answer)}
    assert found - _OF_THE_QUESTION == LITERAL_TASKS | FORMULA_TASKS
    assert found >= _OF_THE_QUESTION


def test_a_composite_of_tasks_cannot_be_asked_for() -> None:
    """It would score by the task of each entry, which `may_be_evaluated` does not know."""
    with pytest.raises(ValueError, match="--data.task_options"):
        gym_dataset("composite", {"datasets": [{"name": "n_queens"}]}, seed=0, size=1)


@pytest.mark.parametrize("task", EVALUATED)
def test_what_no_answer_needs_is_refused(task: str) -> None:
    for answer in (
        "__import__('os').system('true')",
        "().__class__",
        "(1).real",
        "x.args",
        "eval('1')",
        "ｅｖａｌ(1)",  # means the same to Python
        "exit()",
        "(exit)()",
        "[exit][0]()",
        "exp('exit()')",
        "exp(x, evaluate=False)",
        "exp(*[1])",
        "sympify(1)",
        "lambda: 1",
        "(lambda: 1)()",
        "[x for x in [1]]",
        "f'{1}'",
        "(y := 1)",
        "1 if x else 2",
        "1 < 2",
        "{1: 2}",
        "[0] * 9",
        "[1][0]",
        "1 and 2",
        "await x",
    ):
        assert not may_be_evaluated(task, answer), answer


def test_text_that_is_no_python_is_for_the_scorers_that_asked_for_text() -> None:
    assert may_be_evaluated("spiral_matrix", "1 2 3")
    assert may_be_evaluated("n_queens", "_ Q _ _\n_ _ _ Q")
    for answer in ("1 2 3", "exit()!", "3 + 4 = 7", "", "\x00", "(" * 300):
        assert not may_be_evaluated("countdown", answer)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("string_insertion", "['A', 'B', \"C\"]"),
        ("string_insertion", "ABCDE"),
        ("spiral_matrix", " [1, -2, 3.5]"),
        ("binary_matrix", "[[0, 1], [1, 2]]"),
        ("n_queens", "[['_', 'Q'], ['Q', '_']]"),
        ("countdown", " (98 - 54) * 6 - 34.0 / 2 "),
        ("puzzle24", "8 / (3 - 8 / 3)"),
        ("polynomial_multiplication", "-3*x**2*y + 1e1*z - x"),
        ("simple_integration", "X**3/3 + C"),
        ("intermediate_integration", "-exp(x)*sin(2*x)/3 + sqrt(3)*atan(x) + E**x + C"),
        ("intermediate_integration", "Integral(sin(x**2), x)"),
        ("chain_sum", "__import__('os')"),  # its scorer only compares
    ],
)
def test_what_answers_need_is_kept(task: str, answer: str) -> None:
    assert may_be_evaluated(task, answer)


@pytest.mark.parametrize("task", EVALUATED)
def test_the_answers_of_the_data_sets_are_kept(task: str) -> None:
    made: Any = gym_dataset(task, {}, seed=11, size=60)
    refused = [a for a in (made[i]["answer"] for i in range(60)) if not may_be_evaluated(task, a)]
    assert refused == []


@pytest.mark.parametrize(
    ("task", "dodge"),
    [
        ("complex_arithmetic", lambda right, question: "nan"),
        (
            "number_sorting",
            lambda right, question: "[" + right.count(",") * "NaN, " + "NaN]",
        ),
        ("simple_integration", lambda right, question: f"Integral({question}, x)"),
    ],
)
def test_what_only_passes_a_comparison_earns_nothing(
    task: str, dodge: Callable[[str, str], str]
) -> None:
    """Fails as well if a new reasoning-gym closes the gap: the guard can go then."""
    made: Any = gym_dataset(task, {}, seed=3, size=8)
    scored = gym_scorer(task, "{}")
    passed = 0
    for i in range(8):
        entry = made[i]
        answer = dodge(entry["answer"], str(entry["metadata"].get("integrand", "")))
        passed += made.score_answer(answer, entry) == 1.0
        assert scored(answer, entry) == 0.0
        assert scored(entry["answer"], entry) == 1.0
    assert passed, "the scorer itself refuses it"
