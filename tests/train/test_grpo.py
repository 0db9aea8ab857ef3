"""The functions that GRPO's loss is made of, by numbers that can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pte_vllm.train.grpo.loss import (
    DriftError,
    PolicyLoss,
    check_drift,
    group_advantages,
    importance_weights,
    kl_k3,
    overlong_penalty,
    teaches,
    token_weights,
)
from pte_vllm.train.options.runs import GrpoOptions
from pte_vllm.train.replay.results import Scores
from tests.train.steps import a_step, policy


def test_advantages() -> None:
    assert group_advantages([2.0, 2.0, 2.0], "group") == [0.0] * 3
    scaled = group_advantages([1.0, 0.0, 0.0, 0.0], "group")
    assert sum(scaled) == pytest.approx(0, abs=1e-9)
    assert scaled[0] == pytest.approx(0.75 / (0.1875**0.5), rel=1e-4)
    assert group_advantages([1.0, 0.0, 0.0, 0.0], "none") == [0.75, -0.25, -0.25, -0.25]


def test_overlong_penalty_is_linear_in_the_buffer() -> None:
    penalty = [overlong_penalty(n, 100, 20, 0.5) for n in (10, 80, 90, 100)]
    assert penalty == [0.0, 0.0, -0.25, -0.5]
    assert overlong_penalty(100, 100, 0, 0.5) == 0.0


def test_token_weights() -> None:
    assert token_weights([3, 0, 1], "token") == [0.25] * 3
    assert token_weights([4, 0, 1], "sequence") == [0.125, 0.0, 0.5]


def test_importance_weights() -> None:
    old, sampler = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -3.0, -0.5])
    truncated = importance_weights(old, sampler, "token_truncate", 2.0)
    masked = importance_weights(old, sampler, "token_mask", 2.0)
    assert truncated.tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5)])
    assert masked.tolist() == pytest.approx([1.0, 0.0, math.exp(-0.5)])
    assert importance_weights(old, sampler, "none", 2.0).tolist() == [1.0] * 3


def test_k3_estimates_kl() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 50).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True)
    estimate = kl_k3(q[tokens], p[tokens])
    assert estimate.min() >= 0
    assert float(estimate.mean()) == pytest.approx(float(exact), rel=0.02)


@pytest.mark.parametrize("off", [99.0, -99.0, math.inf])
def test_policies_far_apart_leave_numbers_finite(off: float) -> None:
    """Log-probs that differ so much that exponentials overflow, on both sides of the clip."""
    near, far = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0 - off])
    for mode in ("token_truncate", "token_mask"):
        for pair in ((near, far), (far, near)):
            weights = importance_weights(*pair, mode, 3.0)
            assert weights[0] == 1 and 0 <= weights[1] <= 3
    at = torch.arange(2)
    for advantage in (1.0, -1.0):
        for now, then in ((near, far), (far, near)):
            logprobs = now.clone().requires_grad_()
            loss = PolicyLoss(
                options=GrpoOptions(kl_coef=0.5),
                advantages=torch.tensor([advantage]),
                weights=torch.ones(1, 2),
                sampler=near[None],
                old=then[None],
                reference=then[None],
            )
            zeros = torch.zeros_like(at)
            scores = Scores(logits=logprobs[:, None], logprobs=logprobs, rows=zeros, tokens=at)
            total = loss(scores)
            total.backward()
            assert logprobs.grad is not None
            assert total.isfinite() and logprobs.grad.isfinite().all()
            assert logprobs.grad[0] == pytest.approx(-advantage)
            assert math.isfinite(loss.stats.ratio_sum + loss.stats.ratio_off + loss.stats.kl_sum)


def test_drift_that_is_not_a_number_is_refused() -> None:
    check_drift(math.nan, 1e-4, 1, tokens=0)
    check_drift(1e-4, 1e-4, 1, tokens=7)
    for drift in (2e-4, math.nan, math.inf):
        with pytest.raises(DriftError, match="version 1"):
            check_drift(drift, 1e-4, 1, tokens=7)


def test_teaches(tiny: Callable[[str], Path], adapters: Callable[..., Path]) -> None:
    samples = a_step(policy(tiny("llama"), adapters))[:3]
    assert teaches(samples)
    assert not teaches([replace(s, shaped_reward=0.5) for s in samples])
