"""How far back the windows of the memory experiment let a model see without a state."""

from __future__ import annotations

import random

import pytest

from pte_vllm.train.data.memory_tasks import sample_batch
from pte_vllm.train.experiments.memory_arms import longest_tokens, plan_of
from pte_vllm.train.experiments.memory_base import BaseConfig
from pte_vllm.train.experiments.memory_plans import ARMS, FULL_PLAN, LORA


def reach(window_tokens: int, position: int, layers: int) -> int:
    """Tokens from `position` back to the oldest thought that so many layers can pass on to it."""
    plan, oldest = plan_of(window_tokens), position
    for _ in range(layers):
        folded_end = (plan.pinned_blocks + plan.folded_blocks(oldest)) * plan.block_size
        oldest = folded_end if plan.folded_blocks(oldest) else plan.pin_tokens
    return position - oldest


@pytest.mark.parametrize(
    ("window_tokens", "nearest", "farthest"),
    [(16, 16, 23), (24, 24, 39), (32, 32, 47), (40, 43, 71)],
)
def test_reach(window_tokens: int, nearest: int, farthest: int) -> None:
    """Of the tokens that answers are read from; the fact lies a gap or more before them."""
    found = [
        reach(window_tokens, position - 1, BaseConfig.layers)
        for gap in FULL_PLAN.budget.eval_gaps
        for facts in (3, 6, 24)
        for sample in sample_batch(
            random.Random(0), 16, gap_tokens=(gap, gap), tasks=["recall"], facts=facts
        )
        for position, asked in enumerate(sample.answers)
        if asked
    ]
    assert (min(found), max(found)) == (nearest, farthest)


def test_wider_windows_hold_what_a_state_does() -> None:
    """`LoRA_c, window 24` has the bytes of one matrix, `window 40` those of three."""
    base, longest = BaseConfig(), longest_tokens(FULL_PLAN.budget)
    held = {
        arm.name: arm.state_bytes(base.layers)
        + arm.kv_bytes(base.layers, base.kv_heads * base.head_dim, longest)
        for arm in ARMS
    }
    assert held["LoRA_c, window 24"] == held["PTE paper"]
    largest = max(value for name, value in held.items() if name.startswith("PTE"))
    assert held["LoRA_c, window 40"] > largest >= held["PTE ridge"] > held["PTE delta squared"]
    assert held[LORA.name] == held["window only"] < held["PTE paper"] < held["full cache"]
