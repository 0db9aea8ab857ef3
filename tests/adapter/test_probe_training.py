"""Probes learn which tokens later queries attend to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.future_attention import look_ahead
from pte_vllm.adapter.probe_training import log_shares, train_probes
from pte_vllm.method import keep
from pte_vllm.method.plan import FoldPlan
from tests.harness.models import random_tokens

Tiny = Callable[[str], Path]
Answer = tuple[list[int], FoldPlan]
BLOCK = 16
PLAN = FoldPlan(pin_tokens=20, window_tokens=64, block_size=BLOCK, keep_tokens=32)


def queries(num_probes: int = 8) -> torch.Tensor:
    return torch.randn(3, 2, num_probes, 32, generator=torch.Generator().manual_seed(3))


def answer(num_tokens: int = 190, seed: int = 1) -> Answer:
    return random_tokens(num_tokens, seed=seed), PLAN


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def test_scores_are_those_of_a_fold() -> None:
    g = torch.Generator().manual_seed(0)
    probes, keys, newest = (torch.randn(2, n, 32, generator=g) for n in (7, 12, 5))
    values = torch.randn(2, 12, 32, generator=g)
    found = log_shares(probes, keys, newest, 0.3).exp() * values.norm(dim=-1)
    torch.testing.assert_close(found, keep.expected_scores(probes, keys, values, newest, 0.3))
    # A share that is too small for a number has a score and a gradient, both finite.
    far = (400 * keys).requires_grad_()
    scores = log_shares(probes, far, newest, 0.3)
    scores.sum().backward()
    assert bool(keep.expected_scores(probes, far, values, newest, 0.3).eq(0).any())
    assert bool(scores.isfinite().all()) and far.grad is not None
    assert bool(far.grad.isfinite().all())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_worth_is_later_attention(architecture: str, tiny: Tiny) -> None:
    """Against the attention weights that transformers itself returns."""
    path, chosen = tiny(architecture), answer()
    model = load(path)
    future = look_ahead(model, *chosen)
    assert future is not None
    assert future.folds == tuple(f for f in range(PLAN.folds(189)) if PLAN.selects(f))
    eager = load(path, attn_implementation="eager")
    with torch.no_grad():
        output = eager(torch.tensor([chosen[0]]), output_attentions=True, use_cache=True)
    first = PLAN.pinned_blocks * BLOCK
    for layer, shares in enumerate(output.attentions):
        past = output.past_key_values.layers[layer]
        keys, norms = past.keys[0, :, first:], past.values[0, :, first:].norm(dim=-1)
        torch.testing.assert_close(future.keys[layer].float(), keys, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(future.norms[layer].float(), norms, atol=2e-3, rtol=2e-3)
        for i, fold in enumerate(future.folds):
            start = PLAN.first_fold + fold * PLAN.stride
            later = shares[0, :, start:, first:start].unflatten(0, (len(keys), -1))
            wanted = later.square().mean((1, 2)).sqrt() * norms[:, : start - first]
            found = future.worth[layer, :, i].float()
            torch.testing.assert_close(found[:, : start - first], wanted, atol=1e-3, rtol=1e-2)
            assert not bool(found[:, start - first :].any())


def test_short_answers_choose_nothing(tiny: Tiny) -> None:
    model = load(tiny("llama"))
    assert look_ahead(model, *answer(110)) is None
    with pytest.raises(ValueError, match="0 answers are long enough that a fold chooses"):
        train_probes(model, [answer(110)] * 3, queries(), steps=1, lr=0.1, batch_folds=1, seed=0)


def test_training_finds_what_is_attended_to(tiny: Tiny) -> None:
    model = load(tiny("llama"))
    answers = [answer(170 + i, seed=i) for i in range(6)]
    heard: list[tuple[str, int, int]] = []

    def run(seed: int) -> Any:
        return train_probes(
            *(model, answers, queries()),
            steps=30,
            lr=0.2,
            batch_folds=2,
            seed=seed,
            progress=lambda *what: heard.append(what),
        )

    probes, report = run(0)
    assert report.loss_after < 0.95 * report.loss_before
    assert report.caught_after > report.caught_before
    assert heard[5] == ("reading", 6, 6) and heard[-1] == ("training", 30, 30)
    again, _ = run(0)
    torch.testing.assert_close(again, probes)
    other, _ = run(1)
    assert not torch.allclose(other, probes)
