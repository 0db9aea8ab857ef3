"""Engine against the replay in plain transformers: the figure every parity test reports."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter
from pte_vllm.adapter.probes import Probes
from pte_vllm.method.keep_marks import marks_of
from pte_vllm.method.kept_record import KeptRecord
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.keeping import Keeper
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs
from pte_vllm.wire.folds import num_folds
from tests.harness.engine import Job

TOLERANCE = 2e-4
"""Largest difference in log-prob, fp32."""
AGREEMENT = 0.995
"""Least part of what the engine kept that the replay would have kept by itself."""


@cache
def load_model(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def replayed(
    model: Path,
    adapter: Path | None,
    tokens: list[int],
    plan: FoldPlan,
    *,
    rule: str | None = None,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    probes: Path | None = None,
    record: KeptRecord = (),
) -> torch.Tensor:
    """Log-prob of every token after the first, `[T - 1]`, where folds keep what `record` says.

    Left to itself, the replay would keep the same but for near ties.
    """
    loaded = None if adapter is None else Adapter.load(adapter)
    attached = PTEModel(load_model(model, dtype), loaded)
    try:
        if not plan.keep_tokens:
            return log_probs(attached, tokens, plan, rule=rule, temperature=temperature).logprobs[
                0, 1:
            ]
        config, count = attached.base.config, num_folds(plan, len(tokens))
        marks = marks_of(record, plan, config.num_hidden_layers, config.num_key_value_heads)
        assert len(marks) >= count, f"{len(marks)} records of {count} folds"
        found = log_probs(
            *(attached, tokens, plan),
            rule=rule,
            temperature=temperature,
            keeper=None if probes is None else Keeper(attached, Probes.load(probes)),
            marks=[marks[:count]],
        )
        agreed = [fold.agreement for fold in found.folds[0] if fold.agreement is not None]
        if agreed:
            print(f"{len(agreed)} choices, {sum(agreed) / len(agreed):.4f} of what was kept agrees")
            assert sum(agreed) / len(agreed) > AGREEMENT
        return found.logprobs[0, 1:]
    finally:
        attached.detach()


def difference(
    model: Path, job: Job, window_tokens: int, *, evict_ratio: float = 0.25, **options: object
) -> torch.Tensor:
    """|Δ log p| of every generated token, `[max_tokens]`; what the engine kept is kept again."""
    assert job.finished and len(job.tokens) == job.max_tokens
    adapter = Path(job.adapter.lora_path) if job.adapter is not None else None
    expected = replayed(
        model,
        adapter,
        job.prompt + job.tokens,
        job.plan(window_tokens, evict_ratio),
        rule=job.options.get("pte_update"),
        probes=job.probes,
        record=job.kept,
        **options,
    )
    found = torch.tensor(job.logprobs)
    return (found - expected[len(job.prompt) - 1 :].float()).abs()


def assert_parity(
    model: Path,
    jobs: list[Job],
    window_tokens: int,
    *,
    min_folds: int = 0,
    evict_ratio: float = 0.25,
) -> float:
    """Every job within TOLERANCE of the replay; returns the largest difference."""
    worst = 0.0
    for job in jobs:
        plan = job.plan(window_tokens, evict_ratio)
        folds = plan.folded_blocks(len(job.prompt) + len(job.tokens) - 1) // plan.evict_blocks
        assert folds >= min_folds or not plan.bounded, f"{folds} folds only"
        found = difference(model, job, window_tokens, evict_ratio=evict_ratio).max().item()
        name = job.adapter.lora_name if job.adapter is not None else "no adapter"
        print(f"{name}: {folds} folds, max |Δ log p| {found:.1e}")
        assert found <= TOLERANCE, f"{name} {job.options}: max |Δ log p| {found:.1e}"
        worst = max(worst, found)
    return worst
