"""The arms of the experiment about conversations: what they pin, hold and weigh, and the report."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pte_vllm.train.data.turn_tasks import draw_batch
from pte_vllm.train.experiments import turns_report
from pte_vllm.train.experiments.turns_arms import (
    BLOCK_TOKENS,
    TurnsArm,
    batch_of,
    longest_tokens,
    plan_of,
)
from pte_vllm.train.experiments.turns_plans import (
    ARMS,
    FULL,
    FULL_PLAN,
    KEPT,
    QUICK_PLAN,
    RIDGE,
    WINDOW,
)


def _bytes(arm: TurnsArm, state: bool = True) -> int:
    base = FULL_PLAN.base
    longest = longest_tokens(FULL_PLAN.budget)
    held = arm.kv_bytes(base.layers, base.kv_heads * base.head_dim, longest)
    return held + state * arm.state_bytes(base.layers)


def test_equal_bytes() -> None:
    arms = {arm.name: arm for arm in ARMS}
    held = {name: _bytes(arm) for name, arm in arms.items()}
    assert held["window 32"] == held[KEPT.name] > held[RIDGE.name] > held[WINDOW.name]
    largest = max(held[name] for name in arms if name.startswith("keeping"))
    assert held["LoRA_c, window 48"] >= largest
    assert held[FULL.name] > 4 * held["LoRA_c, window 48"]


@pytest.mark.parametrize("arm", [WINDOW, KEPT, ARMS[-1]], ids=lambda arm: arm.name)
def test_a_conversation_holds_no_more_than_its_arm_says(arm: TurnsArm) -> None:
    """Whatever its length: the bytes of the report are those of the plan's most blocks."""
    block_bytes = _bytes(TurnsArm(name="a", window_tokens=8), state=False) - _bytes(
        TurnsArm(name="b", window_tokens=4), state=False
    )
    for seed in range(5):
        (made,) = draw_batch(random.Random(seed), 1, turns=40, facts=4, distances=(1, 20))
        plan = plan_of(arm, made)
        assert plan.pin_spans == made.pin_spans and plan.pin_tokens == made.pin_tokens
        held = [plan.held_blocks(position) for position in range(len(made.ids))]
        assert BLOCK_TOKENS == 4 and max(held) * block_bytes <= _bytes(arm, state=False)
        assert plan.folds(len(made.ids)) > 10
    full = plan_of(FULL, made)
    assert not full.bounded and not full.pin_spans


def test_conversations_side_by_side() -> None:
    made = draw_batch(random.Random(0), 4, turns=12, facts=3, distances=(1, 8))
    batch = batch_of(KEPT, made)
    assert batch.ids.shape == (4, len(made[0].ids)) and not batch.left.any()
    assert batch.wanted.sum() == 12


def test_report(tmp_path: Path) -> None:
    plan = replace(QUICK_PLAN, arms=(WINDOW, KEPT))
    runs = [
        {
            "arm": arm.name,
            "seed": seed,
            "seconds": 1.0,
            "scores": [
                {"task": "facts", "turns": turns, "accuracy": 0.25 * seed + 0.5 * (arm is KEPT)}
                for turns in plan.budget.eval_distances
            ],
        }
        for arm in plan.arms
        for seed in (0, 1)
    ]
    result = {
        "seconds": 3.0,
        "budget": asdict(plan.budget),
        "bytes": {arm.name: {"kv": 1024, "state": 0} for arm in plan.arms},
        "runs": runs,
    }
    text = turns_report.write(result, tmp_path, "turns")
    assert (tmp_path / "turns.md").read_text() == text
    assert (tmp_path / "turns.png").stat().st_size > 0
    assert "16 turns" in text and "| arm | 1 | 2 | 4 | 8 | 12 |" in text
    assert f"| {KEPT.name} | 0.62 ± 0.12 |" in text and f"| {WINDOW.name} | 0.12" in text
