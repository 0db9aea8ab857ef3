"""Gradients of the replay: constant-memory against one graph, full against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pte_vllm.method.names import RULE_NAMES
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.results import Scores
from pte_vllm.train.replay.segments import replay
from pte_vllm.train.replay.window_cache import WindowCache
from tests.harness.models import random_tokens

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

BLOCK = 16
LENGTHS = (203, 187, 218, 209)  # from 6 folds on
PINS = (41, 5, 60, 20)
STEPS, RELATIVE = {"linear": 4e-4, "squared": 1.5e-3}, 0.02
"""Of finite differences in fp32. Steps are long, as shorter ones drown in rounding on some CPUs; a
second one of twice the length cancels the curvature."""


def fold_plan(pin_tokens: int) -> FoldPlan:
    return FoldPlan(pin_tokens=pin_tokens, window_tokens=4 * BLOCK, block_size=BLOCK)


def make_batch() -> tuple[AlignedBatch, list[list[int]]]:
    ids = [random_tokens(n, seed=n) for n in LENGTHS]
    return AlignedBatch.align(ids, [fold_plan(p) for p in PINS]), ids


def load(path: Path, adapter: Path, **options: Any) -> PTEModel:
    return PTEModel.from_pretrained(path, adapter, **options)


def weights() -> Tensor:
    """A weight for every token, `[B, longest]`, so that no token's gradient hides another's."""
    return torch.randn(len(LENGTHS), max(LENGTHS), generator=torch.Generator().manual_seed(1))


def weighted_loss(scores: Scores) -> Tensor:
    entropy = -(scores.logits.log_softmax(-1).exp() * scores.logits.log_softmax(-1)).sum(-1)
    return ((scores.logprobs + 0.1 * entropy) * weights()[scores.rows, scores.tokens]).sum()


def gradients(model: PTEModel) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_trainable() if p.grad is not None}
    for parameter in model.trainable_parameters():
        parameter.grad = None
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        # Some are zero but for rounding, such as that of S_0's gain, which normalisation undoes.
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6 * largest)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("rule", "features"), [*((rule, "linear") for rule in RULE_NAMES), ("ridge", "squared")]
)
def test_constant_memory_is_autograd_of_the_same_computation(
    rule: str, features: str, tiny: Tiny, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph over everything, keys and values detached between segments, says the same."""
    path = tiny("llama")
    model, (batch, _) = load(path, adapters(path, features=features)), make_batch()
    result = replay(model, batch, rule=rule, backward="segments", loss=weighted_loss)
    assert min(len(folds) for folds in result.folds) >= 6
    found = gradients(model)

    commit = WindowCache.commit
    monkeypatch.setattr(WindowCache, "commit", lambda cache, detach: commit(cache, detach=True))
    whole = replay(model, batch, rule=rule, backward="full", loss=weighted_loss)
    expected = gradients(model)
    encoder = {n.removeprefix("encoder.") for n in expected if n.startswith("encoder.")}
    assert {"w_k", "w_v"} <= encoder and sum("lora" in n for n in expected) == 2 * 21
    assert_same_gradients(found, expected)
    assert result.loss == pytest.approx(whole.loss, rel=1e-5)
    torch.testing.assert_close(result.logprobs, whole.logprobs, atol=1e-5, rtol=0)


def test_the_two_modes_differ(tiny: Tiny, adapters: Adapters) -> None:
    """Gradients through older keys and values are no rounding error, so the test above can fail."""
    path = tiny("llama")
    model, (batch, _) = load(path, adapters(path)), make_batch()
    replay(model, batch, backward="segments", loss=weighted_loss)
    segments = gradients(model)
    replay(model, batch, backward="full", loss=weighted_loss)
    full = gradients(model)
    name = "model.layers.0.self_attn.k_proj.lora_B"
    assert (segments[name] - full[name]).norm() > 1e-2 * full[name].norm()


def test_gradient_checkpointing_changes_nothing(tiny: Tiny, adapters: Adapters) -> None:
    path = tiny("qwen3")
    batch, _ = make_batch()
    found = []
    for recompute in (False, True):
        model = load(path, adapters(path), gradient_checkpointing=recompute)
        replay(model, batch, backward="segments", loss=weighted_loss)
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])
    with pytest.raises(ValueError, match="segments"):
        replay(model, batch, backward="full", loss=weighted_loss)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("rule", "features"),
    [*((rule, "linear") for rule in RULE_NAMES), ("ridge", "squared"), ("delta", "squared")],
)
def test_full_mode_against_finite_differences(
    rule: str, features: str, architecture: str, tiny: Tiny, adapters: Adapters
) -> None:
    """Along a random direction in all of A, in all of B, and in the encoder."""
    path = tiny(architecture)
    model = load(path, adapters(path, features=features))
    batch, _ = make_batch()
    start = model.adapter()

    def loss(scores: Scores) -> Tensor:
        return (scores.logprobs * weights()[scores.rows, scores.tokens]).sum()

    replay(model, batch, rule=rule, backward="full", loss=loss)
    found = gradients(model)
    generator = torch.Generator().manual_seed(0)
    for group in ("lora_A", "lora_B", "encoder"):
        parameters = {n: p for n, p in model.named_trainable() if group in n and n in found}
        directions = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
        slope = sum(float((found[n] * d).sum()) for n, d in directions.items())
        differences = []
        for step in (STEPS[features], 2 * STEPS[features]):
            ends = []
            for signed in (step, -step):
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter += signed * directions[name]
                ends.append(replay(model, batch, rule=rule, loss=loss).loss)
                model.load_adapter_weights(start)
            differences.append((ends[0] - ends[1]) / (2 * step))
        measured = (4 * differences[0] - differences[1]) / 3  # of fourth order in the step
        assert measured == pytest.approx(slope, rel=RELATIVE), group
