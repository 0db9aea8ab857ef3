r"""Rewards, on answers as models write them, and on answers written to break the reader."""

from __future__ import annotations

import os
import signal
import threading
import time
from copy import deepcopy
from pathlib import Path
from typing import get_args

import pytest

from pte_vllm.train.data.answers import MAX_ANSWER_CHARS, final_answer, last_boxed
from pte_vllm.train.data.gym_tasks import (
    FORMULA_TASKS,
    LITERAL_TASKS,
    gym_dataset,
    may_be_evaluated,
)
from pte_vllm.train.data.questions import Problem
from pte_vllm.train.options.runs import REWARD_NAMES
from pte_vllm.train.rewards.functions import (
    _GYM_WORKER,
    _MATH_WORKER,
    REWARDS,
    score,
)

EVALUATED = sorted(LITERAL_TASKS | FORMULA_TASKS)


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


def test_a_formula_without_end_is_given_up_and_the_next_one_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert math("1", r"\boxed{1.0}") == 1.0  # the worker is there
    monkeypatch.setattr(_MATH_WORKER, "timeout_s", 2.0)
    start = time.monotonic()
    assert math("4", r"\boxed{9^{9^{9^{9}}} + x}") == 0.0
    assert math("4", r"\boxed{\sum_{k=1}^{10^{9}} \sin(k)^{k}}") == 0.0
    assert time.monotonic() - start < 60
    monkeypatch.undo()
    assert math(r"\frac{1}{2}", r"\boxed{0.5}") == 1.0


def test_threads_share_the_worker() -> None:
    """math-verify's own timeouts work in the main thread only."""
    results: dict[int, float] = {}

    def ask(number: int) -> None:
        results[number] = math(str(number), rf"\boxed{{{2 * number}/2}}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(6), 1.0)


def test_boxes_are_balanced() -> None:
    assert last_boxed(r"a \boxed{x^{2}_{1}} b") == "x^{2}_{1}"
    assert last_boxed("no box") is None


def test_exact_compares_tokens_or_text() -> None:
    ids = Problem(key="k", prompt=[1], answer=[5, 6], reward="exact")
    assert [score(ids, "", given) for given in ([5, 6], [5], [5, 6, 7], [])] == [1, 0, 0, 0]
    text = Problem(key="k", prompt="q", answer="yes", reward="exact")
    assert [score(text, given, [9]) for given in (" yes\n", "Yes", "")] == [1, 0, 0]


def test_exact_lets_the_answer_leave_out_the_token_that_ends_it() -> None:
    given = ([5, 6, 2], [5, 6], [5, 6, 2, 2], [2], [])
    without, with_end = (
        Problem(key="k", prompt=[1], answer=answer, reward="exact")
        for answer in ([5, 6], [5, 6, 2])
    )
    assert [score(without, "", ids, stopped=True) for ids in given] == [1, 1, 0, 0, 0]
    assert [score(with_end, "", ids, stopped=True) for ids in given] == [1, 0, 1, 0, 0]
    assert [score(without, "", ids) for ids in given] == [0, 1, 0, 0, 0]


def test_memory_counts_tokens_at_their_place() -> None:
    problem = Problem(key="k", prompt=[1], answer=[5, 6, 7, 8], reward="memory")
    given = ([5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 0, 7], [6, 7, 8, 5], [])
    assert [score(problem, "", ids) for ids in given] == [1, 1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="token ids"):
        score(Problem(key="k", prompt="q", answer="text", reward="memory"), "", [1])


def gym(task: str, *, seed: int = 3, **task_options: object) -> Problem:
    entry = gym_dataset(task, task_options, seed=seed, size=1)[0]
    return Problem(
        key="k",
        prompt=entry["question"],
        answer=str(entry["answer"]),
        reward="reasoning-gym",
        meta={"task": task, "task_options": task_options, "entry": entry},
    )


def tagged(answer: object) -> str:
    return f"<answer>{answer}</answer>"


def test_reasoning_gym_scores_what_is_tagged() -> None:
    problem = gym("chain_sum", min_terms=3, max_terms=3)
    assert score(problem, f"Well. {tagged(problem.answer)}", []) == 1.0
    assert score(problem, f"<answer>0</answer> <answer> {problem.answer} </answer>", []) == 1.0
    assert score(problem, str(problem.answer), []) == 0.0
    assert score(problem, tagged("no idea"), []) < 0.1
    assert score(problem, tagged("1" * 10_000), []) == 0.0


def test_reasoning_gym_scorers_survive_nonsense() -> None:
    """Some scorers parse the answer, and raise where it does not parse."""
    for task in ("countdown", "puzzle24", "simple_equations", "mini_sudoku", "letter_jumble"):
        problem = gym(task)
        for answer in ("", "((", "1/0", "{", "\x00", "9**9**", "[[1,2],[3]]", "None"):
            assert 0.0 <= score(problem, tagged(answer), []) < 1.0, (task, answer)


@pytest.mark.parametrize("task", EVALUATED)
def test_what_a_model_writes_does_not_run(task: str, tmp_path: Path) -> None:
    problem, made = gym(task), tmp_path / "made"
    for answer in (
        f"__import__('os').system('touch {made}')",
        f"open('{made}', 'w')",
        f"(9).__class__.__base__.__subclasses__() + [open('{made}', 'w')]",
        f'sin(\'open("{made}", "w")\')',
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "exit()",
        "quit(1)",
        "[0] * 10**10",
        "'x' * 10**10",
        "['" + "(" * 900,
    ):
        assert score(problem, tagged(answer), []) == 0.0, answer
    assert list(tmp_path.iterdir()) == []
    assert score(problem, tagged(problem.answer), []) == 1.0


def test_an_answer_without_end_is_given_up_and_the_next_one_read() -> None:
    problem = gym("countdown")
    start = time.monotonic()
    assert score(problem, tagged("9**9**9**9"), []) == 0.0
    assert time.monotonic() - start < 30
    assert score(problem, tagged(problem.answer), []) == 1.0


def test_a_worker_killed_from_outside_is_started_again() -> None:
    problem = gym("n_queens")
    for _ in range(2):
        assert score(problem, tagged(problem.answer), []) == 1.0
        pid = _GYM_WORKER.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    assert score(problem, tagged(problem.answer), []) == 1.0


def test_threads_score_different_tasks() -> None:
    problems = [gym(task) for task in ("chain_sum", "n_queens", "countdown", "time_intervals")]
    results: list[tuple[float, float]] = []

    def ask(problem: Problem) -> None:
        for _ in range(10):
            right, wrong = (tagged(a) for a in (problem.answer, "no idea"))
            results.append((score(problem, right, []), score(problem, wrong, [])))

    threads = [threading.Thread(target=ask, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    assert all(right == 1.0 and wrong < 0.1 for right, wrong in results)


def directly(problem: Problem, answer: str) -> float:
    """The task's own scorer, in this process."""
    scorer = gym_dataset(problem.meta["task"], {}, seed=0, size=1).score_answer
    try:
        return float(min(max(scorer(answer, deepcopy(problem.meta["entry"])), 0.0), 1.0))
    except Exception:  # JSON of another kind than asked for
        return 0.0


def test_the_worker_gives_what_the_scorer_gives() -> None:
    """For every task, for the right answer, and for less than that."""
    from reasoning_gym.factory import DATASETS

    for task in sorted(set(DATASETS) - {"composite"}):
        problem = gym(task)
        right = str(problem.answer).strip()
        for answer in (right, right[: len(right) // 2], "0"):
            if not answer or len(answer) > MAX_ANSWER_CHARS:
                continue
            expected, found = directly(problem, answer), score(problem, tagged(answer), [])
            refused = not may_be_evaluated(task, answer) and expected < 0.1 and found == 0.0
            assert found == expected or refused, (task, answer)


@pytest.mark.parametrize("task", EVALUATED)
def test_right_answers_are_still_right_where_the_scorer_evaluates(task: str) -> None:
    made = gym_dataset(task, {}, seed=8, size=20)
    for entry in (made[index] for index in range(20)):
        meta = {"task": task, "task_options": {}, "entry": entry}
        problem = Problem(
            key="k", prompt="q", answer=entry["answer"], reward="reasoning-gym", meta=meta
        )
        assert score(problem, tagged(entry["answer"]), []) == 1.0


@pytest.mark.parametrize("task", ["string_insertion", "spiral_matrix"])
def test_a_list_where_text_was_asked_for_earns_a_part(task: str) -> None:
    problem = gym(task)
    answer = str(problem.answer)
    assert score(problem, tagged(list(answer.split() if " " in answer else answer)), []) == 0.1


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="--data.reward must be one of math, .*'nope'"):
        score(Problem(key="k", prompt="q", answer="a", reward="nope"), "", [])


def test_the_options_name_the_rewards_there_are() -> None:
    assert set(get_args(REWARD_NAMES)) == {"auto", *REWARDS}
