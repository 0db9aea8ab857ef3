"""Rewards: how right an answer is, from 0 to 1.

An answer that cannot be read earns 0. Nothing a model writes raises, hangs, exhausts memory or runs
in the trainer: what needs more than comparing is decided by a `ScoringWorker`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from pte_vllm.train.data.questions import Problem
from pte_vllm.train.rewards.scorers import gym_scorer, math_scorer
from pte_vllm.train.rewards.scoring_worker import ScoringWorker

Reward = Callable[[Problem, str, Sequence[int], bool], float]
"""Takes what `score` takes."""

MAX_ANSWER_CHARS = 1000
"""Longer final answers are wrong: no answer is that long, and parsing would take for ever."""
_MAX_BOXES = 16
_ANSWER_LINE = re.compile(r"\banswer\b[* ]{0,4}(?:is\b[* ]{0,4})?:([^\n]+)", re.IGNORECASE)
"""Bounded repeats: two open-ended ones in a row would take n² on a run of spaces."""


def score(problem: Problem, text: str, ids: Sequence[int], *, stopped: bool = False) -> float:
    """Reward of one completion, by the problem's own function.

    Args:
        problem: the question.
        text: the completion, without special tokens.
        ids: its token ids.
        stopped: the last id is the one that ended it, as vLLM keeps it among the ids.

    Raises:
        ValueError: if the problem names no reward there is.
    """
    if problem.reward not in REWARDS:
        raise ValueError(
            f"--data.reward must be one of {', '.join(REWARDS)}, got {problem.reward!r}"
        )
    return REWARDS[problem.reward](problem, text, ids, stopped)


# Reading answers


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` or `\fbox{...}` holds; None if there is none."""
    end = len(text)
    for _ in range(_MAX_BOXES):  # unbalanced boxes without end must not cost n²
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return None
        rest = text[start : start + MAX_ANSWER_CHARS + 20].split("ox", 1)[1].removeprefix("ed")
        rest = rest.lstrip()
        if rest.startswith("{"):
            inside = _balanced(rest)
            if inside is not None:
                return inside.strip()
        elif rest:  # \boxed 5
            return re.split(r"[\s$.]", rest, maxsplit=1)[0] or None
        end = start
    return None


def _balanced(text: str) -> str | None:
    """What the braces hold that `text` starts with; None if they do not close."""
    depth, escaped = 0, False
    for place, char in enumerate(text):
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[1:place]
    return None


def last_tagged(text: str) -> str | None:
    """What the last `<answer>...</answer>` holds; None if there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end].strip()


def final_answer(text: str) -> str | None:
    r"""The answer that a completion commits to; None if it commits to none.

    Looked for are `\boxed{x}`, `#### x`, `Answer: x` and `<answer>x</answer>`; the one that stands
    last counts, so that naming many answers does not help. A bare number at the end is no answer.
    """
    found: list[tuple[int, str]] = []  # place, answer
    boxed = last_boxed(text)
    if boxed is not None:
        found.append((max(text.rfind("\\boxed"), text.rfind("\\fbox")), boxed))
    tagged = last_tagged(text)
    if tagged is not None:
        found.append((text.rfind("</answer>"), tagged))
    mark = text.rfind("####")
    if mark >= 0:
        found.append((mark, text[mark + 4 :].lstrip().partition("\n")[0]))
    for match in _ANSWER_LINE.finditer(text):
        found.append((match.start(1), match.group(1)))
    if not found:
        return None
    answer = max(found)[1]
    answer = last_boxed(answer) or last_tagged(answer) or answer
    answer = answer.strip(" \t\r\n*").removesuffix(".").strip()
    for mark_ in ("$$", "$"):
        if len(answer) > 2 * len(mark_) and answer.startswith(mark_) and answer.endswith(mark_):
            answer = answer[len(mark_) : -len(mark_)].strip()
    return answer or None


# The rewards


_MATH_WORKER = ScoringWorker(math_scorer)  # no processes until they are asked
_GYM_WORKER = ScoringWorker(gym_scorer)


def math(problem: Problem, text: str, ids: Sequence[int], stopped: bool) -> float:
    """1 if the final answer equals the right one as mathematics, by `math-verify`; else 0."""
    answer = final_answer(text)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    right = str(problem.answer).strip()
    if answer == right:
        return 1.0
    return _MATH_WORKER.score((), (right, answer))


def exact(problem: Problem, text: str, ids: Sequence[int], stopped: bool) -> float:
    """1 if the whole completion is the answer: token by token, or as text without outer space.

    An answer in tokens may name the one that ends it, and need not.
    """
    if isinstance(problem.answer, list):
        whole = list(ids)
        return float(problem.answer == whole or (stopped and problem.answer == whole[:-1]))
    return float(text.strip() == problem.answer.strip())


def memory(problem: Problem, text: str, ids: Sequence[int], stopped: bool) -> float:
    """Part of the answer's tokens that stand at their place; what follows them does not count.

    Raises:
        ValueError: if the answer is not token ids.
    """
    if not isinstance(problem.answer, list) or not problem.answer:
        raise ValueError("--data.reward memory needs answers that are token ids")
    right = sum(a == b for a, b in zip(problem.answer, ids, strict=False))
    return right / len(problem.answer)


def reasoning_gym(problem: Problem, text: str, ids: Sequence[int], stopped: bool) -> float:
    """What the task's own scorer gives for the last `<answer>`; without one, 0."""
    answer = last_tagged(text)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    setup = problem.meta["task"], json.dumps(problem.meta["task_options"])
    return _GYM_WORKER.score(setup, (answer, problem.meta["entry"]))


REWARDS: dict[str, Reward] = {
    "math": math,
    "reasoning-gym": reasoning_gym,
    "exact": exact,
    "memory": memory,
}
