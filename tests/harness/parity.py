"""Engine against the replay in plain transformers: the figure every parity test reports."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pte_vllm.adapter.format import Adapter
from pte_vllm.method.plan import FoldPlan
from pte_vllm.train.replay.modeling import PTEModel
from pte_vllm.train.replay.segments import log_probs
from tests.harness.engine import Job

TOLERANCE = 2e-4
"""Largest difference in log-prob, fp32."""


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
) -> torch.Tensor:
    """Log-prob of every token after the first, `[T - 1]`."""
    loaded = None if adapter is None else Adapter.load(adapter)
    attached = PTEModel(load_model(model, dtype), loaded)
    try:
        found = log_probs(attached, tokens, plan, rule=rule, temperature=temperature)
        return found.logprobs[0, 1:]
    finally:
        attached.detach()


def difference(
    model: Path, job: Job, window_tokens: int, *, evict_ratio: float = 0.25, **options: object
) -> torch.Tensor:
    """|Δ log p| of every generated token, `[max_tokens]`."""
    assert job.finished and len(job.tokens) == job.max_tokens
    adapter = Path(job.adapter.lora_path) if job.adapter is not None else None
    expected = replayed(
        model,
        adapter,
        job.prompt + job.tokens,
        job.plan(window_tokens, evict_ratio),
        rule=job.options.get("pte_update"),
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
