"""The arms of the experiment about conversations: their plans, probes, training and scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from pte_vllm.adapter.calibration import Spans
from pte_vllm.adapter.probe_sampling import Thought, draw_probes
from pte_vllm.adapter.probe_training import train_probes
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.names import KeepScore
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.data.turn_tasks import (
    ANSWER_TOKENS,
    QUESTION_TOKENS,
    TURN_TASKS,
    Conversation,
    draw_batch,
)
from pte_vllm.train.experiments.memory_arms import MemoryArm, Progress, make_adapter, train_arm
from pte_vllm.train.experiments.supervised import score_answers
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel

BLOCK_TOKENS = 4
EVICT_RATIO = 0.5
_CALIBRATION_CONVERSATIONS = 32
_PROBES = 128
"""For each KV head."""


@dataclass(frozen=True, kw_only=True)
class TurnsArm(MemoryArm):
    """One way to hold the past of a conversation."""

    keep_tokens: int = 0
    """Evicted tokens that each KV head keeps beside the window."""
    keep_score: KeepScore = "expected"
    """How they are chosen."""
    probes: Literal["sampled", "trained"] = "sampled"
    """Of the score `expected`: queries of the base model in conversations, or such as were trained
    on what later ones attended to."""
    rate: float = 1.0
    """Times the learning rate of the budget."""

    def kv_bytes(self, layers: int, kv_size: int, longest: int) -> int:
        """Count the most bytes that keys and values of one conversation take, fp32.

        Args:
            layers: how many layers the model has.
            kv_size: KV heads × head size.
            longest: how many tokens the longest conversation has; full attention keeps them all.
        """
        question = -(-(QUESTION_TOKENS[1] + BLOCK_TOKENS - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        first = -(-(1 + QUESTION_TOKENS[1]) // BLOCK_TOKENS) * BLOCK_TOKENS
        tokens = first + question + self.window_tokens + self.keep_tokens
        return 4 * 2 * layers * kv_size * (tokens if self.window_tokens else longest)


@dataclass(frozen=True, kw_only=True)
class TurnsBudget:
    """How long an arm is trained, and on what it is scored; the same for all arms."""

    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 3e-3
    turns: tuple[int, int] = (8, 12)
    """Least and most turns of a trained conversation."""
    facts: tuple[int, int] = (3, 6)
    """Least and most values that are told and asked for in it."""
    distances: tuple[int, int] = (1, 8)
    """Least and most turns between telling and asking that are trained."""
    tasks: tuple[str, ...] = TURN_TASKS
    eval_turns: int = 24
    """Turns of every scored conversation."""
    eval_facts: int = 4
    eval_distances: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 19)
    eval_size: int = 64
    """How many conversations of each task are scored at each distance."""


def plan_of(arm: TurnsArm, conversation: Conversation) -> FoldPlan:
    """Return what an arm evicts when, of one conversation."""
    bounded = arm.window_tokens > 0
    return FoldPlan(
        pin_tokens=conversation.pin_tokens,
        pin_spans=conversation.pin_spans if bounded else (),
        window_tokens=arm.window_tokens,
        evict_ratio=EVICT_RATIO,
        block_size=BLOCK_TOKENS,
        keep_tokens=arm.keep_tokens,
        keep_score=arm.keep_score,
    )


def batch_of(arm: TurnsArm, conversations: Sequence[Conversation]) -> AlignedBatch:
    """Align conversations of one layout; the tokens asked for are the answers."""
    return AlignedBatch.align(
        [c.ids for c in conversations],
        [plan_of(arm, c) for c in conversations],
        [c.answers for c in conversations],
    )


def longest_tokens(budget: TurnsBudget) -> int:
    """Return the most tokens that a scored conversation can have."""
    return 1 + budget.eval_turns * (QUESTION_TOKENS[1] + ANSWER_TOKENS[1])


def keeper_of(base: Any, arm: TurnsArm, budget: TurnsBudget) -> Keeper | None:
    """Make the probes by which an arm keeps tokens; None where it needs none.

    Trained probes are trained on conversations of the tasks under a plan that pins the first
    question only: what is worth keeping is asked of all that has left.
    """
    if not arm.keep_tokens or arm.keep_score != "expected":
        return None
    conversations = _trained(budget, random.Random("probes"), _CALIBRATION_CONVERSATIONS)
    thoughts = [
        Thought(token_ids=torch.tensor(c.ids), prompt_tokens=c.pin_tokens) for c in conversations
    ]
    queries = draw_probes(base, thoughts, _PROBES, seed=0)
    if arm.probes == "trained":
        plan = FoldPlan(
            pin_tokens=conversations[0].pin_tokens,
            window_tokens=arm.window_tokens,
            evict_ratio=EVICT_RATIO,
            block_size=BLOCK_TOKENS,
            keep_tokens=arm.keep_tokens,
        )
        answers = [(c.ids, plan) for c in conversations]
        queries, _ = train_probes(base, answers, queries, steps=budget.steps)
    return Keeper(PTEModel(base), Probes.of(queries, "turns-base"))


def _trained(budget: TurnsBudget, rng: random.Random, size: int) -> list[Conversation]:
    """Make conversations as they are trained on, all of one layout."""
    turns = rng.randint(*budget.turns)
    low, high = budget.distances
    return draw_batch(
        rng,
        size,
        turns=turns,
        facts=min(rng.randint(*budget.facts), turns // 2),
        distances=(low, min(high, turns - 2)),
        tasks=budget.tasks,
    )


def run_arm(
    base: Any, arm: TurnsArm, budget: TurnsBudget, seed: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Train an arm and score it; returns a record for the results."""
    rng = random.Random(f"train {seed}")
    torch.manual_seed(seed)
    keeper = keeper_of(base, arm, budget)
    samples = _trained(budget, random.Random(f"calibration {seed}"), _CALIBRATION_CONVERSATIONS)
    spans = Spans(
        pinned_tokens=samples[0].pin_tokens,
        recall_tokens=len(samples[0].ids) // 2,
        local_tokens=max(1, arm.window_tokens),
    )
    ids = torch.tensor([sample.ids for sample in samples])
    model = PTEModel(base, make_adapter(base, arm, ids, spans, seed))
    try:
        losses, seconds = train_arm(
            *(model, arm, lambda: batch_of(arm, _trained(budget, rng, budget.batch_size))),
            steps=budget.steps,
            learning_rate=arm.rate * budget.learning_rate,
            keeper=keeper,
            progress=progress,
        )
        scores = [
            {
                "task": task,
                "turns": distance,
                "accuracy": _accuracy(model, arm, budget, task, distance, keeper),
            }
            for task in budget.tasks
            for distance in budget.eval_distances
        ]
    finally:
        model.detach()
    return {
        "arm": arm.name,
        "seed": seed,
        "seconds": round(seconds, 1),
        "losses": [round(loss, 4) for loss in losses],
        "scores": scores,
        "options": asdict(arm),
    }


def _accuracy(
    model: PTEModel,
    arm: TurnsArm,
    budget: TurnsBudget,
    task: str,
    distance: int,
    keeper: Keeper | None,
) -> float:
    """Compute the share of right answers on conversations no training saw, the same for all."""
    conversations = draw_batch(
        random.Random(f"score {task} {distance}"),
        budget.eval_size,
        turns=budget.eval_turns,
        facts=budget.eval_facts,
        distances=(distance, distance),
        tasks=[task],
    )
    return score_answers(model, [batch_of(arm, conversations)], keeper=keeper).accuracy
