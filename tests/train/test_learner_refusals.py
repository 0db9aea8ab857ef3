"""What a step of GRPO refuses, and what it must leave as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pte_vllm.train.grpo.learner import Learner
from pte_vllm.train.grpo.loss import DriftError, ScoredRollout, staleness, with_advantages
from pte_vllm.train.options.runs import GrpoOptions
from pte_vllm.train.replay.modeling import PTEModel
from tests.train.steps import TEMPERATURE, a_step, learner, policy, shifted

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]


@pytest.fixture
def model(tiny: Tiny, adapters: Adapters) -> PTEModel:
    return policy(tiny("llama"), adapters)


def test_a_gradient_that_is_not_finite_says_what_was_updated(model: PTEModel) -> None:
    """The update before it stays, so the message must not call the adapter unchanged."""
    samples = a_step(model)
    broken = [replace(samples[0], advantage=math.nan), *samples[1:]]
    with pytest.raises(FloatingPointError, match="norm is nan; the adapter is unchanged"):
        learner(model).step(broken, 1)
    with pytest.raises(FloatingPointError, match="norm is nan; the adapter is as inner step 1"):
        learner(model, lr=math.inf, inner_steps=2).step(samples, 1)


def test_drift_is_refused_before_anything_changes(model: PTEModel) -> None:
    samples = a_step(model)
    samples[0] = replace(samples[0], rollout=shifted(samples[0].rollout, 1.0))
    before = model.adapter()
    with pytest.raises(DriftError, match="version 1.*max_logprob_drift"):
        learner(model, lr=1.0, max_drift=1e-3).step(samples, 1)
    after = model.adapter()
    for name, b in before.lora_b.items():
        assert torch.equal(b, after.lora_b[name])


def test_drift_counts_tokens_of_the_own_version_only(model: PTEModel) -> None:
    """Tokens of the version before may differ; those of the learner's own may not."""
    samples = a_step(model, spans=((4, 30), (5, 10_000)))
    rollout = samples[0].rollout
    old_ones = tuple(x - 2.0 if t < 30 else x for t, x in enumerate(rollout.logprobs))
    samples[0] = replace(samples[0], rollout=replace(rollout, logprobs=old_ones))
    result = learner(model, max_drift=1e-4).step(samples, 5)
    taught = [s.rollout for s in samples if s.advantage]  # the others are not replayed
    expected = sum(len(rollout.completion_ids) - 30 for rollout in taught)
    assert result.drift_tokens == expected and result.drift < 1e-5
    assert result.importance_max == GrpoOptions().is_cap
    new_ones = tuple(x - 2.0 if t >= 30 else x for t, x in enumerate(rollout.logprobs))
    samples[0] = replace(samples[0], rollout=replace(rollout, logprobs=new_ones))
    with pytest.raises(DriftError):
        learner(model, max_drift=1e-4).step(samples, 5)


def test_stale_rollouts_are_refused(model: PTEModel) -> None:
    samples = a_step(model, spans=((3, 10), (5, 10_000)))
    assert staleness(samples[0].rollout, 6) == 3
    with pytest.raises(ValueError, match="max_staleness 2"):
        learner(model, max_staleness=2).step(samples, 6)
    assert math.isnan(learner(model, max_staleness=3, max_drift=1e-9).step(samples, 6).drift)
    with pytest.raises(ValueError, match="the learner's is 4"):
        learner(model, max_staleness=3).step(samples, 4)


def test_rollouts_of_another_rule_are_refused(model: PTEModel) -> None:
    samples = a_step(model)

    def under(rule: str | None) -> list[ScoredRollout]:
        return [samples[0], replace(samples[1], rollout=replace(samples[1].rollout, rule=rule))]

    for rule in (None, "paper"):
        learner(model).step(under(rule), 1)
    with pytest.raises(ValueError, match="under the rule sum, but the adapter .* has paper"):
        learner(model).step(under("sum"), 1)


def test_groups_without_variance_move_nothing(model: PTEModel) -> None:
    samples = with_advantages([replace(s, shaped_reward=1.0) for s in a_step(model)], "group")
    assert all(s.advantage == 0 for s in samples)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.1)
    run = Learner(model, optimizer, GrpoOptions(), temperature=TEMPERATURE, max_drift=1e-3)
    run.step(a_step(model), 1)  # momentum
    before = model.adapter()
    rebuilt = with_advantages([replace(s, shaped_reward=1.0) for s in a_step(model)], "group")
    result = run.step(rebuilt, 1)
    assert result.loss == result.grad_norm == 0
    assert result.drift_tokens > 0 and result.drift < 1e-5  # some are looked at all the same
    for name, b in before.lora_b.items():
        assert torch.equal(b, model.adapter().lora_b[name])


def test_initial_reference_is_needed(model: PTEModel) -> None:
    with pytest.raises(ValueError, match="initial"):
        learner(model, kl_coef=0.1, reference="initial")


def test_reference_leaves_the_policy_as_it_was(model: PTEModel) -> None:
    samples, start = a_step(model), model.adapter()
    other = replace(start, lora_b={n: -b for n, b in start.lora_b.items()})
    learner(model, kl_coef=0.1, reference="initial", initial=other).step(samples, 1)
    for name, b in start.lora_b.items():
        assert torch.equal(b, model.adapter().lora_b[name])
