"""A step of GRPO against its formula spelled out, token by token, on sequences that fold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter
from pte_vllm.train.grpo import learner as learning
from pte_vllm.train.grpo.loss import DriftError, ScoredRollout
from pte_vllm.train.options.runs import GrpoOptions
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import ReplayResult, Scores
from pte_vllm.train.replay.segments import replay
from tests.train.naive import walk
from tests.train.steps import (
    TEMPERATURE,
    a_step,
    gradients,
    learner,
    logprobs_of,
    policy,
    shifted,
)

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]


@pytest.fixture
def model(tiny: Tiny, adapters: Adapters) -> PTEModel:
    return policy(tiny("llama"), adapters)


def naive_loss(
    samples: list[ScoredRollout],
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

        batch = AlignedBatch.align([sample.rollout.token_ids], [sample.rollout.plan])
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


def test_each_inner_step_replays_a_rollout_once(
    model: PTEModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is seen of rollouts takes no replay of its own, and what teaches nothing takes none."""
    replayed = []

    def counting(model: PTEModel, batch: AlignedBatch, **options: Any) -> ReplayResult:
        replayed.append(len(batch.ids))
        return replay(model, batch, **options)

    monkeypatch.setattr(learning, "replay", counting)
    samples = a_step(model)
    active = sum(sample.advantage != 0 for sample in samples)
    assert 0 < active < len(samples)
    for inner_steps in (1, 2):
        result = learner(model, inner_steps=inner_steps).step(samples, 1)
        assert sum(replayed) == inner_steps * active
        assert result.drift <= 1e-5 and result.entropy > 0
        replayed.clear()


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


def test_rollouts_that_keep_tokens(model: PTEModel) -> None:
    """What they kept is kept again, whatever the replay would choose, beside others too."""
    keeping = a_step(model, keep_tokens=16)
    assert all(s.rollout.kept and any(s.rollout.kept) for s in keeping)
    result = learner(model).step([*keeping[:3], *a_step(model)[3:]], version=1)
    assert result.drift_max < 1e-4 and result.drift_p99 <= result.drift_max
    assert 0.2 < result.kept_agreement < 0.8  # as two draws of 16 of 32 have in common
    kept = keeping[0].rollout
    other = replace(kept, kept=keeping[1].rollout.kept[: len(kept.kept)])
    wrong = [replace(keeping[0], rollout=other), *keeping[1:3], *a_step(model)[3:]]
    with pytest.raises(DriftError):
        learner(model).step(wrong, version=1)


def test_without_kept_tokens_nothing_is_said_of_them(model: PTEModel) -> None:
    assert math.isnan(learner(model).step(a_step(model), version=1).kept_agreement)
