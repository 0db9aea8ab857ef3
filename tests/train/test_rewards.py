r"""Rewards, on answers as models write them, and on answers written to break the reader."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import get_args

import pytest

from pte_vllm.train.config import REWARD_NAMES
from pte_vllm.train.data import Problem
from pte_vllm.train.math_check import MathChecker
from pte_vllm.train.rewards import REWARDS, final_answer, gym_dataset, last_boxed, score


def math(right: str, text: str) -> float:
    return score(Problem(key="k", prompt="q", answer=right, reward="math"), text, [])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{42}.", "42"),
        (r"First \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} apples", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"Hence \boxed 5.", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("48 / 2 = 24.\n#### 72", "72"),
        ("#### 1,000 dollars\nmore", "1,000 dollars"),
        ("Answer: 34", "34"),
        ("The final answer is: $x^2$.", "x^2"),
        ("**Answer:** 12", "12"),
        (r"Answer: \boxed{3}", "3"),
        ("<answer> 9 </answer>", "9"),
        ("\\boxed{8} was my guess.\nAnswer: 9", "9"),
        ("Answer: 9, or rather \\boxed{8}", "8"),
        (r"complete \boxed{4}, cut off \boxed{\frac{1}{", "4"),
        ("", None),
        ("I think it is 42", None),
        (r"cut off \boxed{\frac{1}{2", None),
        (r"\boxed{}", None),
        (r"\boxed", None),
        ("<answer>", None),
        ("</answer><answer>", None),
        ("Answer:", None),
        ("####", None),
    ],
)
def test_the_last_answer_that_is_marked_counts(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("right", "text"),
    [
        ("34", r"\boxed{34}"),
        ("34", r"\boxed{34.0}"),
        ("34", r"\boxed{x = 34}"),
        ("1000", r"\boxed{1,000}"),
        ("72", "#### 72"),
        (r"\frac{1}{2}", r"\boxed{0.5}"),
        (r"\frac{1}{2}", r"\boxed{1/2}"),
        (r"\frac12", r"\boxed{\dfrac{1}{2}}"),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
        ("(x+1)^2", r"\boxed{x^2+2x+1}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
        (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
        ("[0,1)", r"\boxed{[0, 1)}"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"),
        ("90", r"\boxed{90^\circ}"),
    ],
)
def test_right_answers_in_other_words(right: str, text: str) -> None:
    assert math(right, text) == 1.0


@pytest.mark.parametrize(
    ("right", "text"),
    [
        ("34", r"\boxed{35}"),
        ("34", r"\boxed{-34}"),
        ("34", "34"),
        ("34", ""),
        ("2", r"\boxed{1, 2, 3}"),
        ("2", r"\boxed{1} \boxed{2} \boxed{3}"),
        ("[0,1)", r"\boxed{[0,1]}"),
        (r"\text{Evelyn}", r"\boxed{\text{Carla}}"),
        ("(1,2)", r"\boxed{(2,1)}"),
    ],
)
def test_wrong_answers(right: str, text: str) -> None:
    assert math(right, text) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 200_000,
        r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
        "<answer>" * 200_000,
        "answer" + " " * 500_000,
        "answer:\n" * 100_000,
        r"\boxed{" + "9" * 100_000 + "}",
        r"\boxed{\frac{\frac{\frac{1}{}}{",
        r"\boxed{}}}}{{{\frac{}{}}",
        r"\boxed{\left( \right] \sqrt[}",
        r"\boxed{" + "(" * 900 + "}",
        "\\boxed{\x00\ud800\n\u202e}",
        r"\boxed{\int_0^\infty}",
        r"\boxed{1/0}",
        r"\boxed{__import__('os').system('true')}",
    ],
    ids=range(14),
)
def test_malformed_answers_are_wrong_and_quick(text: str) -> None:
    assert math("4", r"\boxed{4}") == 1.0  # the worker is there
    start = time.monotonic()
    assert math("4", text) == 0.0
    assert time.monotonic() - start < 15


@pytest.fixture
def checker() -> Iterator[MathChecker]:
    checker = MathChecker(timeout_s=2.0)
    yield checker
    checker.close()


def test_a_formula_without_end_is_given_up_and_the_next_one_read(checker: MathChecker) -> None:
    checker.timeout_s = 60.0
    assert checker.equal("1", "1.0")
    checker.timeout_s = 2.0
    worker = checker._worker
    assert worker is not None
    start = time.monotonic()
    assert not checker.equal("4", "9^{9^{9^{9}}} + x")
    assert not checker.equal("4", r"\sum_{k=1}^{10^{9}} \sin(k)^{k}")
    assert time.monotonic() - start < 60
    checker.timeout_s = 60.0
    assert checker.equal(r"\frac{1}{2}", "0.5")


def test_the_worker_is_started_again(checker: MathChecker) -> None:
    checker.timeout_s = 60.0
    assert checker.equal("3", "3.0")
    assert checker._worker is not None
    checker._worker.kill()
    checker._worker.wait()
    assert checker.equal("3", "6/2")


def test_threads_share_the_checker(checker: MathChecker) -> None:
    """math-verify's own timeouts work in the main thread only."""
    checker.timeout_s = 60.0
    results: dict[int, bool] = {}

    def ask(number: int) -> None:
        results[number] = checker.equal(str(number), f"{2 * number}/2")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(6), True)


def test_boxes_are_balanced() -> None:
    assert last_boxed(r"a \boxed{x^{2}_{1}} b") == "x^{2}_{1}"
    assert last_boxed("no box") is None


def test_exact_compares_tokens_or_text() -> None:
    ids = Problem(key="k", prompt=[1], answer=[5, 6], reward="exact")
    assert [score(ids, "", given) for given in ([5, 6], [5], [5, 6, 7], [])] == [1, 0, 0, 0]
    text = Problem(key="k", prompt="q", answer="yes", reward="exact")
    assert [score(text, given, [9]) for given in (" yes\n", "Yes", "")] == [1, 0, 0]


def test_memory_counts_tokens_at_their_place() -> None:
    problem = Problem(key="k", prompt=[1], answer=[5, 6, 7, 8], reward="memory")
    given = ([5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 0, 7], [6, 7, 8, 5], [])
    assert [score(problem, "", ids) for ids in given] == [1, 1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="token ids"):
        score(Problem(key="k", prompt="q", answer="text", reward="memory"), "", [1])


def gym(task: str, **task_options: object) -> Problem:
    entry = gym_dataset(task, task_options, seed=3, size=1)[0]
    return Problem(
        key="k",
        prompt=entry["question"],
        answer=str(entry["answer"]),
        reward="reasoning-gym",
        meta={"task": task, "task_options": task_options, "entry": entry},
    )


def test_reasoning_gym_scores_what_is_tagged() -> None:
    problem = gym("chain_sum", min_terms=3, max_terms=3)
    assert score(problem, f"Well. <answer>{problem.answer}</answer>", []) == 1.0
    assert score(problem, f"<answer>0</answer> <answer> {problem.answer} </answer>", []) == 1.0
    assert score(problem, str(problem.answer), []) == 0.0
    assert score(problem, "<answer>no idea</answer>", []) < 0.1
    assert score(problem, "<answer>" + "1" * 10_000 + "</answer>", []) == 0.0


def test_reasoning_gym_scorers_survive_nonsense() -> None:
    """Some scorers parse the answer, and raise where it does not parse."""
    for task in ("countdown", "puzzle24", "simple_equations", "mini_sudoku", "letter_jumble"):
        problem = gym(task)
        for answer in ("", "((", "1/0", "{", "\x00", "9**9**", "[[1,2],[3]]", "None"):
            assert 0.0 <= score(problem, f"<answer>{answer}</answer>", []) < 1.0, (task, answer)


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="--data.reward must be one of math, .*'nope'"):
        score(Problem(key="k", prompt="q", answer="a", reward="nope"), "", [])


def test_the_options_name_the_rewards_there_are() -> None:
    assert set(get_args(REWARD_NAMES)) == {"auto", *REWARDS}
