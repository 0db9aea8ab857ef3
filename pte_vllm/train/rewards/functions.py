"""Rewards: how right an answer is, from 0 to 1.

An answer that cannot be read earns 0. Nothing a model writes raises, hangs, exhausts memory or runs
in the trainer: what needs more than comparing is decided by a `ScoringWorker`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from pte_vllm.train.data.answers import MAX_ANSWER_CHARS, final_answer, last_tagged
from pte_vllm.train.data.ledger import Ledger, share_right
from pte_vllm.train.data.questions import Problem
from pte_vllm.train.rewards.scorers import gym_scorer, math_scorer
from pte_vllm.train.rewards.scoring_worker import ScoringWorker

Reward = Callable[[Problem, str, Sequence[int], bool], float]
"""A reward function; its arguments are those of `score`, `stopped` last."""


def score(problem: Problem, text: str, ids: Sequence[int], *, stopped: bool = False) -> float:
    """Compute the reward of one completion, from 0 to 1, by the problem's own function.

    Args:
        problem: the question, which names its reward.
        text: the completion as text, without special tokens.
        ids: the completion as token ids.
        stopped: whether the last id is the one that ended it; vLLM keeps that among the ids.

    Raises:
        ValueError: if the problem names no reward there is.
    """
    if problem.reward not in REWARDS:
        raise ValueError(
            f"--data.reward must be one of {', '.join(REWARDS)}, got {problem.reward!r}"
        )
    return REWARDS[problem.reward](problem, text, ids, stopped)


_MATH_WORKER = ScoringWorker(math_scorer)  # no processes until they are asked
_GYM_WORKER = ScoringWorker(gym_scorer)


def math(problem: Problem, text: str, ids: Sequence[int], stopped: bool) -> float:
    """Give 1 if the final answer equals the right one as mathematics, by `math-verify`; else 0."""
    answer = final_answer(text)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    right = str(problem.answer).strip()
    if answer == right:
        return 1.0
    return _MATH_WORKER.score((), (right, answer))


def exact(problem: Problem, text: str, ids: Sequence[int], stopped: bool) -> float:
    """Give 1 if the whole completion is the answer, by token or as text without outer space.

    An answer in tokens may name the one that ends it, and need not.
    """
    if isinstance(problem.answer, list):
        whole = list(ids)
        return float(problem.answer == whole or (stopped and problem.answer == whole[:-1]))
    return float(text.strip() == problem.answer.strip())


def memory(problem: Problem, text: str, ids: Sequence[int], stopped: bool) -> float:
    """Give the share of the answer's tokens that stand at their place; what follows is ignored.

    Raises:
        ValueError: if the answer is not token ids.
    """
    if not isinstance(problem.answer, list) or not problem.answer:
        raise ValueError("--data.reward memory needs answers that are token ids")
    right = sum(a == b for a, b in zip(problem.answer, ids, strict=False))
    return right / len(problem.answer)


def reasoning_gym(problem: Problem, text: str, ids: Sequence[int], stopped: bool) -> float:
    """Give what the task's own scorer gives for the last `<answer>`; without one, 0."""
    answer = last_tagged(text)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    setup = problem.meta["task"], json.dumps(problem.meta["task_options"])
    return _GYM_WORKER.score(setup, (answer, problem.meta["entry"]))


def ledger(problem: Problem, text: str, ids: Sequence[int], stopped: bool) -> float:
    """Give the share of look-ups that are right (`data.ledger`)."""
    return share_right(Ledger.from_meta(problem.meta), text)


REWARDS: dict[str, Reward] = {
    "math": math,
    "reasoning-gym": reasoning_gym,
    "exact": exact,
    "memory": memory,
    "ledger": ledger,
}
