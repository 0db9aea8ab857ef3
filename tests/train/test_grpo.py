"""GRPO against its formulas spelled out, token by token, on a model whose sequences fold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pte_vllm.adapter import Adapter
from pte_vllm.train.batch import Batch
from pte_vllm.train.config import GrpoOptions
from pte_vllm.train.grpo import (
    DriftError,
    PolicyLoss,
    Sample,
    check_drift,
    group_advantages,
    importance_weights,
    kl_k3,
    overlong_penalty,
    staleness,
    teaches,
    token_weights,
    with_advantages,
)
from pte_vllm.train.learner import Learner
from pte_vllm.train.modeling import PTEModel
from pte_vllm.train.replay import Scores, replay
from pte_vllm.train.rollout import Rollout
from tests.train.naive import walk
from tests.train.rollouts import make_rollout

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]
TEMPERATURE = 0.9


@pytest.fixture
def model(tiny: Tiny, adapters: Adapters) -> PTEModel:
    path = tiny("llama")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PTEModel(base, Adapter.load(adapters(path, rule="paper")))


def a_step(model: PTEModel, **options: Any) -> list[Sample]:
    """Two groups of three; lengths differ, and all sequences fold."""
    samples = []
    for group, rewards in enumerate([(1.0, 0.0, 0.5), (0.0, 0.0, 1.0)]):
        for index, reward in enumerate(rewards):
            rollout = make_rollout(
                model,
                group=group,
                index=index,
                prompt_tokens=(21, 40)[group],
                tokens=80 + 11 * index,
                temperature=TEMPERATURE,
                **options,
            )
            samples.append(Sample(rollout=rollout, reward=reward, shaped_reward=reward))
    return with_advantages(samples, "group")


def shifted(rollout: Rollout, scale: float, seed: int = 0) -> Rollout:
    """The same tokens from a sampler that disagrees."""
    noise = torch.randn(len(rollout.logprobs), generator=torch.Generator().manual_seed(seed))
    moved = torch.tensor(rollout.logprobs) + scale * noise
    return replace(rollout, logprobs=tuple(moved.clamp(max=0).tolist()))


def learner(model: PTEModel, lr: float = 0.0, **options: Any) -> Learner:
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=lr)
    initial = options.pop("initial", None)
    max_drift = options.pop("max_drift", 1e-4)
    return Learner(
        model,
        optimizer,
        GrpoOptions(**options),
        temperature=TEMPERATURE,
        max_drift=max_drift,
        max_grad_norm=1e9,
        initial=initial,
    )


def gradients(model: PTEModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_trainable() if p.grad is not None}


def logprobs_of(model: PTEModel, rollout: Rollout) -> torch.Tensor:
    """Of the answer's tokens, `[N]`."""
    batch = Batch.align([rollout.token_ids], [rollout.plan])
    return replay(model, batch, temperature=TEMPERATURE).logprobs[0, len(rollout.prompt_ids) :]


def naive_loss(
    samples: list[Sample],
    now: list[torch.Tensor],
    old: list[torch.Tensor],
    reference: list[torch.Tensor] | None,
    options: GrpoOptions,
) -> torch.Tensor:
    """The loss by its formula, one token after the other."""
    used = [not (options.mask_truncated and s.rollout.finish_reason == "length") for s in samples]
    lengths = [len(s.rollout.completion_ids) for s in samples]
    total = torch.zeros(())
    for i, sample in enumerate(samples):
        if not used[i]:
            continue
        if options.loss_level == "token":
            weight = 1.0 / sum(n for n, u in zip(lengths, used, strict=True) if u)
        else:
            weight = 1.0 / (sum(used) * lengths[i])
        for t in range(lengths[i]):
            w = math.exp(float(old[i][t]) - sample.rollout.logprobs[t])
            if options.is_mode == "token_truncate":
                w = min(w, options.is_cap)
            elif options.is_mode == "token_mask":
                w = w if w <= options.is_cap else 0.0
            else:
                w = 1.0
            ratio = (now[i][t] - old[i][t]).exp()
            bounded = min(max(float(ratio.detach()), 1 - options.clip_low), 1 + options.clip_high)
            if float(ratio.detach()) * sample.advantage <= bounded * sample.advantage:
                gain = ratio * sample.advantage
            else:
                gain = torch.tensor(bounded * sample.advantage)
            token_loss = -w * gain
            if reference is not None:
                delta = reference[i][t] - now[i][t]
                token_loss = token_loss + options.kl_coef * (delta.exp() - delta - 1)
            total = total + weight * token_loss
    return total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_level": "sequence", "is_mode": "token_mask", "is_cap": 1.1},
        {"is_mode": "none", "micro_batch_sequences": 1},
        {"kl_coef": 0.3, "is_cap": 1.05},
        {"kl_coef": 0.3, "reference": "initial", "mask_truncated": True},
    ],
    ids=str,
)
def test_first_step_is_the_formula(model: PTEModel, options: dict[str, Any]) -> None:
    settings = GrpoOptions(**options)
    samples = [
        replace(s, rollout=shifted(s.rollout, 0.2, seed=i))
        for i, s in enumerate(a_step(model, finish_reason="stop"))
    ]
    samples[1] = replace(samples[1], rollout=replace(samples[1].rollout, finish_reason="length"))
    initial = None
    if settings.reference == "initial":
        start = model.adapter()
        initial = replace(start, lora_b={n: 0.5 * b for n, b in start.lora_b.items()})
    old = [logprobs_of(model, s.rollout) for s in samples]
    reference = None
    if settings.kl_coef and initial is None:
        with model.adapter_disabled():
            reference = [logprobs_of(model, s.rollout) for s in samples]
    elif settings.kl_coef:
        current = model.adapter()
        model.load_adapter_weights(initial)
        reference = [logprobs_of(model, s.rollout) for s in samples]
        model.load_adapter_weights(current)

    now = [logprobs.clone().requires_grad_() for logprobs in old]
    expected = naive_loss(samples, now, old, reference, settings)
    coefficients = torch.autograd.grad(expected, now, allow_unused=True)
    for sample, coefficient in zip(samples, coefficients, strict=True):
        if coefficient is None:
            continue
        first = len(sample.rollout.prompt_ids)

        def chain(
            scores: Scores, c: torch.Tensor = coefficient, first: int = first
        ) -> torch.Tensor:
            here = scores.tokens >= first
            return (scores.logprobs[here] * c[scores.tokens[here] - first]).sum()

        batch = Batch.align([sample.rollout.token_ids], [sample.rollout.plan])
        replay(model, batch, temperature=TEMPERATURE, backward="segments", loss=chain)
    wanted = gradients(model)
    model.zero_grad()

    result = learner(model, max_drift=1.0, initial=initial, **options).step(samples, 1)
    found = gradients(model)
    assert result.loss == pytest.approx(float(expected.detach()), abs=1e-5)
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name
    assert result.folds >= 3
    if reference is not None:
        assert result.kl > 0


def test_whole_step_against_autograd_through_everything(tiny: Tiny, adapters: Adapters) -> None:
    """A plain LoRA under the window is one masked forward, so autograd can do it in one go."""
    path = tiny("llama")
    base = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    model = PTEModel(base, Adapter.load(adapters(path, plain=True)))
    samples = [replace(s, rollout=shifted(s.rollout, 0.2)) for s in a_step(model)]
    settings, now = GrpoOptions(), []
    for sample in samples:
        ids = list(sample.rollout.token_ids)
        visible, folds = walk(len(ids), sample.rollout.plan)
        assert len(folds) >= 3
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        logits = base(
            input_ids=torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False
        ).logits[0]
        scores = (logits / TEMPERATURE).log_softmax(-1)[:-1]
        targets = torch.tensor(ids[1:])
        picked = scores.gather(1, targets[:, None])[:, 0]
        now.append(picked[len(sample.rollout.prompt_ids) - 1 :])
    old = [logprobs.detach() for logprobs in now]
    loss = naive_loss(samples, now, old, None, settings)
    loss.backward()
    last = f"model.layers.{base.config.num_hidden_layers - 1}."
    wanted = gradients(model)
    model.zero_grad()
    result = learner(model, max_drift=1.0).step(samples, 1)
    found = gradients(model)
    assert result.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    # Keys and values of earlier segments are constants in the step; the last layer's output and
    # MLP linears do not reach a later token through them, so their gradients must be equal.
    exact = [n for n in wanted if last in n and not any(p in n for p in ("k_proj", "v_proj"))]
    assert len(exact) == 10
    for name in exact:
        assert (found[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_no_learning_rate_changes_nothing(model: PTEModel) -> None:
    samples = a_step(model)
    before = [logprobs_of(model, s.rollout) for s in samples]
    result = learner(model, lr=0.0, inner_steps=2).step(samples, 1)
    after = [logprobs_of(model, s.rollout) for s in samples]
    assert result.ratio_off <= 1e-6
    assert result.ratio_mean == pytest.approx(1.0, abs=1e-6)
    assert result.importance_mean == pytest.approx(1.0, abs=1e-4)
    assert result.drift <= 1e-5 and result.clipped_low == result.clipped_high == 0
    assert result.grad_norm > 0
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_step_follows_the_advantage(model: PTEModel) -> None:
    samples = a_step(model)
    before = [logprobs_of(model, s.rollout).sum() for s in samples]
    learner(model, lr=0.05).step(samples, 1)
    moved = [logprobs_of(model, s.rollout).sum() - b for s, b in zip(samples, before, strict=True)]
    assert sum(float(m) * s.advantage for m, s in zip(moved, samples, strict=True)) > 0


def test_second_inner_step_clips(model: PTEModel) -> None:
    samples = a_step(model)
    options = {"clip_low": 0.01, "clip_high": 0.01}
    result = learner(model, lr=0.3, inner_steps=2, **options).step(samples, 1)
    assert result.clipped_low > 0 and result.clipped_high > 0
    assert result.ratio_off > 0.01


def test_old_policy_is_the_learner_not_the_sampler(model: PTEModel) -> None:
    samples = a_step(model)
    stale = [replace(s, rollout=shifted(s.rollout, 0.5, seed=i)) for i, s in enumerate(samples)]
    result = learner(model, max_drift=1.0).step(stale, 1)
    assert result.ratio_off <= 1e-6
    assert result.importance_max <= GrpoOptions().is_cap + 1e-6
    assert result.importance_max > 1.5


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
    expected = sum(len(s.rollout.completion_ids) - 30 for s in samples)
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

    def under(rule: str | None) -> list[Sample]:
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
    assert result.loss == result.grad_norm == 0 and result.trained_tokens > 0
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


# -- without a model ------------------------------------------------------------------------------


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
                old=then[None],
                importance=torch.ones(1, 2),
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


def test_teaches(model: PTEModel) -> None:
    samples = a_step(model)[:3]
    assert teaches(samples)
    assert not teaches([replace(s, shaped_reward=0.5) for s in samples])
