"""Rollouts made without a server: random answers with the log-probs that a model gives them."""

from __future__ import annotations

from collections.abc import Sequence

from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.aligned import AlignedBatch
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import replay
from pte_vllm.wire.rollout import Rollout, WeightSpan
from tests.harness.models import random_tokens

BLOCK = 16


def plan(pin_tokens: int, window_blocks: int = 2) -> FoldPlan:
    return FoldPlan(pin_tokens=pin_tokens, window_tokens=window_blocks * BLOCK, block_size=BLOCK)


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
) -> Rollout:
    """An answer of random tokens; `spans` are (version, end) of its weight versions."""
    prompt = random_tokens(prompt_tokens, seed=100 + group)
    answer = random_tokens(tokens, seed=1000 * (group + 1) + index)
    fold_plan = plan(prompt_tokens, window_blocks)
    found = replay(
        model, AlignedBatch.align([[*prompt, *answer]], [fold_plan]), temperature=temperature
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
    )
