"""Rollouts made without a server: random answers with the log-probs that a model gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pte_vllm.method import keep
from pte_vllm.method.keep_marks import num_candidates, packed_bytes
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.keeping import Marks
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import replay
from pte_vllm.wire.folds import num_folds
from pte_vllm.wire.rollout import Rollout, WeightSpan
from tests.harness.models import random_tokens

BLOCK = 16


def plan(pin_tokens: int, window_blocks: int = 2, keep_tokens: int = 0) -> FoldPlan:
    return FoldPlan(
        pin_tokens=pin_tokens,
        window_tokens=window_blocks * BLOCK,
        block_size=BLOCK,
        keep_tokens=keep_tokens,
        keep_score="random" if keep_tokens else "expected",
    )


def other_marks(model: PTEModel, fold_plan: FoldPlan, num_folds: int, seed: int) -> Marks:
    """What a sampler might have kept at each fold, which a replay would not choose."""
    generator = torch.Generator().manual_seed(seed)
    config, found = model.base.config, []
    for fold in range(num_folds):
        size = num_candidates(fold_plan, fold)
        scores = torch.rand(
            *(config.num_hidden_layers, config.num_key_value_heads, size), generator=generator
        )
        kept = keep.survival(keep.best(scores, fold_plan.keep_tokens), size)
        found.append(kept if fold_plan.selects(fold) else None)
    return found


def make_rollout(
    model: PTEModel,
    *,
    group: int = 0,
    index: int = 0,
    prompt_tokens: int = 21,
    tokens: int = 90,
    spans: Sequence[tuple[int, int]] = ((1, 10_000),),
    finish_reason: str = "stop",
    temperature: float = 1.0,
    window_blocks: int = 2,
    keep_tokens: int = 0,
) -> Rollout:
    """An answer of random tokens; `spans` are (version, end) of its weight versions."""
    prompt = random_tokens(prompt_tokens, seed=100 + group)
    answer = random_tokens(tokens, seed=1000 * (group + 1) + index)
    fold_plan = plan(prompt_tokens, window_blocks, keep_tokens)
    marks: Marks = ()
    if keep_tokens:
        marks = other_marks(model, fold_plan, num_folds(fold_plan, prompt_tokens + tokens), index)
    found = replay(
        *(model, AlignedBatch.align([[*prompt, *answer]], [fold_plan])),
        temperature=temperature,
        marks=[marks] if keep_tokens else None,
    ).logprobs[0, prompt_tokens:]
    versions, start = [], 0
    for version, end in spans:
        versions.append(WeightSpan(version=version, start=start, end=min(end, tokens)))
        start = end
    return Rollout(
        prompt_ids=tuple(prompt),
        completion_ids=tuple(answer),
        logprobs=tuple(found.tolist()),
        mask=(1,) * tokens,
        finish_reason=finish_reason,
        adapter="policy@1",
        weight_versions=tuple(versions),
        plan=fold_plan,
        group_id=f"group-{group}",
        index=index,
        num_preempted=0,
        kept=tuple(None if m is None else packed_bytes(m) for m in marks) if keep_tokens else None,
    )
