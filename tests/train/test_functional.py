"""Differentiable log-probs: any loss made of them has the gradient that a replay gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.functional import TokenScores, differentiable_log_probs
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import replay
from tests.harness.models import random_tokens

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

BLOCK = 16
LENGTHS = (150, 123, 201)
TEMPERATURE = 0.8


def batch() -> AlignedBatch:
    plans = [FoldPlan(pin_tokens=p, window_tokens=64, block_size=BLOCK) for p in (20, 5, 37)]
    sequences = [random_tokens(n, seed=n) for n in LENGTHS]
    wanted = [
        [t >= plan.pin_tokens for t in range(n)] for plan, n in zip(plans, LENGTHS, strict=True)
    ]
    return AlignedBatch.align(sequences, plans, wanted)


def gradients(model: PTEModel) -> dict[str, Tensor]:
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_trainable()
    }
    model.zero_grad(set_to_none=True)
    return found


def nonlinear(scores: TokenScores) -> Tensor:
    """A loss that is no sum over tokens: each weight depends on other tokens."""
    ratio = (scores.logprobs - scores.logprobs.detach().mean()).clamp(max=1.0).exp()
    return (ratio * scores.logprobs).mean() ** 2 + 0.3 * scores.entropies.pow(2).mean()


@pytest.mark.parametrize("mode", ["segments", "full"])
def test_gradient_of_a_loss_over_all_tokens(mode: str, tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("qwen3")
    model = PTEModel.from_pretrained(path, adapters(path, rule="paper"))
    found = differentiable_log_probs(model, batch(), temperature=TEMPERATURE, backward=mode)
    loss = nonlinear(found)
    loss.backward()
    got = gradients(model)

    # The same from leaves: how the loss changes with each number, sent through the replay by hand.
    leaves = TokenScores(*(t.detach().requires_grad_() for t in found))
    nonlinear(leaves).backward()

    def weighted(scores: Scores) -> Tensor:
        q = scores.logits.softmax(-1)
        entropy = -(q * q.log()).sum(-1)
        at = (scores.rows, scores.tokens)
        return (
            leaves.logprobs.grad[at] * scores.logprobs + leaves.entropies.grad[at] * entropy
        ).sum()

    replay(model, batch(), temperature=TEMPERATURE, backward=mode, loss=weighted)
    for name, expected in gradients(model).items():
        assert (got[name] - expected).norm() <= 1e-4 * expected.norm(), name
        assert expected.norm() > 0 or name in ("encoder.log_ridge",), name


def test_values_are_the_replays(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    model = PTEModel.from_pretrained(path, adapters(path))
    found = differentiable_log_probs(model, batch(), temperature=TEMPERATURE)
    logits = torch.zeros(3, 201, 512)

    def keep(scores: Scores) -> Tensor:
        logits[scores.rows, scores.tokens] = scores.logits
        return scores.logprobs.sum()

    expected = replay(model, batch(), temperature=TEMPERATURE, loss=keep)
    assert found.logprobs.requires_grad and torch.equal(found.logprobs, expected.logprobs)
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    entropies[logits.abs().sum(-1) == 0] = 0
    torch.testing.assert_close(found.entropies, entropies, atol=1e-4, rtol=0)
    with torch.no_grad():
        plain = differentiable_log_probs(model, batch(), temperature=TEMPERATURE)
    assert not plain.logprobs.requires_grad and torch.equal(plain.logprobs, expected.logprobs)


def test_gradients_add_up(tiny: Tiny, adapters: Adapters) -> None:
    """Two losses in turn, as in gradient accumulation, and one result that is used twice."""
    path = tiny("llama")
    model = PTEModel.from_pretrained(path, adapters(path, rule="ridge"))
    differentiable_log_probs(model, batch()).logprobs.sum().backward()
    once = gradients(model)
    for _ in range(2):
        differentiable_log_probs(model, batch()).logprobs.sum().backward()
    twice = gradients(model)
    shared = differentiable_log_probs(model, batch()).logprobs
    (shared.sum() + 2 * shared.sum()).backward()
    thrice = gradients(model)
    for name, gradient in once.items():
        assert (twice[name] - 2 * gradient).norm() <= 1e-4 * gradient.norm(), name
        assert (thrice[name] - 3 * gradient).norm() <= 1e-4 * gradient.norm(), name


def test_optimizer_sees_the_gradients(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    model = PTEModel.from_pretrained(path, adapters(path))
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1e-5)
    before = differentiable_log_probs(model, batch()).logprobs.sum()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = differentiable_log_probs(model, batch()).logprobs.sum()
    assert after < before
