"""Gradients of the replay through kept tokens, against autograd of `KeptReference`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pte_vllm.adapter.probes import Probes
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.functional import differentiable_log_probs
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import replay
from pte_vllm.train.replay.window_cache import WindowCache
from tests.harness.models import random_tokens
from tests.train.kept_reference import KeptReference

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

BLOCK = 16
LENGTHS, PINS = (187, 150), (41, 5)
QUERIES = torch.randn(3, 2, 10, 32, generator=torch.Generator().manual_seed(3))
PLANS = [
    FoldPlan(pin_tokens=pin, window_tokens=4 * BLOCK, block_size=BLOCK, keep_tokens=2 * BLOCK)
    for pin in PINS
]
SEQUENCES = [random_tokens(n, seed=n) for n in LENGTHS]
WEIGHTS = torch.randn(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(1))
"""One for every token, so that no token's gradient hides another's."""


def make_batch() -> AlignedBatch:
    return AlignedBatch.align(SEQUENCES, PLANS)


def load(path: Path, adapter: Path, **options: Any) -> tuple[PTEModel, Keeper]:
    model = PTEModel.from_pretrained(path, adapter, **options)
    return model, Keeper(model, Probes.of(QUERIES, "none"))


def loss(scores: Scores) -> Tensor:
    return (scores.logprobs * WEIGHTS[scores.rows, scores.tokens]).sum()


def gradients(model: PTEModel) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_trainable() if p.grad is not None}
    for parameter in model.trainable_parameters():
        parameter.grad = None
    return found


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], error: float
) -> None:
    assert found.keys() == expected.keys() and found
    largest = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6 * largest)
        assert difference <= error, f"{name}: relative error {difference:.1e}"


@pytest.mark.parametrize("mode", ["full", "segments"])
def test_a_lora_has_the_gradients_of_one_masked_forward(
    mode: Any, tiny: Tiny, adapters: Adapters
) -> None:
    """In mode `segments` keys and values of earlier segments, kept ones too, are constants."""
    path = tiny("llama")
    model, keeper = load(path, adapters(path, plain=True))
    result = replay(model, make_batch(), backward=mode, loss=loss, keeper=keeper)
    found = gradients(model)
    assert [sum(f.marks is not None for f in folds) for folds in result.folds] == [3, 3]
    for b, (ids, plan) in enumerate(zip(SEQUENCES, PLANS, strict=True)):
        reference = KeptReference(model.base, plan, QUERIES, cut=mode == "segments")
        (reference.log_probs(ids) * WEIGHTS[b, 1 : len(ids)]).sum().backward()
    assert_same_gradients(found, gradients(model), 1e-4)


def test_older_keys_and_values_matter(tiny: Tiny, adapters: Adapters) -> None:
    """The two modes differ, and so do plans with and without kept tokens."""
    path = tiny("llama")
    model, keeper = load(path, adapters(path, plain=True))
    replay(model, make_batch(), backward="full", loss=loss, keeper=keeper)
    full = gradients(model)
    replay(model, make_batch(), backward="segments", loss=loss, keeper=keeper)
    segments = gradients(model)
    plain = [FoldPlan(pin_tokens=pin, window_tokens=4 * BLOCK, block_size=BLOCK) for pin in PINS]
    replay(model, AlignedBatch.align(SEQUENCES, plain), backward="full", loss=loss)
    without = gradients(model)
    name = "model.layers.0.self_attn.k_proj.lora_B"
    for other in (segments, without):
        assert (other[name] - full[name]).norm() > 1e-2 * full[name].norm()


@pytest.mark.parametrize("recompute", [False, True])
def test_states_beside_kept_tokens(
    recompute: bool, tiny: Tiny, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constant memory is one graph over everything with what is committed cut from its history."""
    path = tiny("qwen3")
    directory = adapters(path, rule="ridge")
    model, keeper = load(path, directory, gradient_checkpointing=recompute)
    result = replay(model, make_batch(), backward="segments", loss=loss, keeper=keeper)
    found = gradients(model)
    model, keeper = load(path, directory)
    commit = WindowCache.commit
    monkeypatch.setattr(WindowCache, "commit", lambda cache, detach: commit(cache, detach=True))
    whole = replay(model, make_batch(), backward="full", loss=loss, keeper=keeper)
    expected = gradients(model)
    assert expected["encoder.w_k"].norm() > 0
    assert_same_gradients(found, expected, 1e-4)
    torch.testing.assert_close(result.logprobs, whole.logprobs, atol=1e-5, rtol=0)


def test_differentiable_log_probs(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("llama")
    model, keeper = load(path, adapters(path, rule="ridge"))
    free = replay(model, make_batch(), keeper=keeper)
    marks = [[fold.marks for fold in folds] for folds in free.folds]
    last = marks[1][-1]
    assert last is not None
    marks[1][-1] = last.flip(-1)  # something else than the probes say
    found = differentiable_log_probs(model, make_batch(), keeper=keeper, marks=marks)
    (found.logprobs * WEIGHTS).sum().backward()
    got = gradients(model)
    result = replay(model, make_batch(), backward="segments", loss=loss, keeper=keeper, marks=marks)
    assert torch.equal(found.logprobs, result.logprobs)
    assert not torch.equal(found.logprobs[1], free.logprobs[1])
    assert_same_gradients(got, gradients(model), 1e-4)
