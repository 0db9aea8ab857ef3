"""The replay of conversations: each new question is pinned until the next one begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.plan import FoldPlan
from pte_vllm.method.spans import Spans
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs, replay
from pte_vllm.train.replay.window_cache import WindowCache
from tests.harness.models import random_tokens
from tests.train import naive
from tests.train.kept_reference import KeptReference
from tests.train.test_gradients import assert_same_gradients, gradients

Tiny = Callable[[str], Path]
Adapters = Callable[..., Path]

BLOCK = 16
TOKENS = random_tokens(203, seed=5)
QUERIES = torch.randn(3, 2, 10, 32, generator=torch.Generator().manual_seed(3))
PLAN = FoldPlan(pin_tokens=41, window_tokens=3 * BLOCK, evict_ratio=0.34, block_size=BLOCK)
TURNS: list[Spans] = [
    ((60, 90), (150, 170)),
    ((52, 56), (60, 70), (72, 140)),  # three at once before the first fold, the last one long
    ((112, 128), (176, 180)),  # at a boundary; in the middle of a block
    ((42, 47), (180, 203)),  # in the block that is pinned anyway; up to the end
]


def load(path: Path, attention: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention).eval()


@pytest.mark.parametrize("rule", ["paper", "ridge", "delta"])
@pytest.mark.parametrize("pin_spans", TURNS, ids=str)
def test_states_and_log_probs_are_the_method_spelled_out(
    pin_spans: Spans, rule: str, tiny: Tiny, adapters: Adapters
) -> None:
    path, plan = tiny("llama"), replace(PLAN, pin_spans=pin_spans)
    adapter = Adapter.load(adapters(path, rule=rule))
    expected, states = naive.log_probs(load(path, "eager"), adapter, TOKENS, plan, rule)
    found = log_probs(PTEModel(load(path), adapter), TOKENS, plan)
    assert found.states is not None
    assert len(found.folds[0]) == len(naive.walk(len(TOKENS), plan)[1]) >= 2
    torch.testing.assert_close(found.logprobs[0, 1:], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.states[:, 0], states, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("score", ["expected", "random"])
@pytest.mark.parametrize("keep_blocks", [1, 2, 5])
@pytest.mark.parametrize("pin_spans", TURNS, ids=str)
def test_one_kept_set_over_all_turns(
    pin_spans: Spans, keep_blocks: int, score: Any, tiny: Tiny
) -> None:
    """What earlier questions leave is a candidate like any other; places may lie around one."""
    model = PTEModel(load(tiny("llama")).double())  # so that no rounding hides a difference
    keeper = Keeper(model, Probes.of(QUERIES, "none"))
    plan = replace(PLAN, pin_spans=pin_spans, keep_tokens=keep_blocks * BLOCK, keep_score=score)
    found = log_probs(model, TOKENS, plan, keeper=keeper)
    reference = KeptReference(model.base, plan, QUERIES)
    with torch.no_grad():
        expected = reference.log_probs(TOKENS).float()
    torch.testing.assert_close(found.logprobs[0, 1:], expected, atol=5e-6, rtol=0)
    marks = [fold.marks for fold in found.folds[0]]
    for number, own in reference.own.items():
        found_marks = marks[number]
        assert found_marks is not None
        assert torch.equal(found_marks, torch.stack([own[layer] for layer in sorted(own)]))
    again = log_probs(model, TOKENS, plan, keeper=keeper, marks=[marks])
    torch.testing.assert_close(again.logprobs, found.logprobs, atol=0, rtol=0)


def test_sequences_side_by_side(tiny: Tiny, adapters: Adapters) -> None:
    """Their questions lie equally far from the pinned blocks, of which one has more."""
    path = tiny("llama")
    plans = [
        replace(PLAN, pin_tokens=pin, pin_spans=((pin + 50, pin + 70), (pin + 90, pin + 95)))
        for pin in (2 * BLOCK, 3 * BLOCK)
    ]
    sequences = [TOKENS[:150], random_tokens(190, seed=4)]
    model = PTEModel(load(path), Adapter.load(adapters(path, rule="ridge")))
    together = replay(model, AlignedBatch.align(sequences, plans))
    for b, (tokens, own) in enumerate(zip(sequences, plans, strict=True)):
        alone = log_probs(model, tokens, own)
        torch.testing.assert_close(
            together.logprobs[b, : len(tokens)], alone.logprobs[0], atol=1e-5, rtol=0
        )
        assert [f.spans for f in together.folds[b]] == [f.spans for f in alone.folds[0]]
    with pytest.raises(ValueError, match="where later questions lie"):
        AlignedBatch.align(sequences, [plans[0], replace(plans[1], pin_spans=((99, 110),))])


def test_gradients_of_folds_that_follow_each_other(
    tiny: Tiny, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constant memory against one graph, where several folds stand at one boundary."""
    path, plan = tiny("llama"), replace(PLAN, pin_spans=((60, 120), (150, 170)))
    assert len({plan.fold_at(i) for i in range(plan.folds(202))}) < plan.folds(202)
    model = PTEModel.from_pretrained(path, adapters(path, rule="paper"))
    batch = AlignedBatch.align([TOKENS], [plan])
    replay(model, batch, backward="segments", loss=lambda scores: scores.logprobs.sum())
    found = gradients(model)
    commit = WindowCache.commit
    monkeypatch.setattr(WindowCache, "commit", lambda cache, detach: commit(cache, detach=True))
    replay(model, batch, backward="full", loss=lambda scores: scores.logprobs.sum())
    assert_same_gradients(found, gradients(model))
